"""Readers of image-caption data sets, each in the format in which its publisher ships it."""

from st_kdmcse.data.readers.base import (
    BadRowError,
    ImageCaptionReader,
    Problem,
    Problems,
    ReaderSummary,
    Record,
)

__all__ = [
    "BadRowError",
    "ImageCaptionReader",
    "Problem",
    "Problems",
    "ReaderSummary",
    "Record",
]
