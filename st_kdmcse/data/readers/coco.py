"""MS-COCO captions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from st_kdmcse.data.json_files import json_items
from st_kdmcse.data.readers.base import CaptionedImage
from st_kdmcse.data.readers.parsing import CaptionFileReader

_LAYOUT = (
    '{"images": [{"id": 1, "file_name": "a.jpg"}, ...], '
    '"annotations": [{"id": 7, "image_id": 1, "caption": "a caption"}, ...]}'
)


class Coco(CaptionFileReader):
    """Images and captions of one of the ``captions_*.json`` files of MS-COCO.

    The image id is the file name; images come in the order of the file's list of images, captions in that of its
    annotations.

    Args:
        captions: the file; or the folder of COCO, with ``annotations`` and ``train2017`` in it, where ``split`` says
            which.
        images: folder of the image files, or the folder that holds ``train2017``, ``val2017`` and so on. None
            looks in the folder of COCO, if ``captions`` is that.
        split: such as "train2017", "val2017" or "train2014"; only with a folder as ``captions``.
        options: those of :class:`~st_kdmcse.data.readers.base.ImageCaptionReader`.

    Raises:
        FileNotFoundError: if the file, the split or the folder is missing.
        ValueError: if ``split`` is given with a file or missing with a folder, the file is not whole or has another
            layout, or an option is out of range.

    Example:
        ::

            reader = Coco("coco/annotations/captions_train2017.json", images="coco/train2017")
            reader = Coco("coco", split="train2017")  # the same
    """

    def __init__(
        self,
        captions: str | Path,
        images: str | Path | None = None,
        split: str | None = None,
        **options: Any,
    ) -> None:
        file = _find_captions(Path(captions), split)
        if images is None and split is not None and (Path(captions) / split).is_dir():
            images = captions
        super().__init__(file, images, **options)
        name = _split_of(file)
        if self._images is not None and name and (self._images / name).is_dir():
            self._images /= name

    def _records(self) -> Iterator[CaptionedImage]:
        # The images may come before or after their annotations: one pass for each.
        names: dict[int | str, str] = {}
        for number, image in enumerate(json_items(self._captions, "images.item"), start=1):
            where = f"{self._captions}, image number {number}"
            if not _has(image, id=int | str, file_name=str) or not image["file_name"]:
                self.problems.add(
                    "wrong columns", where, f"no id (a number or a text) or no file_name; the layout is {_LAYOUT}"
                )
            elif image["id"] in names:
                self.problems.add("duplicate id", where, f"image id {image['id']} came before: give each image once")
            else:
                names[image["id"]] = image["file_name"]
        if not names:
            raise ValueError(f"{self._captions} has no images; the layout is {_LAYOUT}")
        captions = self._captions_by_image(names)
        for image_id, name in names.items():
            where = f"{self._captions}, image id {image_id} ({name})"
            if image_id in captions:
                yield CaptionedImage(name, self._image_file(name), tuple(captions[image_id]), where)
            else:
                message = "the image has no annotation with a caption: add one, or leave the image out"
                self.problems.add("no caption", where, message)

    def _captions_by_image(self, names: dict[int | str, str]) -> dict[int | str, list[str]]:
        captions: dict[int | str, list[str]] = {}
        seen: set[int | str] = set()
        for number, annotation in enumerate(json_items(self._captions, "annotations.item"), start=1):
            where = f"{self._captions}, annotation number {number}"
            if not _has(annotation, id=int | str, image_id=int | str):
                self.problems.add(
                    "wrong columns", where, f"no id or no image_id (a number or a text); the layout is {_LAYOUT}"
                )
                continue
            where += f" (id {annotation['id']})"
            if annotation["id"] in seen:
                self.problems.add("duplicate id", where, "this annotation id came before: give each annotation once")
            elif annotation["image_id"] not in names:
                message = f"there is no image with the id {annotation['image_id']}: add it, or leave the annotation out"
                self.problems.add("unknown image", where, message)
            elif self._has_text(annotation.get("caption"), where):
                captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
            seen.add(annotation["id"])
        return captions


def coco_splits(folder: Path) -> list[str]:
    """The splits whose captions are in a COCO folder, such as "train2017"."""
    files = [*folder.glob("captions_*.json"), *folder.glob("annotations/captions_*.json")]
    return sorted(_split_of(path) for path in files)


def _split_of(captions: Path) -> str:
    """What ``captions_train2017.json`` has between underscore and point; nothing for a file of another name."""
    match = re.fullmatch(r"captions_(.+)\.json", captions.name)
    return match[1] if match else ""


def _find_captions(captions: Path, split: str | None) -> Path:
    if not captions.is_dir():
        if split is not None:
            raise ValueError(f"{captions} is one split already: give its folder, or no split={split!r}")
        return captions
    found = ", ".join(coco_splits(captions)) or "none"
    if split is None:
        raise ValueError(f"{captions} is a folder: choose a split; those with captions there: {found}")
    for path in (captions / "annotations" / f"captions_{split}.json", captions / f"captions_{split}.json"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{captions} has no annotations/captions_{split}.json; the splits with captions there: {found}"
    )


def _has(entry: Any, **types: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in types.items())
