"""Small helpers for files: checksums, progress, and folders that are whole or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
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
    return progress_bar(total, description, "B", show, unit_scale=True)


def progress_bar(total: int | None, description: str, unit: str, show: bool | None = None, **options: Any) -> tqdm[Any]:
    """Progress bar by the rule of this package: shown in a terminal, once the work has taken two seconds.

    Args:
        total: how much there is; None if that is not known.
        description: what is going on.
        unit: what is counted.
        show: whether to show the bar; None follows the rule.
        options: further ones of tqdm, such as an iterable to go through.
    """
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        delay=2 if show is None else 0,
        disable=None if show is None else not show,
        **options,
    )


def write_folder(path: Path, write: Callable[[Path], object], keep_existing: bool = False) -> None:
    """Make a folder, which is there under its name when it is whole.

    Args:
        path: the folder.
        write: fills a new one.
        keep_existing: where there is one already, as when another process was faster, keep that and not the new one.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        if not keep_existing:
            shutil.rmtree(path, ignore_errors=True)
        try:
            temporary.replace(path)
        except OSError:
            if not (keep_existing and path.is_dir()):
                raise
        sync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_path(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before going on."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
