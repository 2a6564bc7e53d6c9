"""The folder of a saved index: written so that it is whole at any moment, and checked when it is read."""

from __future__ import annotations

import re
import reprlib
import shutil
import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from st_kdmcse import files
from st_kdmcse.files import LOCK, byte_progress, locked, manifest_checksum, sha256_file, sync_path, write_json
from st_kdmcse.provenance import versions
from st_kdmcse.search.faiss_backend import FaissBackend
from st_kdmcse.search.faiss_library import faiss_reason, load_faiss
from st_kdmcse.search.table import RowTable
from st_kdmcse.search.tuning import Tuning

FORMAT = "st_kdmcse.semantic_index"
VERSION = 1
MANIFEST = "manifest.json"
VECTORS, TABLE = "vectors.faiss", "rows.sqlite"

_FOLDER = "data-"
_DATA = re.compile(rf"{_FOLDER}[0-9a-f]+")
_UNFINISHED = re.compile(rf"\.{re.escape(MANIFEST)}\.[0-9a-f]+\.tmp")
"""Names of what :func:`~st_kdmcse.files.atomic_path` was writing at a kill."""

_REMEDY = "build the index again, or restore a copy"

_FILE = {"bytes": int, "sha256": str}
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
                faiss = load_faiss()
                faiss.write_index(backend.index, str(folder / VECTORS))
                backend.table.write(folder / TABLE)
                manifest = {
                    "format": FORMAT,
                    "version": VERSION,
                    **header,
                    "dim": backend.dim,
                    "rows": len(backend),
                    "vectors": int(backend.index.ntotal),
                    "factory": backend.factory,
                    "tuning": None if backend.tuning is None else asdict(backend.tuning),
                    "folder": folder.name,
                    "files": {
                        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
                        for name in (VECTORS, TABLE)
                    },
                    "versions": versions(),
                    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                }
                manifest["checksum"] = manifest_checksum(manifest)
                for name in (VECTORS, TABLE):
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


def read_index(path: Path, show_progress_bar: bool | None = None) -> tuple[FaissBackend, dict[str, Any]]:
    """Read a saved index; every byte of it is compared with the checksums of the manifest first.

    Args:
        path: the folder of the index.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Returns:
        Rows and vectors, and the manifest, with what :func:`write_index` was given as ``header``.

    Raises:
        FileNotFoundError: if there is no index, or a file of it is missing.
        ValueError: if a file is truncated or altered; names it.
    """
    while True:
        manifest = read_manifest(path)
        try:
            return _read(path, manifest, show_progress_bar), manifest
        except Exception:
            if is_index(path) and read_manifest(path)["checksum"] == manifest["checksum"]:
                raise  # else another process has saved it, and removed the old files at whatever moment of the reading


def _read(path: Path, manifest: Mapping[str, Any], show_progress_bar: bool | None) -> FaissBackend:
    folder = path / manifest["folder"]
    expected = {folder / name: known for name, known in manifest["files"].items()}
    for file, known in expected.items():
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {_REMEDY}")
        if file.stat().st_size != known["bytes"]:
            raise ValueError(
                f"{file} has {file.stat().st_size:,} bytes, not {known['bytes']:,}, so it is truncated or altered: "
                f"{_REMEDY}"
            )
    total = sum(known["bytes"] for known in expected.values())
    with byte_progress(total, f"Checking {path.name}", show_progress_bar) as progress:
        for file, known in expected.items():
            if sha256_file(file, progress.update) != known["sha256"]:
                raise ValueError(f"{file} was altered or is damaged: {_REMEDY}")
    index = _read_vectors(folder / VECTORS)
    table = RowTable.open(folder / TABLE)
    if (index.d, index.ntotal, len(table)) != (manifest["dim"], manifest["vectors"], manifest["rows"]):
        raise ValueError(f"the files of {folder} do not belong together: {_REMEDY}")
    tuning = manifest.get("tuning")
    measured = None if tuning is None else Tuning(**{name: tuning.get(name) for name in _OPTIONAL["tuning"]})
    return FaissBackend(index, table, manifest["factory"], measured)


def _read_vectors(file: Path) -> Any:
    try:
        return load_faiss().read_index(str(file))
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"FAISS cannot read {file} ({faiss_reason(error)}): {_REMEDY}") from error


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
