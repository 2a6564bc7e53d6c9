"""The folder of a saved index: written so that it is whole at any moment, and checked when it is read."""

from __future__ import annotations

import hashlib
import logging
import re
import reprlib
import shutil
import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from st_kdmcse import files
from st_kdmcse.files import LOCK, byte_progress, locked, manifest_checksum, sha256_file, sync_path, write_json
from st_kdmcse.processes import free_memory
from st_kdmcse.provenance import versions
from st_kdmcse.search.base import Matrix
from st_kdmcse.search.factory import build_faiss, size_text
from st_kdmcse.search.faiss_backend import FaissBackend
from st_kdmcse.search.faiss_library import faiss_reason, load_faiss
from st_kdmcse.search.on_disk import VECTORS, read_on_disk, write_on_disk
from st_kdmcse.search.table import RowTable
from st_kdmcse.search.tuning import Tuning, Vectors

logger = logging.getLogger(__name__)

FORMAT = "st_kdmcse.semantic_index"
VERSION = 1
MANIFEST = "manifest.json"
TABLE = "rows.sqlite"

_FOLDER = "data-"
_DATA = re.compile(rf"{_FOLDER}[0-9a-f]+")
_UNFINISHED = re.compile(rf"\.{re.escape(MANIFEST)}\.[0-9a-f]+\.tmp")
"""Names of what :func:`~st_kdmcse.files.atomic_path` was writing at a kill."""

_REMEDY = "build the index again, or restore a copy"

_FILE = {"bytes": int, "sha256": str}
_HEADER = ("model", "probe", "precision", "images")
_FULL_UP_TO = 10**9
_PIECES, _PIECE_BYTES = 64, 1 << 16
_SHARE_OF_MEMORY = 0.5

Verify = Literal["size", "full"]
_SHAPE: dict[str, Any] = {
    "model": {"name": str | None, "parameters_sha256": str, "dimension": int},
    "probe": {"text": str, "embedding": [float]},
    "dim": int,
    "rows": int,
    "vectors": int,
    "factory": str,
    "folder": str,
    "files": {VECTORS: _FILE, TABLE: _FILE},
}
"""What a manifest must hold, with types."""
_NOTED_LATER: dict[str, Any] = {
    "rows": int | None,
    "low": int | float | None,
    "high": int | float | None,
    "source": str | None,
    "near_copies": int | None,
}
"""Of the tuning, what the first indexes do not tell."""
_OPTIONAL: dict[str, Any] = {
    "tuning": {
        "parameter": str | None,
        "value": int | None,
        "recall": int | float,
        "target": int | float,
        "queries": int,
        "queries_per_second": int | float,
        **_NOTED_LATER,
    },
    "images": {"folder": str | None},
    "on_disk": {"k_factor": int | float},
}


@contextmanager
def writing(place: Path, remedy: str) -> Iterator[None]:
    """Say what could not be written, whichever library wrote it.

    Raises:
        OSError: in the place of the errors of SQLite, FAISS and the system.
    """
    try:
        yield
    except (sqlite3.Error, RuntimeError, OSError) as error:
        raise OSError(f"{place} could not be written ({faiss_reason(error)}): {remedy}") from error


def is_index(path: Path) -> bool:
    """Whether a folder holds a saved index."""
    return (path / MANIFEST).is_file()


def check_free(path: Path) -> None:
    """Make sure that a new index can be written to a folder.

    Raises:
        ValueError: if there is an index, a file, or a folder of something else.
    """
    if is_index(path):
        raise ValueError(f"there is an index at {path} already: add to it, delete that folder, or choose another")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: an index is a folder")
    if path.is_dir() and any(not _ours(each) for each in path.iterdir()):
        raise ValueError(f"{path} is a folder with something else in it: choose another, or an empty one")


def write_index(
    path: Path,
    backend: FaissBackend,
    header: Mapping[str, Any],
    expected: str | None = None,
) -> str:
    """Write an index into a folder, in the place of the one that is there.

    The files go into a new folder inside of ``path``; the manifest that names it is then replaced in one step, and the
    files of the old one are removed. Killed at any moment, the old index or the new one is there, whole.

    Args:
        path: the folder of the index.
        backend: rows and vectors.
        header: of the model, see :func:`read_index`.
        expected: checksum of the manifest that is there, or None.

    Returns:
        The checksum of the manifest.

    Raises:
        ValueError: if another process is writing, or has changed the index since then.
        OSError: if it cannot be written, such as to a full disk; what was written is removed again.
    """
    with locked(path):
        if expected is None:
            check_free(path)
        elif not is_index(path) or read_manifest(path)["checksum"] != expected:
            raise ValueError(
                f"the index {path} was changed by another process since it was opened here: open it again, repeat the "
                "changes, and save it then"
            )
        folder = path / f"{_FOLDER}{uuid.uuid4().hex}"
        _remove_others(path, read_manifest(path)["folder"] if expected else "")
        try:
            with writing(folder, "free space there, and save again"):
                folder.mkdir()
                names = [VECTORS, TABLE]
                if backend.exact is not None:
                    on_disk = {"k_factor": float(backend.index.k_factor)}
                    names += write_on_disk(backend.index, backend.exact, folder)[1:]
                else:
                    on_disk = None
                    load_faiss().write_index(backend.index, str(folder / VECTORS))
                backend.table.write(folder / TABLE)
                manifest = {
                    "format": FORMAT,
                    "version": VERSION,
                    **header,
                    "dim": backend.dim,
                    "rows": len(backend),
                    "vectors": int(backend.index.ntotal),
                    "on_disk": on_disk,
                    "factory": backend.factory,
                    "tuning": None if backend.tuning is None else asdict(backend.tuning),
                    "folder": folder.name,
                    "files": {name: _noted(folder / name) for name in names},
                    "versions": versions(),
                    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                }
                manifest["checksum"] = manifest_checksum(manifest)
                for name in names:
                    sync_path(folder / name)
                sync_path(folder)
                write_json(path / MANIFEST, manifest)
        except BaseException:
            if not is_index(path) or read_manifest(path)["folder"] != folder.name:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        _remove_others(path, folder.name)
        return str(manifest["checksum"])


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a saved index, checked.

    Raises:
        FileNotFoundError: if there is no index.
        ValueError: if the manifest is damaged or altered, or of another version.
    """
    if not is_index(path):
        raise FileNotFoundError(
            f"there is no index at {path}: make one with st-kdmcse index build, or SemanticIndex.build"
        )
    manifest = files.read_manifest(path / MANIFEST, FORMAT, VERSION, _REMEDY)
    if isinstance(manifest.get("tuning"), dict):
        manifest["tuning"] = dict.fromkeys(_NOTED_LATER) | manifest["tuning"]
    optional = {name: shape for name, shape in _OPTIONAL.items() if manifest.get(name) is not None}
    if manifest.get("encoder") is not None:
        raise ValueError(
            f"the index {path} was made by an earlier version, which kept an encoder of its own in it: export a model "
            "of sentences and images with st-kdmcse export, and index the images with it"
        )
    found = _misfit(manifest, _SHAPE | optional, "")
    if found is None and not _DATA.fullmatch(manifest["folder"]):
        found = f"folder is {reprlib.repr(manifest['folder'])}"
    if found is None and len(manifest["probe"]["embedding"]) != manifest["model"]["dimension"]:
        found = f"probe.embedding has {len(manifest['probe']['embedding'])} numbers"
    if found:
        raise ValueError(f"{path / MANIFEST} was not written by st_kdmcse: {found}; {_REMEDY}")
    return manifest


def fill_index(
    path: Path,
    vectors: Vectors,
    table: RowTable,
    header: Mapping[str, Any],
    factory: str,
    recall_target: float = 0.95,
    memory_limit: int | None = None,
    show_progress_bar: bool | None = None,
    tune_queries: Matrix | None = None,
    exact: Path | None = None,
    remedy: str = "free space there, and build the index again",
) -> None:
    """Index vectors that are read as they are needed, and save the index.

    Args:
        path: folder for the index.
        vectors: (n, dim) of length 1.
        table: the n rows, in their order; changed.
        header: of the model, see :func:`~st_kdmcse.search.model_check.model_header`.
        factory: FAISS's name of the index type.
        recall_target: recall@10 to reach.
        memory_limit: bytes; a third of them is for the sample that an index on disk is trained on.
        show_progress_bar: None shows one in a terminal, after two seconds.
        tune_queries: (q, dim) of length 1; None takes rows.
        exact: file for the whole vectors of an index that stays on disk; it becomes a part of the index.
        remedy: what an error of a full disk says.
    """
    sample = memory_limit // 3 if exact is not None and memory_limit is not None else memory_limit
    with nullcontext() if exact is None else writing(exact, remedy):
        built = build_faiss(vectors, factory, recall_target, sample, show_progress_bar, tune_queries, exact)
    with writing(path, remedy), table.transaction():
        table.move(built.swaps)
    write_index(path, FaissBackend(built.index, table, factory, built.tuning, exact=exact), header)


def remove_work(folder: Path, settings: str) -> None:
    """Delete the folder of work that is done; killed meanwhile, the folder still tells what it is.

    Args:
        folder: of files alone.
        settings: name of the file that tells, which goes last.
    """
    for file in folder.iterdir():
        if file.name not in (settings, LOCK):
            file.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def read_index(
    path: Path,
    show_progress_bar: bool | None = None,
    mmap: bool | None = None,
    verify: Verify | None = None,
) -> tuple[FaissBackend, dict[str, Any]]:
    """Read a saved index, after its files are compared with the manifest.

    Args:
        path: the folder of the index.
        show_progress_bar: None shows one in a terminal, after two seconds.
        mmap: leave vectors on disk, and read what a search needs; the index cannot be changed then. None does so where
            they take more than half of the memory that is free, and says so.
        verify: "full" compares every byte with its checksum, "size" the sizes and a sample of each file; None is "full"
            up to 1 GB.

    Returns:
        Rows and vectors, and the manifest, with what :func:`write_index` was given as ``header``.

    Raises:
        FileNotFoundError: if there is no index, or a file of it is missing.
        ValueError: if a file is truncated or altered; names it. Also if ``mmap`` is False and the index was built to
            stay on disk.
    """
    if verify not in (None, "size", "full"):
        raise ValueError(f'`verify` is {verify!r}, expected "size" or "full"')
    while True:
        manifest = read_manifest(path)
        try:
            return _read(path, manifest, show_progress_bar, mmap, verify), manifest
        except Exception:
            if is_index(path) and read_manifest(path)["checksum"] == manifest["checksum"]:
                raise  # else another process has saved it, and removed the old files at whatever moment of the reading


def verified_in_full(manifest: Mapping[str, Any], verify: Verify | None = None) -> bool:
    """Whether :func:`read_index` compares every byte."""
    return verify == "full" or (verify is None and _bytes(manifest) <= _FULL_UP_TO)


def compact_index(path: Path) -> tuple[int, bool]:
    """Fill a saved index again without the vectors of rows that are gone; its model is not needed.

    Returns:
        How many vectors were of no row, and whether they could be left out.

    Raises:
        FileNotFoundError: if there is no index.
        ValueError: if a file is damaged, or the index stays on disk.
    """
    backend, manifest = read_index(path, mmap=False)
    gone = int(backend.index.ntotal) - len(backend)
    if not gone:
        return 0, True
    done = backend.compact()
    if done:
        header = {name: manifest[name] for name in _HEADER if name in manifest}
        write_index(path, backend, header, manifest["checksum"])
    return gone, done


def _read(
    path: Path, manifest: Mapping[str, Any], show_progress_bar: bool | None, mmap: bool | None, verify: Verify | None
) -> FaissBackend:
    folder = path / manifest["folder"]
    on_disk = manifest.get("on_disk")
    if on_disk and mmap is False:
        raise ValueError(
            f"the index {path} was built to stay on disk: it cannot be read into memory, or changed; build it again, "
            "without `mmap`"
        )
    expected = {folder / name: known for name, known in manifest["files"].items()}
    for file, known in expected.items():
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {_REMEDY}")
        if file.stat().st_size != known["bytes"]:
            raise ValueError(
                f"{file} has {file.stat().st_size:,} bytes, not {known['bytes']:,}, so it is truncated or altered: "
                f"{_REMEDY}"
            )
    full = verified_in_full(manifest, verify)
    if full:
        with byte_progress(_bytes(manifest), f"Checking {path.name}", show_progress_bar) as progress:
            for file, known in expected.items():
                if sha256_file(file, progress.update) != known["sha256"]:
                    raise ValueError(f"{file} was altered or is damaged: {_REMEDY}")
    else:
        for file, known in expected.items():
            if known.get("sample", wanted := _sample(file)) != wanted:
                raise ValueError(f"{file} was altered or is damaged: {_REMEDY}")
    size, free = manifest["files"][VECTORS]["bytes"], free_memory()
    if mmap is None and not on_disk and free is not None and size > _SHARE_OF_MEMORY * free:
        logger.warning(
            f"the vectors of {path} take {size_text(size)}, and {size_text(free)} of memory are free: they stay on "
            "disk, memory-mapped, and the index cannot be changed (`mmap=False` reads them)"
        )
        mmap = True
    try:
        if on_disk:
            index = read_on_disk(folder, on_disk["k_factor"])
        else:
            faiss = load_faiss()
            flags = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY if mmap else 0
            index = faiss.read_index(str(folder / VECTORS), flags)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"FAISS cannot read {folder / VECTORS} ({faiss_reason(error)}): {_REMEDY}") from error
    table = RowTable.open(folder / TABLE, None if full else manifest["rows"])
    if (index.d, index.ntotal, len(table)) != (manifest["dim"], manifest["vectors"], manifest["rows"]):
        raise ValueError(f"the files of {folder} do not belong together: {_REMEDY}")
    tuning = manifest.get("tuning")
    measured = None if tuning is None else Tuning(**{name: tuning.get(name) for name in _OPTIONAL["tuning"]})
    return FaissBackend(index, table, manifest["factory"], measured, mapped=bool(mmap or on_disk))


def _noted(file: Path) -> dict[str, Any]:
    """What the manifest keeps of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file), "sample": _sample(file)}


def _sample(file: Path) -> str:
    """SHA-256 of pieces of a file, evenly spread, the first and the last among them."""
    digest, size = hashlib.sha256(), file.stat().st_size
    with file.open("rb") as opened:
        for number in range(_PIECES):
            opened.seek(max(0, size - _PIECE_BYTES) * number // (_PIECES - 1))
            digest.update(opened.read(_PIECE_BYTES))
    return digest.hexdigest()


def _bytes(manifest: Mapping[str, Any]) -> int:
    return sum(known["bytes"] for known in manifest["files"].values())


def _misfit(content: Any, shape: Any, name: str) -> str | None:
    """The first part of a manifest that is not of its shape, in words."""
    if isinstance(shape, dict) and isinstance(content, dict):
        for key, each in shape.items():
            part = f"{name}.{key}" if name else key
            if found := f"{part} is missing" if key not in content else _misfit(content[key], each, part):
                return found
        return None
    if isinstance(shape, list):
        fits = isinstance(content, list) and all(isinstance(each, shape[0]) for each in content)
    else:
        fits = not isinstance(shape, dict) and isinstance(content, shape) and not isinstance(content, bool)
    return None if fits else f"{name} is {reprlib.repr(content)}"


def _ours(path: Path) -> bool:
    return (
        path.name in (LOCK, MANIFEST)
        or _UNFINISHED.fullmatch(path.name) is not None
        or (path.name.startswith(_FOLDER) and path.is_dir())
    )


def _remove_others(path: Path, kept: str) -> None:
    """Delete what earlier states, or attempts that were killed, left behind."""
    for each in path.iterdir():
        if each.is_dir() and each.name.startswith(_FOLDER) and each.name != kept:
            shutil.rmtree(each, ignore_errors=True)
        elif each.is_file() and _UNFINISHED.fullmatch(each.name):  # of a manifest: only who holds the lock writes one
            each.unlink(missing_ok=True)
