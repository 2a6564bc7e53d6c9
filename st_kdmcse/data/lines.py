"""Lines of text files, plain or compressed, and the errors of damaged files."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from st_kdmcse.files import foreign_content, is_gzip

_LINE_BYTES = 1 << 24
_BLOCK_BYTES = 1 << 16
_LINES_BETWEEN_REPORTS = 1 << 16


def read_lines(path: Path, on_bytes: Callable[[int], object]) -> Iterator[str]:
    """The lines of a UTF-8 file, plain or gzip, with their ends: a line feed, a carriage return, or both.

    Args:
        path: the file.
        on_bytes: called now and then with the number of bytes read since the last call.

    Raises:
        ValueError: for a damaged file or one that is not UTF-8 text; names the file and the line.
    """
    with named_errors(path), path.open("rb") as file:
        stream = io.BufferedReader(cast("io.RawIOBase", gzip.GzipFile(fileobj=file))) if is_gzip(path) else file
        refuse_foreign(path, stream.peek(1))
        reported = 0
        for number, line in enumerate(split_lines(path, stream), start=1):
            yield _decode(line, path, number)
            if number % _LINES_BETWEEN_REPORTS == 0:
                on_bytes(file.tell() - reported)
                reported = file.tell()
        on_bytes(file.tell() - reported)


def split_lines(path: Path, stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a stream with their ends: line feed, carriage return, or both.

    Args:
        path: the file, for messages.
        stream: its content.

    Raises:
        ValueError: for a line of more than 16 MiB; names it.
    """
    number, rest = 1, b""
    while block := stream.read(_BLOCK_BYTES):
        *lines, rest = (rest + block).splitlines(keepends=True)  # of bytes: no other line ends
        if rest.endswith(b"\n"):
            lines, rest = [*lines, rest], b""
        yield from lines
        number += len(lines)
        if len(rest) >= _LINE_BYTES:
            raise ValueError(
                f"{path}, line {number}: more than {_LINE_BYTES >> 20} MiB without a line end; write one sentence a "
                "line"
            )
    if rest:
        yield rest


def refuse_foreign(path: Path, start: bytes) -> None:
    """Refuse a file that begins like something else than text.

    Args:
        path: the file, for the message.
        start: its first bytes, without compression.

    Raises:
        ValueError: saying what it is.
    """
    found = foreign_content(start)
    if found is not None:
        raise ValueError(f"{path} is {found}, no text: give a text file or a table")


def _decode(line: bytes, path: Path, number: int) -> str:
    if b"\0" in line:
        raise ValueError(
            f"{path}, line {number}: a NUL byte, so this is a binary file or not UTF-8; convert it, for example with "
            "`iconv -f utf-16 -t utf-8`"
        )
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line); convert the file, "
            "for example with `iconv -f latin-1 -t utf-8`"
        ) from error


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn the errors of gzip and Parquet about a damaged file into a ValueError that names it."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is cut off, damaged or no gzip file ({error}): download or compress it again"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or cannot be read ({error}): download or write it again") from error
