"""The content of a feature store, read and checked to the last byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from st_kdmcse.data.characters import CONTROL_CHARACTERS
from st_kdmcse.data.layout import MANIFEST, NOT_FINITE, ROWS_PER_CHUNK, Array, RowNumbers, off_norm
from st_kdmcse.files import sha256_file


def verify_checksum(path: Path, sha256: str, on_bytes: Callable[[int], object]) -> None:
    """Compare a file with the SHA-256 of its manifest.

    Args:
        path: the file.
        sha256: what its manifest says, 64 hexadecimal digits.
        on_bytes: called with the number of bytes of each chunk after it is read.

    Raises:
        ValueError: if the file has another checksum.
    """
    if sha256_file(path, on_bytes) != sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}; copy or write the store again")


def verify_encoding(path: Path, table: pa.Table) -> None:
    """Check that a table is intact: its buffers, offsets and UTF-8.

    Raises:
        ValueError: naming the file.
    """
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged ({error}): copy or write the store again") from error


def verify_table(path: Path, table: pa.Table, image_rows: RowNumbers) -> None:
    """Check that no caption or id is empty, no id holds a control character, and each image id has one image row.

    Args:
        path: the file of the table, for errors.
        table: its content.
        image_rows: (rows,) the image row of each caption.

    Raises:
        ValueError: naming the file and the row.
    """
    for name in ("image", "caption"):
        empty = pc.index(pc.equal(pc.utf8_trim_whitespace(table.column(name)), ""), True).as_py()
        if empty >= 0:
            raise ValueError(f"{path}, row {empty}: the {name} is empty; leave that row out")
    forbidden = pc.match_substring_regex(table.column("image"), CONTROL_CHARACTERS)
    row = pc.index(forbidden, True).as_py()
    if row >= 0:
        image_id = table.column("image")[row].as_py()
        raise ValueError(f"{path}, row {row}: the image id {image_id!r} holds a control character; leave it out")
    ids = table.column("image").dictionary_encode().combine_chunks()
    codes = ids.indices.to_numpy()
    first_row_of_id = np.zeros(len(ids.dictionary), dtype=np.int64)
    first_row_of_id[codes[::-1]] = np.arange(len(codes))[::-1]
    wrong = np.flatnonzero(image_rows != image_rows[first_row_of_id[codes]])
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(
            f"{path}, row {row}: image {ids.dictionary[codes[row]].as_py()!r} has image_row {image_rows[row]} here and "
            f"{image_rows[first_row_of_id[codes[row]]]} in an earlier row; give each image one row"
        )


def verify_features(path: Path, features: Array, normalized: bool, on_bytes: Callable[[int], object]) -> None:
    """Check that features are finite, and that their norms are 1 if the store says so.

    Args:
        path: the file of the features, for errors.
        features: (n, T), read in chunks.
        normalized: whether all norms must be 1.
        on_bytes: called with the number of bytes of each chunk after it is checked.

    Raises:
        ValueError: naming the file and the row.
    """
    for start in range(0, len(features), ROWS_PER_CHUNK):
        chunk = features[start : start + ROWS_PER_CHUNK]
        bad = np.flatnonzero(~np.isfinite(chunk).all(axis=1))
        if bad.size:
            raise ValueError(f"{path}, row {start + bad[0]}: {NOT_FINITE}")
        bad = np.flatnonzero(off_norm(chunk)) if normalized else bad
        if bad.size:
            norm = np.linalg.norm(chunk[bad[0]].astype(np.float64))
            raise ValueError(
                f"{path}, row {start + bad[0]}: the norm is {norm:.4f} though the store's features are said to be "
                "normalised; write the store again with normalized=False, or normalise them first"
            )
        on_bytes(chunk.nbytes)
