"""The JSON files of Karpathy's splits: ``dataset_flickr30k.json``, ``dataset_flickr8k.json``, ``dataset_coco.json``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from st_kdmcse.data.json_files import json_items
from st_kdmcse.data.readers.base import CaptionedImage
from st_kdmcse.data.readers.parsing import CaptionFileReader

_LAYOUT = '{"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a caption"}, ...]}, ...]}'


class Karpathy(CaptionFileReader):
    """Images and captions of one of Karpathy's JSON files, streamed.

    The caption is the ``raw`` text of a sentence, the image id the file name. The image file is
    ``images/filepath/filename`` where the JSON gives a ``filepath`` and there is such a file, else ``images/filename``.

    Args:
        captions: the file.
        images: folder of the image files.
        split: "train", "val", "test", or several: "train+restval". None takes all images.
        options: those of :class:`~st_kdmcse.data.readers.base.ImageCaptionReader`.

    Raises:
        FileNotFoundError: if the file or the folder is missing.
        ValueError: if the file has no such split, is not whole or has another layout, or an option is out of range.

    Example:
        ::

            reader = Karpathy("dataset_coco.json", images="coco", split="train+restval")
    """

    def __init__(
        self,
        captions: str | Path,
        images: str | Path | None = None,
        split: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(captions, images, **options)
        self._splits = None if split is None else set(split.split("+"))
        if self._splits is not None:
            self._check_splits(self._splits)

    def _records(self) -> Iterator[CaptionedImage]:
        number = 0
        for number, image in enumerate(json_items(self._captions, "images.item"), start=1):
            if not isinstance(image, dict) or not isinstance(image.get("filename"), str) or not image["filename"]:
                message = f"no filename; the layout is {_LAYOUT}"
                self.problems.add("wrong columns", f"{self._captions}, image number {number}", message)
                continue
            where = f"{self._captions}, image number {number} ({image['filename']})"
            if self._splits is not None and image.get("split") not in self._splits:
                continue
            captions = self._texts(image.get("sentences"), where)
            if captions:
                yield CaptionedImage(image["filename"], self._file(image), captions, where)
        if not number:
            raise ValueError(f"{self._captions} has no images; the layout is {_LAYOUT}")

    def _texts(self, sentences: Any, where: str) -> tuple[str, ...]:
        if not isinstance(sentences, list) or not sentences:
            self.problems.add("no caption", where, "the image has no sentences: add one, or leave the image out")
            return ()
        texts = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
        return tuple(
            text
            for number, text in enumerate(texts, start=1)
            if self._has_text(text, f"{where}, sentence number {number}")
        )

    def _file(self, image: dict[str, Any]) -> Path | None:
        if self._images is None:
            return None
        plain = self._images / str(image["filename"])
        nested = self._images / str(image.get("filepath") or "") / str(image["filename"])
        return plain if plain.is_file() and not nested.is_file() else nested

    def _check_splits(self, wanted: set[str]) -> None:
        found: set[str] = set()
        for split in json_items(self._captions, "images.item.split"):
            found.add(str(split))
            if wanted <= found:
                return
        raise ValueError(
            f"{self._captions} has no split {'+'.join(sorted(wanted - found))!r}; its splits: "
            f"{', '.join(sorted(found)) or 'none'}"
        )
