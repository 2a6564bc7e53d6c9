"""Flickr30k and Flickr8k in the files in which their captions are published."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from st_kdmcse.data.readers.base import CaptionedImage, ImageCaptionReader
from st_kdmcse.data.readers.columns import captions_in
from st_kdmcse.data.readers.parsing import CaptionFileReader, image_folder, read_csv, read_lines

_TOKEN_HEAD = re.compile(r"(.+)#(\d{1,18})", re.DOTALL)
_NUMBER = re.compile(r"\s*\d{1,18}\s*")
_PHRASE = re.compile(r"\[/EN#\d+(?:/[^\s\]]+)*\s+([^\]]*)\]")


class _FlickrReader(CaptionFileReader):
    """A file with one caption a row, each with the name of its image.

    Images come in the order in which they first appear, the captions of each in the order of the file, whether or not
    they stand together.
    """

    def __init__(
        self,
        captions: str | Path,
        images: str | Path | None = None,
        split: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(captions, images, **options)
        self._split = None if split is None else _find_split(split, self._captions)

    @abstractmethod
    def _rows(self) -> Iterator[tuple[str, str, int | None, str]]:
        """Place, image, number of the caption (None if there are none in this format) and caption of the good rows."""

    def _records(self) -> Iterator[CaptionedImage]:
        captions: dict[str, list[str]] = {}
        first_places: dict[str, str] = {}
        numbers: set[tuple[str, int]] = set()
        for where, image, number, cell in self._rows():
            if number is not None:
                if (image, number) in numbers:
                    message = f"caption {number} of the image {image!r} came before: give each caption its own number"
                    self.problems.add("duplicate id", where, message)
                    continue
                numbers.add((image, number))
            for caption in captions_in(cell):
                if self._has_text(caption, where):
                    captions.setdefault(image, []).append(caption)
                    first_places.setdefault(image, where)
        chosen = None if self._split is None else self._read_split(self._split, captions)
        for image, texts in captions.items():
            if chosen is None or image in chosen:
                yield CaptionedImage(image, self._image_file(image), tuple(texts), first_places[image])

    def _line(self, number: int) -> str:
        return f"{self._captions}, line {number}"

    def _read_split(self, split: Path, captions: dict[str, list[str]]) -> set[str]:
        """The images that a split file lists."""
        chosen: set[str] = set()
        for line, text in read_lines(split, self.problems):
            entry, where = text.strip(), f"{split}, line {line}"
            image = entry if entry in captions else f"{entry}.jpg"
            if not entry:
                continue
            if image not in captions:
                message = f"the image {entry!r} has no caption in {self._captions}: add one, or leave the image out"
                self.problems.add("no caption", where, message)
            elif image in chosen:
                self.problems.add("duplicate id", where, f"the image {entry!r} came before: list each image once")
            chosen.add(image)
        return chosen


class FlickrTokens(_FlickrReader):
    """Captions as ``IMAGE.jpg#k<TAB>caption``: Flickr30k's ``results_20130124.token``, ``Flickr8k.token.txt``.

    Args:
        captions: the file.
        images: folder of the image files.
        split: a file of image ids, one a line, with or without ``.jpg``; or its name without ``.txt``, such as "train",
            if it is beside the captions. None takes all images.
        options: those of :class:`~st_kdmcse.data.readers.base.ImageCaptionReader`.

    Raises:
        FileNotFoundError: if the file, the folder or the split is missing.
        ValueError: for an option out of range.

    Example:
        ::

            reader = FlickrTokens("results_20130124.token", images="flickr30k-images", split="train")
            for image_id, image, captions in reader:
                ...
    """

    def _rows(self) -> Iterator[tuple[str, str, int | None, str]]:
        for line, text in read_lines(self._captions, self.problems):
            columns = text.split("\t")
            head = _TOKEN_HEAD.fullmatch(columns[0])
            if len(columns) == 2 and head:
                yield self._line(line), head[1], int(head[2]), columns[1]
            else:
                found = f"{len(columns)} columns" if len(columns) != 2 else f"{columns[0][:60]!r}"
                message = f"{found}, expected IMAGE.jpg#k<TAB>caption: correct the row, or leave it out"
                self.problems.add("wrong columns", self._line(line), message)


class FlickrCSV(_FlickrReader):
    """Captions as ``IMAGE.jpg| k| caption`` below a header: the ``results.csv`` of Flickr30k.

    The caption is all that follows the second separator, a bar and one blank. There are no quotes in this format.

    The header is ``image_name| comment_number| comment``. Arguments and errors are those of :class:`FlickrTokens`.
    """

    def _rows(self) -> Iterator[tuple[str, str, int | None, str]]:
        lines = read_lines(self._captions, self.problems)
        header = next(lines, None)
        if header is None or not is_pipe_header(header[1]):
            raise _no_header(header, "image_name| comment_number| comment", self._captions)
        for line, text in lines:
            columns = text.split("|", 2)
            if len(columns) == 3 and columns[0] and _NUMBER.fullmatch(columns[1]):
                yield self._line(line), columns[0], int(columns[1]), columns[2].removeprefix(" ")
            else:
                message = (
                    f"{text[:60]!r} is not IMAGE.jpg| NUMBER| CAPTION: correct its separators, or leave the row out"
                )
                self.problems.add("wrong columns", self._line(line), message)


class CaptionsCSV(_FlickrReader):
    """Captions as a CSV file with the columns ``image,caption``: the ``captions.txt`` of Flickr8k.

    Arguments and errors are those of :class:`FlickrTokens`.
    """

    def _rows(self) -> Iterator[tuple[str, str, int | None, str]]:
        rows = read_csv(self._captions, self.problems)
        header = next(rows, None)
        if header is None or header[1] != ["image", "caption"]:
            raise _no_header(header, "image,caption", self._captions)
        for line, columns in rows:
            if len(columns) == 2 and columns[0]:
                yield self._line(line), columns[0], None, columns[1]
            else:
                found = f"{len(columns)} columns" if columns[0] else "no image name"
                message = f"{found}, expected image,caption: put a caption with commas in quotes, or leave the row out"
                self.problems.add("wrong columns", self._line(line), message)


class FlickrEntities(_FlickrReader):
    """The captions of Flickr30k Entities: a folder with a file of captions for each image, ``Sentences/IMAGE.txt``.

    A caption is the text without its annotations: of ``[/EN#283585/people Two young guys] look`` it is "Two young guys
    look". The image id is ``IMAGE.jpg``.

    Args:
        captions: the folder, or the folder ``Sentences`` in it.
        images: folder of the image files.
        split: as for :class:`FlickrTokens`: "train" is the file ``train.txt`` beside ``Sentences``.
        options: those of :class:`~st_kdmcse.data.readers.base.ImageCaptionReader`.

    Raises:
        FileNotFoundError: if there is no folder ``Sentences``, no folder of images, or no such split.
        ValueError: for an option out of range.
    """

    def __init__(
        self,
        captions: str | Path,
        images: str | Path | None = None,
        split: str | Path | None = None,
        **options: Any,
    ) -> None:
        ImageCaptionReader.__init__(self, **options)
        found = entities_folder(Path(captions))
        if found is None:
            raise FileNotFoundError(f"{captions} has no folder Sentences with .txt files: give that of the captions")
        self._captions, self._images, self.name = found, image_folder(images), str(captions)
        self._split = None if split is None else _find_split(split, self._captions)

    def _rows(self) -> Iterator[tuple[str, str, int | None, str]]:
        for path in sorted(self._captions.glob("*.txt")):
            if not path.stat().st_size:
                self.problems.add("no caption", str(path), "the file is empty: add a caption, or remove it")
                continue
            for line, text in read_lines(path, self.problems):
                yield f"{path}, line {line}", f"{path.stem}.jpg", None, _PHRASE.sub(r"\1", text)


def entities_folder(folder: Path) -> Path | None:
    """The folder ``Sentences`` of a folder of Flickr30k Entities; None if there is none."""
    inside = folder if folder.name == "Sentences" else folder / "Sentences"
    return inside if next(inside.glob("*.txt"), None) is not None else None


def is_token_row(line: str) -> bool:
    """Whether a line is a row of :class:`FlickrTokens`."""
    head, tab, _ = line.partition("\t")
    return bool(tab and _TOKEN_HEAD.fullmatch(head))


def is_pipe_header(line: str) -> bool:
    """Whether a line is the header of a :class:`FlickrCSV`."""
    return [column.strip() for column in line.split("|")] == ["image_name", "comment_number", "comment"]


def _no_header(found: tuple[int, str | list[str]] | None, expected: str, path: Path) -> ValueError:
    where, what = (f"{path}, line {found[0]}", f"{str(found[1])[:100]!r}") if found else (str(path), "no row")
    return ValueError(f"{where}: {what}, expected the header {expected!r}: add it, or choose another format")


def _find_split(split: str | Path, captions: Path) -> Path:
    beside = captions.parent / f"{split}.txt"
    for path in (beside, Path(split)):
        if path.is_file():
            return path
    found = sorted(path.stem for path in captions.parent.glob("*.txt") if path != captions)
    raise FileNotFoundError(
        f"there is no split {str(split)!r}: neither {split} nor {beside} is a file; beside the captions there are: "
        f"{', '.join(found) or 'none'}"
    )
