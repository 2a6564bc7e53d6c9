"""Images that a training leaves out, such as those whose captions stand in the data that it is measured on."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from st_kdmcse.data.layout import RowNumbers
from st_kdmcse.data.lines import read_lines
from st_kdmcse.data.store import FeatureStore
from st_kdmcse.data.tables import csv_problem, csv_reader

_COLUMN = "image"


@dataclass(frozen=True)
class LeftOut:
    """What a list of images leaves out of a feature store.

    Attributes:
        images: number of images.
        rows: (n,) rows of their captions, in ascending order.
    """

    images: int
    rows: RowNumbers


def whole_images(rows: RowNumbers, store: FeatureStore) -> LeftOut:
    """Leave out the images of some captions, with all of their captions.

    Args:
        rows: (n,) rows of the captions.
        store: the store.

    Raises:
        ValueError: if that is all images.
    """
    images = np.unique(store.image_rows[rows])
    left_out = LeftOut(len(images), np.flatnonzero(np.isin(store.image_rows, images)))
    if len(left_out.rows) == len(store):
        raise ValueError(f"all images of the feature store {store.path} are left out: none is left to train on")
    return left_out


def read_left_out(path: str | Path, store: FeatureStore) -> LeftOut:
    """Read the images to leave out of a feature store.

    Args:
        path: UTF-8 text with an image id a line, or a CSV file with a column ``image``. Blank lines are skipped.
        store: the store.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it lists no image, one that the store does not have (names the line), or all of them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give a list of images, one a line")
    lines = dict(reversed([(image, line) for line, image in _listed(path)]))  # the first line of each
    if not lines:
        raise ValueError(f"{path} lists no image: write an image id a line, or a CSV file with a column {_COLUMN!r}")
    found: set[str] = set()
    rows = []
    for row, (image, _) in enumerate(store.captions()):
        if image in lines:
            found.add(image)
            rows.append(row)
    unknown = min(((line, image) for image, line in lines.items() if image not in found), default=None)
    if unknown is not None:
        raise ValueError(
            f"{path}, line {unknown[0]}: the feature store {store.path} has no image {unknown[1]!r}; remove the line, "
            "or write the id as in the store"
        )
    if len(rows) == len(store):
        raise ValueError(f"{path} lists all images of the feature store {store.path}: none is left to train on")
    return LeftOut(len(found), np.array(rows, dtype=np.int64))


def _listed(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and id of each image."""
    lines = list(read_lines(path, lambda _: None))
    try:
        header: list[str] = next(csv_reader(lines[:1]), [])
    except csv.Error:
        header = []
    if _COLUMN not in header:
        yield from ((number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip())
        return
    reader, column = csv_reader(lines[1:]), header.index(_COLUMN)
    try:
        for fields in reader:
            number = reader.line_num + 1
            if fields and len(fields) <= column:
                raise ValueError(f"{path}, line {number}: no value in the column {_COLUMN!r}; write the file again")
            if fields:
                yield number, fields[column]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num + 1}: {csv_problem(error)}") from error
