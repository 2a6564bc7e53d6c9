"""The feature files that the KDMCSE authors released: one large JSON object, streamed into a feature store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import ijson
import numpy as np

from st_kdmcse.data.json_files import json_errors, open_json
from st_kdmcse.data.layout import FeatureDtype
from st_kdmcse.data.store import FeatureStore
from st_kdmcse.data.writer import FeatureStoreWriter
from st_kdmcse.files import byte_progress, foreign_content, is_gzip

_LAYOUT = (
    '{"image.jpg": {"image_feat": [T numbers], "captions": [k strings], "lang_feat": [k lists of T numbers]}, ...}'
)


def import_released_json(
    json_path: str | Path,
    store_path: str | Path,
    dtype: FeatureDtype = "float16",
    teacher: str = "unknown",
    show_progress_bar: bool | None = None,
) -> FeatureStore:
    """Turn a feature file in the layout of the KDMCSE authors into a :class:`~st_kdmcse.data.store.FeatureStore`.

    The file is one JSON object, ``{image: {"image_feat": [T], "captions": [k], "lang_feat": [k][T]}}``. It is streamed,
    an image at a time: memory stays bounded for files of any size.

    Args:
        json_path: the feature file.
        store_path: folder to make; it must not exist.
        dtype: how to store the features.
        teacher: the model that the features come from.
        show_progress_bar: None shows one in a terminal if it takes more than two seconds.

    Returns:
        The store, open. A row for each caption, in the order of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        FileExistsError: if there is something at ``store_path`` already.
        ValueError: if the JSON is malformed or cut off, or an image is not as above or comes twice; names the file, the
            image and its position. Nothing is left at ``store_path`` then.
    """
    json_path = Path(json_path)
    if not json_path.is_file():
        raise FileNotFoundError(f"there is no file {json_path}: give a feature file in the layout {_LAYOUT}")
    with json_path.open("rb") as file:
        found = None if is_gzip(json_path) else foreign_content(file.peek(1))
    if found is not None:
        raise ValueError(
            f"{json_path} is {found}, expected JSON {_LAYOUT}: load it with the library that wrote it, and make a "
            "feature store of its arrays with FeatureStore.from_arrays"
        )
    size = json_path.stat().st_size
    with byte_progress(size, f"Importing {json_path.name}", show_progress_bar) as progress:
        records = _records(json_path, progress.update)
        first = next(records, None)
        if first is None:
            raise ValueError(f"{json_path} holds no images, expected an object {_LAYOUT}")
        with FeatureStoreWriter(store_path, len(first[2]["image_feat"]), dtype, teacher) as writer:
            for position, image_id, record in chain([first], records):
                try:
                    writer.add(image_id, record["image_feat"], record["captions"], record["lang_feat"])
                except ValueError as error:
                    raise ValueError(f"{json_path}, image number {position}: {error}") from error
    return FeatureStore.open(store_path)


def _records(path: Path, on_bytes: Callable[[int], object]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Position (from 1), id and checked record of each image."""
    position = 0
    image_id = None

    def after() -> str:
        return f", after image number {position} ({image_id!r})" if position else ", at the first image"

    with json_errors(path, after), open_json(path, on_bytes) as file:
        for position, (image_id, record) in enumerate(ijson.kvitems(file, "", use_float=True), start=1):
            _check(record, f"{path}, image number {position}: image {image_id!r}")
            yield position, image_id, record


def _check(record: Any, name: str) -> None:
    """What the store's writer cannot check: the layout of a record, and that numbers are numbers."""
    if not isinstance(record, dict):
        raise ValueError(f"{name} has {type(record).__name__} as its value; the layout is {_LAYOUT}")
    missing = [key for key in ("image_feat", "captions", "lang_feat") if not isinstance(record.get(key), list)]
    if missing:
        raise ValueError(f"{name} has no list {', '.join(missing)}; the layout is {_LAYOUT}")
    if not record["image_feat"] or np.ndim(record["image_feat"][0]):
        raise ValueError(f"{name}: image_feat is not a flat list of numbers; the layout is {_LAYOUT}")
