"""Small helpers for reading large files: checksums and progress."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

ByteProgress: TypeAlias = "tqdm[Any]"

_CHUNK_BYTES = 1 << 20


def sha256_file(path: str | Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, read in chunks of 1 MiB.

    Args:
        path: the file.
        on_bytes: called with the number of bytes of each chunk once it is read.

    Returns:
        The digest as 64 hexadecimal digits.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()


def byte_progress(total: int, description: str, show: bool | None = None) -> ByteProgress:
    """Progress bar over bytes.

    Args:
        total: bytes in all.
        description: what is going on.
        show: whether to show the bar; None shows it in a terminal, once the work has taken two seconds.
    """
    return tqdm(
        total=total,
        desc=description,
        unit="B",
        unit_scale=True,
        delay=2 if show is None else 0,
        disable=None if show is None else not show,
    )
