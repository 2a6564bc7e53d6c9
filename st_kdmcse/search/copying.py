"""Copies of an index elsewhere: from a folder into Milvus, back, or into an index of another type."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from st_kdmcse.files import locked, progress_bar
from st_kdmcse.provenance import claim
from st_kdmcse.search.address import MilvusAddress, open_backend, parse_address
from st_kdmcse.search.base import NewRows, SearchBackend
from st_kdmcse.search.faiss_backend import chosen_factory
from st_kdmcse.search.storage import (
    check_free,
    fill_index,
    is_index,
    read_index,
    read_manifest,
    remove_work,
    writing,
)
from st_kdmcse.search.table import RowTable
from st_kdmcse.search.tuning import check_recall_target

if TYPE_CHECKING:
    from st_kdmcse.search.milvus_backend import MilvusBackend

logger = logging.getLogger(__name__)

COPYING = "copying"
"""What the identity of a collection has as long as not all is there: where its rows come from."""

_COPY = "copy.json"
_OF_THE_MODEL = ("model", "probe", "precision", "images")
_FULL = "what was copied is kept there: free space and repeat"
_FLOAT = 4


def copy_index(
    source: str | Path,
    target: str | Path,
    *,
    factory: str | None = None,
    recall_target: float = 0.95,
    memory_limit: int | None = None,
    show_progress_bar: bool | None = None,
) -> int:
    """Copy an index: ids, texts, metadata, embeddings as they are, and what it says of its model, which is not needed.

    Interrupted or killed, the same call goes on where it was: a folder is written in one step at the end, from
    ``NAME.copy`` beside it; a collection that is not whole yet is refused by
    :meth:`~st_kdmcse.search.semantic_index.SemanticIndex.open`.

    Args:
        source: address of the index, see :func:`~st_kdmcse.search.address.parse_address`.
        target: address of a new one.
        factory: FAISS's name of the index type of a folder; None chooses one by size.
        recall_target: recall@10 that an approximate index of a folder is tuned to reach.
        memory_limit: bytes for the vectors of a folder.
        show_progress_bar: None shows bars in a terminal, once something has taken two seconds.

    Returns:
        The number of rows, which is the same in both.

    Raises:
        FileNotFoundError: if there is no index at the source.
        ValueError: if the source is empty, compressed, does not name its model, or changes meanwhile, or if there is
            something else at the target.
        OSError: if a server fails or a disk is full; the same call goes on.
    """
    check_recall_target(recall_target)
    origin, place = parse_address(source), parse_address(target)
    if isinstance(place, MilvusAddress) and (factory or memory_limit):
        raise ValueError("`factory` and `memory_limit` are for an index in a folder, not in Milvus")
    if isinstance(place, Path) and not (_unfinished(place) / _COPY).is_file():
        check_free(place)
    rows, header, mark = _opened(origin)
    if not len(rows):
        raise ValueError(f"the index {source} is empty: there is nothing to copy")
    if isinstance(place, MilvusAddress):
        _into_milvus(rows, header, mark, str(target), show_progress_bar)
    else:
        factory = chosen_factory(len(rows), rows.dim, factory, memory_limit)
        _into_folder(rows, header, mark, place, factory, recall_target, memory_limit, show_progress_bar)
    return mark["rows"]  # type: ignore[no-any-return]


def _opened(origin: Path | MilvusAddress) -> tuple[SearchBackend, dict[str, Any], dict[str, Any]]:
    """The rows, what the index says of its model, and what tells it from others and from another state of itself."""
    if isinstance(origin, MilvusAddress):
        backend = cast("MilvusBackend", open_backend(str(origin)))
        header, state = backend.identity, {}
        if header is None:
            raise ValueError(f"{origin} does not say which model it was made with: open it with its model once")
        check_whole(header, str(origin))
        rows: SearchBackend = backend
    else:
        rows, header = read_index(origin)
        state = {"checksum": header["checksum"]}
    place = str(origin.resolve()) if isinstance(origin, Path) else str(origin)
    kept = {name: header[name] for name in _OF_THE_MODEL if name in header}
    return rows, kept, {"from": place, "rows": len(rows), **state}


def check_whole(header: Mapping[str, Any], address: str) -> None:
    """Refuse a collection of which only a part is there.

    Raises:
        ValueError: says how to complete it.
    """
    if COPYING in header:
        origin = header[COPYING]["from"]
        raise ValueError(
            f"{address} is an unfinished copy of {origin}: st-kdmcse index copy {origin} {address} goes on"
        )


def _into_milvus(
    rows: SearchBackend, header: Mapping[str, Any], mark: dict[str, Any], address: str, show: bool | None
) -> None:
    copied = cast("MilvusBackend", open_backend(address, rows.dim, create=True))
    known = copied.identity
    begun = known is not None
    if not begun and not len(copied):
        copied.identity = {**header, COPYING: mark}
    elif (known or {}).get(COPYING) != mark:
        raise ValueError(
            f"{address} holds another index, or a copy of another state of this one: name a new collection, or drop it"
        )
    for part in _counted(rows.all_rows(), mark["rows"], 0, show):
        there = copied.known(part.ids) if begun else set()
        missing = [row for row, key in enumerate(part.ids) if key not in there]
        copied.add(part.taken(missing))
    _check_count(len(copied), mark)
    copied.identity = header


def _into_folder(
    rows: SearchBackend,
    header: Mapping[str, Any],
    mark: dict[str, Any],
    path: Path,
    factory: str,
    recall_target: float,
    memory_limit: int | None,
    show: bool | None,
) -> None:
    unfinished = _unfinished(path)
    table_file, vectors_file = unfinished / "rows.sqlite", unfinished / "vectors.f32"
    with locked(unfinished):
        with writing(unfinished, _FULL):
            claim(unfinished / _COPY, mark, "delete that folder to begin again")
        if _is_copy(path, header, mark):  # killed after the last step
            remove_work(unfinished, _COPY)
            return
        check_free(path)
        with writing(unfinished, _FULL):
            table = RowTable.create(table_file)
            vectors_file.touch()
        try:
            done = len(table)
            with vectors_file.open("r+b") as file:
                file.seek(done * rows.dim * _FLOAT)  # what a killed run has written beyond is written again
                for part in _counted(rows.all_rows(table.last_id()), mark["rows"], done, show):
                    with writing(unfinished, _FULL), table.transaction():
                        table.insert(range(done, done + len(part)), part.ids, part.texts, part.metadata)
                        file.write(np.ascontiguousarray(part.embeddings, dtype=np.float32).tobytes())
                        file.flush()
                        os.fsync(file.fileno())
                    done += len(part)
        finally:
            table.close()
        _check_count(done, mark)
        vectors = np.memmap(vectors_file, np.float32, "r", shape=(done, rows.dim))
        table = RowTable.open(table_file)  # changes go into a copy of it: the next run would find it as it is
        fill_index(path, vectors, table, header, factory, recall_target, memory_limit, show, remedy=_FULL)
        table.close()
        remove_work(unfinished, _COPY)


def _unfinished(path: Path) -> Path:
    """Where a copy is made; it may be there already."""
    path = path if path.name.strip(".") else path.resolve()
    return path.with_name(f"{path.name}.copy")


def _is_copy(path: Path, header: Mapping[str, Any], mark: Mapping[str, Any]) -> bool:
    if not is_index(path):
        return False
    found = read_manifest(path)
    return bool(found["rows"] == mark["rows"] and all(found.get(name) == value for name, value in header.items()))


def _check_count(count: int, mark: Mapping[str, Any]) -> None:
    if count != mark["rows"]:
        raise ValueError(
            f"{mark['from']} had {mark['rows']:,} rows at first, and {count:,} were copied: leave it as it is, and "
            "begin again with another target"
        )


def _counted(parts: Iterator[NewRows], total: int, done: int, show: bool | None) -> Iterator[NewRows]:
    """The parts, with a progress bar."""
    if done:
        logger.info("going on after %s of %s rows", f"{done:,}", f"{total:,}")
    with progress_bar(total, "Copying", "row", show, initial=done) as progress:
        for part in parts:
            yield part
            progress.update(len(part))
