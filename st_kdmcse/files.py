"""Files: checksums, progress bars, writes that are whole or absent, locks, manifests, and what kind a file is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ByteProgress: TypeAlias = "tqdm[Any]"

LOCK = "lock"
"""The file of a folder that :func:`locked` locks."""

_CHUNK_BYTES = 1 << 20
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (.zip, .npz, .pt)",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    _GZIP: "compressed with gzip",
    _PARQUET: "a Parquet table",
    b"ARROW1": "an Arrow table",
    b"SQLite format 3": "an SQLite database",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"7z\xbc\xaf": "a 7z archive",
    b"%PDF-": "a PDF",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"version https://git-lfs.github.com": "a pointer of Git LFS (`git lfs pull` fetches the file)",
}
_TAR, _TAR_AT = b"ustar", 257


def sha256_file(path: str | Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, read in chunks of 1 MiB.

    Args:
        path: the file.
        on_bytes: called with the number of bytes of each chunk after it is read.

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
        description: what is being done.
        show: whether to show the bar; None shows it in a terminal after two seconds.
    """
    return progress_bar(total, description, "B", show, unit_scale=True)


def progress_bar(total: int | None, description: str, unit: str, show: bool | None = None, **options: Any) -> tqdm[Any]:
    """Progress bar by the rule of this package: shown in a terminal, after two seconds of work.

    Args:
        total: how much there is; None if that is not known.
        description: what is being done.
        unit: what is counted.
        show: whether to show the bar; None follows the rule.
        options: further options of tqdm, such as an iterable.
    """
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        delay=2 if show is None else 0,
        disable=None if show is None else not show,
        **options,
    )


def is_gzip(path: str | Path) -> bool:
    """Whether a file is compressed with gzip: its first bytes tell, not its name. False if there is no such file."""
    return _starts_with(path, _GZIP)


def is_parquet(path: str | Path) -> bool:
    """Whether a file is Apache Parquet: its first bytes tell, not its name. False if there is no such file."""
    return _starts_with(path, _PARQUET)


def foreign_content(start: bytes) -> str | None:
    """What the first bytes of a file show it to be, such as "a pickle"; None for text and for anything unknown.

    Args:
        start: at least 512 bytes, where the file has as many.
    """
    if start[_TAR_AT:].startswith(_TAR):
        return "a tar archive"
    return next((what for magic, what in _FOREIGN.items() if start.lower().startswith(magic.lower())), None)


def _starts_with(path: str | Path, magic: bytes) -> bool:
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


@contextmanager
def atomic_path(path: str | Path, keep_existing: bool = False) -> Iterator[Path]:
    """Make a file or folder that appears under its name when it is whole, and never in part.

    The block writes to the path that it gets, a hidden one beside ``path``. When it ends, that file or folder gets its
    name; a file is on the disk before. If the block raises, what it wrote is deleted and ``path`` is as before. The
    parent folder is made.

    Args:
        path: the file or folder.
        keep_existing: keep a file or folder that another process has put there, and delete the new one.

    Example:
        ::

            with atomic_path("scores.npz") as temporary:
                numpy.savez(temporary.open("wb"), scores=scores)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if not temporary.is_dir():  # a folder of gigabytes, such as a model, would wait for the disk
            sync_path(temporary)
        _rename(temporary, path, keep_existing)
        sync_path(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):
                temporary.unlink()


@contextmanager
def atomic_file(path: str | Path, mode: str = "w", keep_existing: bool = False, **options: Any) -> Iterator[IO[Any]]:
    """Write a file that appears when it is whole, see :func:`atomic_path`.

    Args:
        path: the file.
        mode: "w" for text in UTF-8, or "wb".
        keep_existing: keep a file that another process has put there.
        options: further ones of ``open``, such as ``newline``.
    """
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    with atomic_path(path, keep_existing) as temporary, temporary.open(mode, **options) as file:
        yield file


def write_folder(path: Path, write: Callable[[Path], object], keep_existing: bool = False) -> None:
    """Make a folder that appears when it is whole, see :func:`atomic_path`.

    Args:
        path: the folder.
        write: fills a new one.
        keep_existing: keep a folder that another process has put there.
    """
    with atomic_path(path, keep_existing) as temporary:
        temporary.mkdir()
        write(temporary)


def _rename(temporary: Path, path: Path, keep_existing: bool) -> None:
    if temporary.is_dir():
        if not keep_existing:
            shutil.rmtree(path, ignore_errors=True)
        try:
            temporary.replace(path)
        except OSError:
            if not (keep_existing and path.is_dir()):
                raise
    elif not keep_existing:
        temporary.replace(path)
    else:
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            temporary.replace(path)


def sync_path(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before going on."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | Path, content: Mapping[str, Any], keep_existing: bool = False) -> None:
    """Write a JSON object whole or not at all.

    Args:
        path: the file; its folder is made.
        content: the object, without NaN.
        keep_existing: keep a file that another process has put there.

    Raises:
        ValueError: if a number is not finite.
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_file(path, keep_existing=keep_existing) as file:
        file.write(text)


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    """The object of a JSON file.

    Args:
        path: the file.
        remedy: what to do about a damaged file, for the error.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): {remedy}")
    return content


@contextmanager
def locked(folder: str | Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Keep other processes of this machine from working in a folder at the same time.

    Args:
        folder: the folder; it is made. The file :data:`LOCK` in it stays.
        shared: let others in that ask for a shared lock too.
        wait: wait for the others.

    Raises:
        ValueError: if others are at work and ``wait`` is False.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        if fcntl is not None:
            kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
            try:
                fcntl.flock(file, kind)
            except BlockingIOError:
                raise ValueError(f"another process is writing to {folder}: wait for it, or stop it") from None
        yield


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, without the checksum itself."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(path: str | Path, format: str, version: int, remedy: str) -> dict[str, Any]:  # noqa: A002
    """The manifest of a folder of this package, after its checks.

    Args:
        path: the file.
        format: the value of "format" that it must have.
        version: the value of "version" that this package reads.
        remedy: what to do about a damaged folder, for the error.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of another format or version, or its content does not fit its checksum.
    """
    manifest = read_json(path, remedy)
    if manifest.get("format") != format:
        raise ValueError(f"{path} has the format {manifest.get('format')!r}, expected {format!r}")
    if manifest.get("version") != version:
        raise ValueError(
            f"{path} has version {manifest.get('version')!r}, this st_kdmcse reads version {version}: upgrade "
            f"st-kdmcse, or {remedy}"
        )
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise ValueError(f"{path} was edited or damaged: its checksum does not fit its content; {remedy}")
    return manifest


def check_output_file(path: Path | None) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Args:
        path: the file; None for none. Its folder is made.

    Raises:
        ValueError: if it is a folder, or its folder cannot be made or written to.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder of {path} cannot be made: {error}") from error
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} cannot be written to: name a file in another folder")
