"""Readers of image-caption data sets, each in the format in which its publisher ships it."""

from st_kdmcse.data.readers.base import (
    BadRowError,
    CaptionedImage,
    ImageCaptionReader,
    Problem,
    Problems,
    ReaderSummary,
)
from st_kdmcse.data.readers.coco import Coco
from st_kdmcse.data.readers.flickr import CaptionsCSV, FlickrCSV, FlickrEntities, FlickrTokens
from st_kdmcse.data.readers.hub import HubDataset
from st_kdmcse.data.readers.karpathy import Karpathy
from st_kdmcse.data.readers.open import FORMATS, open_captions
from st_kdmcse.data.readers.table import CaptionTable
from st_kdmcse.data.readers.web import WebDataset

__all__ = [
    "FORMATS",
    "BadRowError",
    "CaptionTable",
    "CaptionedImage",
    "CaptionsCSV",
    "Coco",
    "FlickrCSV",
    "FlickrEntities",
    "FlickrTokens",
    "HubDataset",
    "ImageCaptionReader",
    "Karpathy",
    "Problem",
    "Problems",
    "ReaderSummary",
    "WebDataset",
    "open_captions",
]
