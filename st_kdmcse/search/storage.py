"""The folder of a saved index: written so that it is whole at any moment, and checked when it is read."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from st_kdmcse import files
from st_kdmcse.files import LOCK, byte_progress, locked, manifest_checksum, sha256_file, sync_path, write_json
from st_kdmcse.provenance import versions
from st_kdmcse.search.faiss_backend import FaissBackend
from st_kdmcse.search.faiss_library import load_faiss
from st_kdmcse.search.table import RowTable
from st_kdmcse.search.tuning import Tuning

FORMAT = "st_kdmcse.semantic_index"
VERSION = 1
MANIFEST = "manifest.json"
VECTORS, TABLE = "vectors.faiss", "rows.sqlite"
ENCODER = "encoder"
"""Folder of the model of an index that has its own, see :func:`~st_kdmcse.search.images.index_images`."""

_FOLDER = "data-"
_UNFINISHED = re.compile(rf"\.({re.escape(MANIFEST)}|{ENCODER})\.[0-9a-f]+\.tmp")
"""Names of what :func:`~st_kdmcse.files.atomic_path` was writing at a kill."""

_REMEDY = "build the index again, or restore a copy"


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
    return files.read_manifest(path / MANIFEST, FORMAT, VERSION, _REMEDY)


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
        except FileNotFoundError:
            if is_index(path) and read_manifest(path)["checksum"] == manifest["checksum"]:
                raise  # unless another process has saved it in the meantime


def _read(path: Path, manifest: Mapping[str, Any], show_progress_bar: bool | None) -> FaissBackend:
    folder = path / manifest["folder"]
    if folder.parent != path or set(manifest["files"]) != {VECTORS, TABLE}:
        raise ValueError(f"{path / MANIFEST} names files that are not those of an index")
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
    index = load_faiss().read_index(str(folder / VECTORS))
    table = RowTable.open(folder / TABLE)
    if (index.d, index.ntotal, len(table)) != (manifest["dim"], manifest["vectors"], manifest["rows"]):
        raise ValueError(f"the files of {folder} do not belong together: {_REMEDY}")
    tuning = manifest["tuning"]
    return FaissBackend(index, table, manifest["factory"], None if tuning is None else Tuning(**tuning))


def _ours(path: Path) -> bool:
    return (
        path.name in (ENCODER, LOCK, MANIFEST)
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
