"""What readers of files share: finding the files, lines and rows of text, the lists of JSON files."""

from __future__ import annotations

import csv
import gzip
import re
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from st_kdmcse.data.lines import named_errors, refuse_foreign, split_lines
from st_kdmcse.data.readers.base import ImageCaptionReader, Problems
from st_kdmcse.data.tables import csv_problem, csv_reader
from st_kdmcse.files import is_gzip

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

_BOM = b"\xef\xbb\xbf"
_MOST_LINES_OF_A_ROW = 64


class CaptionFileReader(ImageCaptionReader):
    """A reader of one file that holds all captions, beside a folder of image files.

    Args:
        captions: the file.
        images: folder of the image files; None for captions alone.
        options: those of :class:`~st_kdmcse.data.readers.base.ImageCaptionReader`.

    Raises:
        FileNotFoundError: if the file or the folder is missing.
        ValueError: for an option out of range.
    """

    def __init__(self, captions: str | Path, images: str | Path | None, **options: Any) -> None:
        super().__init__(**options)
        self._captions = existing_file(captions)
        self._images = image_folder(images)
        self.name = str(captions)

    @cached_property
    def num_images(self) -> int:
        """Number of images with captions, before bad files are left out; the first use reads the captions."""
        return self._count()


def existing_file(path: str | Path, wanted: str = "the file with the captions") -> Path:
    """The path, if there is a file.

    Args:
        path: the file.
        wanted: what to give, for the error.

    Raises:
        FileNotFoundError: if there is no such file, or it is a folder.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: give {wanted}")
    return path


def image_folder(images: str | Path | None) -> Path | None:
    """The folder of the images, if one is given.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(f"there is no folder {images}: give the folder with the image files")
    return None if images is None else Path(images)


def is_image_name(name: str) -> bool:
    """Whether a name looks like that of an image: by its suffix, or as an address on the web."""
    return bool(re.match(r"https?://\S+$", name)) or Path(name).suffix.lower() in IMAGE_SUFFIXES


def read_lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line, without its line end; empty lines are left out.

    A line that is not UTF-8 or holds a NUL is a problem "encoding". A byte order mark is left out.

    Raises:
        ValueError: if the file is empty.
    """
    for number, line in _raw_lines(path):
        text = line.removesuffix("\n").removesuffix("\r")
        if text and _is_clean([text], f"{path}, line {number}", problems):
            yield number, text


def read_csv(path: Path, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line (from 1) and fields of each row of a CSV file with quotes where they are needed.

    A quoted field may run over several lines. Where a quote is never closed, only the line that opens it is a problem
    "wrong columns": it does not swallow the rows below. Rows that are not UTF-8 are a problem "encoding".

    Raises:
        ValueError: if the file is empty.
    """
    lines = _raw_lines(path)
    waiting: deque[tuple[int, str]] = deque()
    while first := waiting.popleft() if waiting else next(lines, None):
        number, text = first
        where = f"{path}, line {number}"
        more: list[tuple[int, str]] = []
        while isinstance(fields := _fields(text), csv.Error) and len(more) < _MOST_LINES_OF_A_ROW:
            following = waiting.popleft() if waiting else next(lines, None)
            if following is None:
                break
            more.append(following)
            start = _fields(following[1])
            if isinstance(start, list) and len(start) > 1 and is_image_name(start[0]):
                break
            text += following[1]
        if isinstance(fields, csv.Error):
            waiting.extendleft(reversed(more))
            problems.add("wrong columns", where, csv_problem(fields))
        elif fields and _is_clean(fields, where, problems):
            yield number, fields


def _raw_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their ends. What is not UTF-8, and NUL, become halves of surrogate pairs, which UTF-8 cannot hold."""
    number = 0
    with named_errors(path), path.open("rb") as file:
        refuse_foreign(path, b"" if is_gzip(path) else file.peek(1))
        content = cast("BinaryIO", gzip.GzipFile(fileobj=file)) if is_gzip(path) else file
        for number, line in enumerate(split_lines(path, content), start=1):
            text = line.removeprefix(_BOM) if number == 1 else line
            yield number, text.decode("utf-8", "surrogateescape").replace("\0", "\udc00")
    if not number:
        raise ValueError(f"{path} is empty: give the file with the captions")


def _is_clean(texts: list[str], where: str, problems: Problems) -> bool:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        encoding = "utf-16" if "\udc00" in error.object or "\udcff\udcfe" in error.object else "latin-1"
        what = "a NUL byte" if error.object[error.start] == "\udc00" else f"not UTF-8 at character {error.start + 1}"
        problems.add(
            "encoding",
            where,
            f"{what}; convert the file, for example with `iconv -f {encoding} -t utf-8`, or leave it out",
        )
        return False
    return True


def _fields(text: str) -> list[str] | csv.Error:
    """The fields of one row; the error if a quote is open or misplaced."""
    try:
        return next(csv_reader([text]), [])
    except csv.Error as error:
        return error
