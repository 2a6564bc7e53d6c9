"""Image-caption data sets of Hugging Face, from a local folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk

from st_kdmcse.data.images import ImageSource
from st_kdmcse.data.readers.base import CaptionedImage, ImageCaptionReader

_SAVED = ("state.json", "dataset_dict.json")


class HubDataset(ImageCaptionReader):
    """A data set that ``datasets`` loads, with an image and its captions a row.

    Images are given as they are stored, encoded bytes or files.

    Args:
        name_or_path: name on the hub (``owner/name``), a folder written by ``save_to_disk``, or a folder of parquet
            files or of images with a ``metadata.csv``.
        image_column: column of images, or of the paths of images; paths are relative to a local folder.
        caption_column: column of captions, each a text or a list of texts.
        split: which split; a data set saved without a name of its split is taken as it is.
        id_column: column of image ids, each unique; None takes the row number, from 0.
        options: those of :class:`~st_kdmcse.data.readers.base.ImageCaptionReader`.

    Raises:
        FileNotFoundError: if there is no such data set.
        ConnectionError: if the hub cannot be reached.
        ValueError: if there is no such split or column, the column holds no images, or an option is out of range.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        image_column: str = "image",
        caption_column: str = "caption",
        split: str = "train",
        id_column: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.name = str(name_or_path)
        self._folder = Path(name_or_path) if Path(name_or_path).is_dir() else None
        self._columns = (image_column, caption_column, id_column)
        dataset = _load(self.name, self._folder, split)
        wanted = [column for column in dict.fromkeys(self._columns) if column is not None]
        missing = [column for column in wanted if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"{self.name} has no column {missing[0]!r}; its columns: {', '.join(dataset.column_names)}"
            )
        try:
            self._dataset = dataset.select_columns(wanted).cast_column(image_column, Image(decode=False))
        except (pa.ArrowException, TypeError, ValueError) as error:
            kind = dataset.features[image_column]
            raise ValueError(
                f"{self.name}: the column {image_column!r} is {kind}, expected images or paths; choose another column"
            ) from error

    @cached_property
    def num_images(self) -> int:
        """Number of rows."""
        return len(self._dataset)

    def _records(self) -> Iterator[CaptionedImage]:
        image_column, caption_column, id_column = self._columns
        for row, values in enumerate(self._dataset):
            where = f"{self.name}, row {row}"
            image_id = row if id_column is None else values[id_column]
            source = self._source(values[image_column])
            if source is None:
                self.problems.add("no image file", where, "the row has no image: fill it in, or leave the row out")
                continue
            if image_id is None or not str(image_id):
                self.problems.add("no id", where, f"nothing in {id_column!r}: fill it in, or choose another id_column")
                continue
            found = values[caption_column]
            if isinstance(found, list) and not found:
                self.problems.add("no caption", where, "the list of captions is empty: fill it, or leave the row out")
            texts = found if isinstance(found, list) else [found]
            captions = tuple(caption for caption in texts if self._has_text(caption, where))
            if captions:
                yield CaptionedImage(str(image_id), source, captions, where)

    def _source(self, image: dict[str, Any] | None) -> ImageSource | None:
        if image is None:
            return None
        if image["bytes"] is not None:
            content: bytes = image["bytes"]
            return content
        return Path(self._folder or "", image["path"]) if image["path"] else None


def is_hub_folder(folder: Path) -> bool:
    """Whether a folder holds a data set in one of the layouts of ``datasets``."""
    return (
        any((folder / name).is_file() for name in _SAVED)
        or any(folder.glob("*.parquet"))
        or any(folder.glob("data/*.parquet"))
        or any(folder.glob("metadata.*"))
        or any(folder.glob("*/metadata.*"))
    )


def _load(name: str, folder: Path | None, split: str) -> Dataset:
    if folder is None or not any((folder / file).is_file() for file in _SAVED):
        return load_dataset(name if folder is None else str(folder), split=split)
    saved = load_from_disk(str(folder))
    splits = list(saved) if isinstance(saved, DatasetDict) else [str(saved.split or split)]
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; its splits: {', '.join(splits)}")
    return saved[split] if isinstance(saved, DatasetDict) else saved
