"""The files of a feature store: names, formats, and the checks that reading and writing share."""

from __future__ import annotations

from numbers import Integral
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

FeatureDtype = Literal["float16", "float32"]
Array = npt.NDArray[Any]
RowNumbers = npt.NDArray[np.int64]

FORMAT = "st_kdmcse.feature_store"
VERSION = 1
IMAGES, TEXTS, MANIFEST = "image_features.npy", "text_features.npy", "manifest.json"
ARROW, CSV = "captions.arrow", "captions.csv"
STATISTICS = "statistics.json"
SCHEMA = pa.schema(
    [("image", pa.string()), ("caption", pa.string()), ("image_row", pa.int64()), ("text_row", pa.int64())]
)
NOT_FINITE = "NaN or infinite values; compute these features again, or leave them out"
ROWS_PER_BATCH = 65_536
ROWS_PER_CHUNK = 16_384
# Norms of float16 and bfloat16 unit vectors stray from 1 by less than this: their rounding errors average out.
NORM_TOLERANCE = 2e-3


def off_norm(features: Array) -> npt.NDArray[np.bool_]:
    """(n,) True where the norm is not 1."""
    with np.errstate(over="ignore"):
        norms = np.linalg.norm(features.astype(np.float32, copy=False), axis=1)
    off: npt.NDArray[np.bool_] = ~(np.abs(norms - 1) <= NORM_TOLERANCE)
    return off


def as_rows(rows: Any, size: int, owner: str) -> RowNumbers:
    """(B,) int64 row numbers from anything that numpy can read, each at least 0 and less than ``size``."""
    given = np.asarray(rows)
    if given.ndim != 1:
        raise ValueError(f"rows have shape {given.shape}, expected a flat sequence of rows of {owner}")
    if given.dtype.kind not in "iu" or ((given < 0) | (given >= size)).any():
        for row in np.asarray(rows, dtype=object):
            if isinstance(row, bool) or not isinstance(row, Integral) or not 0 <= int(row) < size:
                raise ValueError(f"row {row!r} is not an integer from 0 to {size - 1}: {owner} has {size} rows")
    return given.astype(np.int64, copy=False)
