"""JSON from strangers: whole texts and streamed files, with a limit to how deep they are nested."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import ijson
import numpy as np

from st_kdmcse.data.lines import named_errors
from st_kdmcse.files import is_gzip

MAX_DEPTH = 100
"""Lists and objects inside of each other: the memory of ijson grows with the square of their number."""

_BOM = b"\xef\xbb\xbf"
_ALL_BUT_QUOTES_AND_BRACKETS = bytes(set(range(256)) - set(b'"[]{}'))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # as int8: 1 down, or 1 up


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is no valid JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from error


def json_items(path: Path, prefix: str, on_bytes: Callable[[int], object] = lambda _: None) -> Iterator[Any]:
    """The elements of a list in a JSON file, plain or gzip, one at a time.

    Args:
        path: the file.
        prefix: where they are, as ijson spells it, such as "images.item".
        on_bytes: called now and then with the number of bytes read since the last call.

    Raises:
        ValueError: if the file is not whole, valid JSON, or is nested too deeply.
    """
    with json_errors(path), open_json(path, on_bytes) as file:
        yield from ijson.items(file, prefix, use_float=True)


@contextmanager
def open_json(path: Path, on_bytes: Callable[[int], object] = lambda _: None) -> Iterator[ShallowFile]:
    """A JSON file, plain or gzip, for ijson; behind its byte order mark if it has one."""
    with named_errors(path), path.open("rb") as file:
        yield ShallowFile(file, cast("BinaryIO", gzip.GzipFile(fileobj=file)) if is_gzip(path) else file, on_bytes)


@contextmanager
def json_errors(path: Path, after: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn what ijson raises into a ValueError that names the file.

    Args:
        path: the file.
        after: tells where, for the message.
    """
    try:
        yield
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = error.args[0] if error.args else ""
        text = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(error)
        first = text.strip().partition("\n")[0]
        raise ValueError(
            f"{path} is not whole, valid JSON in UTF-8 ({first}{after()}): if it was cut off, download it again"
        ) from error


class ShallowFile:
    """A JSON file for ijson that refuses to be read on where it is nested too deeply.

    Args:
        file: the file on disk.
        content: the same, or what is compressed in it.
        on_bytes: called at each read with the number of bytes of ``file`` since the last call.
    """

    def __init__(self, file: BinaryIO, content: BinaryIO, on_bytes: Callable[[int], object]) -> None:
        self._file, self._content, self._on_bytes = file, content, on_bytes
        self._started = self._in_string = False
        self._escape = b""
        self._depth = self._reported = 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes.

        Raises:
            ValueError: if they are nested too deeply.
        """
        chunk = self._content.read(size)
        if not self._started and size:
            self._started = True
            if chunk.startswith(_BOM):
                chunk = chunk[len(_BOM) :] or self._content.read(size)
        self._check(chunk)
        self._on_bytes(self._file.tell() - self._reported)
        self._reported = self._file.tell()
        return chunk

    def _check(self, chunk: bytes) -> None:
        """Count brackets outside of strings, a thousand times as fast as a parser."""
        chunk = self._escape + chunk
        self._escape = b"\\" if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2 else b""
        chunk = chunk.removesuffix(self._escape).replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = chunk.translate(None, _ALL_BUT_QUOTES_AND_BRACKETS).split(b'"')
        brackets = b"".join(pieces[self._in_string :: 2])
        self._in_string ^= len(pieces) % 2 == 0
        if brackets:
            steps = np.frombuffer(brackets.translate(_STEPS), np.int8)
            depths = self._depth + np.cumsum(steps, dtype=np.int64)
            if depths.max() > MAX_DEPTH:
                raise ValueError(f"{self._file.name} is nested more than {MAX_DEPTH} deep: is it the right file?")
            self._depth = int(depths[-1])
