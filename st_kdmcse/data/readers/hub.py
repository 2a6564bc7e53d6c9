"""Image-caption data sets of Hugging Face, from a local folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, Image, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from st_kdmcse.data.images import ImageSource
from st_kdmcse.data.readers.base import CaptionedImage, ImageCaptionReader
from st_kdmcse.data.readers.columns import SPLIT_COLUMN, captions_in, choose_columns, no_columns, wanted_splits
from st_kdmcse.data.readers.parsing import image_folder

_SAVED = ("state.json", "dataset_dict.json")
# What datasets and the libraries under it raise for files that they cannot read; pandas and fsspec have their own.
_UNREADABLE = (DatasetsError, pa.ArrowException, OSError, ValueError, TypeError, LookupError, RuntimeError)


class HubDataset(ImageCaptionReader):
    """A data set that ``datasets`` loads, with an image and its captions a row.

    Images are given as they are stored, encoded bytes or files.

    Args:
        name_or_path: name on the hub (``owner/name``), a folder written by ``save_to_disk``, or a folder of parquet
            files or of images with a ``metadata.csv``.
        image_column: column of images, or of the paths of images; "auto" takes it from common names.
        caption_column: column of captions, each a text or a list of texts, or several with commas between them; "auto"
            takes them from common names, such as ``caption``, or ``caption_0``, ``caption_1``, ...
        split: which split; a data set saved without a name of its split is taken as it is. Where there is no split of
            that name, the rows with it in the column ``split``; "train+val" is two.
        id_column: column of image ids, each unique; None takes the row number, from 0.
        images: folder that the paths of images are relative to; None is a local folder itself.
        options: those of :class:`~st_kdmcse.data.readers.base.ImageCaptionReader`.

    Raises:
        FileNotFoundError: if there is no such data set.
        ConnectionError: if the hub cannot be reached.
        ValueError: if the data set cannot be read, there is no such split or column, the column holds no images, or an
            option is out of range.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        image_column: str = "auto",
        caption_column: str = "auto",
        split: str = "train",
        id_column: str | None = None,
        images: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.name = str(name_or_path)
        folder = Path(name_or_path) if Path(name_or_path).is_dir() else None
        self._images = image_folder(images) or folder
        self._anywhere = images is None
        dataset, self._rows = _load(self.name, folder, split)
        found = choose_columns(dataset.column_names, image_column, caption_column)
        if found is None:
            raise no_columns(self.name, dataset.column_names, image_column, caption_column)
        if id_column is not None and id_column not in dataset.column_names:
            raise ValueError(f"{self.name} has no column {id_column!r}; its columns: {', '.join(dataset.column_names)}")
        self._image_column, self._caption_columns, self._id_column = found.image, found.captions, id_column
        wanted = [found.image, *found.captions, *([] if id_column is None else [id_column])]
        try:
            dataset = dataset.select_columns(list(dict.fromkeys(wanted)))
            self._dataset = dataset.cast_column(found.image, Image(decode=False))
        except (pa.ArrowException, TypeError, ValueError) as error:
            kind = dataset.features[found.image]
            raise ValueError(
                f"{self.name}: the column {found.image!r} is {kind}, expected images or paths; choose another column"
            ) from error

    @cached_property
    def num_images(self) -> int:
        """Number of rows."""
        return len(self._dataset)

    def _records(self) -> Iterator[CaptionedImage]:
        rows, place = iter(self._dataset), self.name
        for row in self._rows:
            place = f"{self.name}, row {row}"
            try:
                values = next(rows)
            except _UNREADABLE as error:
                raise ValueError(f"{place}: damaged ({_first_line(error)}): download the data set again") from error
            record = self._record(values, row, place)
            if record is not None:
                yield record

    def _record(self, values: dict[str, Any], row: int, where: str) -> CaptionedImage | None:
        image_id = row if self._id_column is None else values[self._id_column]
        source = self._source(values[self._image_column])
        if source is None:
            self.problems.add("no image file", where, "the row has no image: fill it in, or leave the row out")
            return None
        if image_id is None or not str(image_id):
            message = f"nothing in {self._id_column!r}: fill it in, or choose another id_column"
            self.problems.add("no id", where, message)
            return None
        found = captions_in(*(values[name] for name in self._caption_columns))
        if not found:
            self.problems.add("no caption", where, "the list of captions is empty: fill it, or leave the row out")
        captions = tuple(caption for caption in found if self._has_text(caption, where))
        return CaptionedImage(str(image_id), source, captions, where) if captions else None

    def _is_inside(self, image: ImageSource | None) -> bool:
        """Also where a saved data set names files by whole paths, unless the folder of images was given."""
        elsewhere = isinstance(image, Path) and self._images is not None and not image.is_relative_to(self._images)
        return (self._anywhere and elsewhere) or super()._is_inside(image)

    def _source(self, image: dict[str, Any] | None) -> ImageSource | None:
        if image is None:
            return None
        if image["bytes"] is not None:
            content: bytes = image["bytes"]
            return content
        return Path(self._images or "", image["path"]) if image["path"] else None


def is_hub_folder(folder: Path) -> bool:
    """Whether a folder holds a data set in one of the layouts of ``datasets``."""
    return (
        any((folder / name).is_file() for name in _SAVED)
        or any(folder.glob("*.parquet"))
        or any(folder.glob("data/*.parquet"))
        or any(folder.glob("metadata.*"))
        or any(folder.glob("*/metadata.*"))
    )


def _load(name: str, folder: Path | None, split: str) -> tuple[Dataset, Sequence[int]]:
    """The data set, and the numbers of its rows in their split."""
    try:
        if folder is None or not any((folder / file).is_file() for file in _SAVED):
            found = load_dataset(name if folder is None else str(folder))
        else:
            found = load_from_disk(str(folder))
    except (FileNotFoundError, ConnectionError):
        raise
    except _UNREADABLE as error:
        raise ValueError(_unreadable(name, error)) from error
    splits = found if isinstance(found, DatasetDict) else DatasetDict({str(found.split or split): found})
    if split in splits:
        return splits[split], range(len(splits[split]))
    wanted = wanted_splits(split) or frozenset()
    with_column = [each for each in splits.values() if SPLIT_COLUMN in each.column_names]
    if with_column:
        whole = concatenate_datasets(with_column) if len(with_column) > 1 else with_column[0]
        values = np.array([str(value) for value in whole[SPLIT_COLUMN]])
        if wanted <= set(values):
            rows = np.flatnonzero(np.isin(values, list(wanted)))
            return whole.select(rows), rows.tolist()
        values_found = f"; in its column {SPLIT_COLUMN!r}: {', '.join(sorted(set(values)))}"
    raise ValueError(
        f"{name} has no split {split!r}; its splits: {', '.join(splits)}{values_found if with_column else ''}"
    )


def _unreadable(name: str, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:  # datasets wraps what was wrong in "An error occurred while generating"
        cause = cause.__cause__
    message = f"{name} cannot be read: {_first_line(cause)}"
    if "scripts are no longer supported" in message:
        return f"{message}. Look for a copy of it in parquet files (on the hub: the branch refs/convert/parquet)"
    if "column" in str(cause):
        return f"{message}. All its files must have the same columns: correct them, or give one file"
    return f"{message}. Check its files, or download them again"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
