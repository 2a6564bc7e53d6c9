"""An index that is larger than memory: its inverted lists and whole vectors stay on disk, memory-mapped.

It is an index of type ``IVF...,PQ...,RFlat``: a query goes through the short codes of a few lists, and is compared with
the whole vectors of the best rows alone. FAISS maps lists of its own kind, but not those of 4-bit codes, which are
searched fastest. Their blocks of 32 codes are what is written here, and :class:`faiss.OnDiskInvertedLists`, which asks
for nothing but sizes and offsets, maps them.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from st_kdmcse.search.base import Matrix
from st_kdmcse.search.faiss_library import load_faiss

VECTORS = "vectors.faiss"
LISTS, OFFSETS, EXACT = "lists.bin", "lists.npy", "exact.faiss"
"""Codes and row numbers, list by list; where each list lies; the whole vectors, an ``IndexFlat``."""

_ONE_LIST = np.dtype([("size", "<u8"), ("capacity", "<u8"), ("offset", "<u8")])  # faiss::OnDiskOneList
_ALIGNED = 64
_NTOTAL_AT = 8  # in the file of an IndexFlat: four letters, d (int32), ntotal (int64), ...


def can_stay_on_disk(factory: str) -> bool:
    """Whether an index of this type can be left on disk."""
    return factory.startswith("IVF") and factory.endswith(",RFlat")


def coarse_factory(factory: str) -> str:
    """The part of the index type that finds the rows which are then compared whole."""
    return factory.removesuffix(",RFlat")


@contextmanager
def flat_file(path: Path, rows: int, dim: int) -> Iterator[IO[bytes]]:
    """Write the file of an ``IndexFlat`` row by row: the block writes (rows, dim) float32 into it.

    Args:
        path: the file.
        rows: how many there will be.
        dim: width of the vectors.
    """
    faiss = load_faiss()
    header = bytearray(faiss.serialize_index(faiss.IndexFlatIP(dim)).tobytes())
    header[_NTOTAL_AT : _NTOTAL_AT + 8] = rows.to_bytes(8, "little")
    header[-8:] = (rows * dim).to_bytes(8, "little")  # how many float32 follow
    with path.open("wb") as file:
        file.write(header)
        yield file
        if file.tell() != len(header) + 4 * rows * dim:
            raise ValueError(f"{path} got {file.tell() - len(header)} bytes, expected {rows} rows of dim {dim}")


def mapped_rows(path: Path, rows: int, dim: int) -> Matrix:
    """The vectors of such a file, memory-mapped: (rows, dim)."""
    offset = path.stat().st_size - 4 * rows * dim
    array = np.memmap(path, dtype="<f4", mode="r", offset=offset, shape=(rows, dim))
    if hasattr(mmap, "MADV_RANDOM"):
        array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return array


def refined(coarse: Any, exact: Path) -> Any:
    """The index of lists in memory, and whole vectors that are read from a file where they are needed."""
    faiss = load_faiss()
    flat = faiss.read_index(str(exact), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
    count(flat, coarse.ntotal)  # FAISS asks for equal numbers
    index = faiss.IndexRefine(coarse, flat)
    index.k_factor = 8.0
    index.referenced_objects = [coarse, flat]
    return index


def count(index: Any, rows: int) -> None:
    """Set how many vectors an index over a file has."""
    index.ntotal = rows


def write_on_disk(index: Any, exact: Path, folder: Path) -> list[str]:
    """Write an index that :func:`refined` made into a folder; it cannot be used any more.

    Args:
        index: whose lists are in memory.
        exact: file of the whole vectors, which moves.
        folder: where to.

    Returns:
        The names of the files.
    """
    faiss = load_faiss()
    coarse = faiss.downcast_index(index.base_index)
    lists = faiss.downcast_InvertedLists(coarse.invlists)
    block = int(getattr(lists, "n_per_block", 1))
    size = int(lists.block_size) // block if hasattr(lists, "block_size") else int(lists.code_size)
    offsets = np.zeros(lists.nlist, dtype=_ONE_LIST)
    with (folder / LISTS).open("wb") as file:
        for number in range(lists.nlist):
            rows = int(lists.list_size(number))
            capacity = -(-rows // block) * block
            file.write(b"\0" * (-file.tell() % _ALIGNED))
            offsets[number] = (rows, capacity, file.tell())
            if rows:
                ids = np.full(capacity, -1, dtype=np.int64)
                ids[:rows] = faiss.rev_swig_ptr(lists.get_ids(number), rows)
                file.write(faiss.rev_swig_ptr(lists.get_codes(number), capacity * size).tobytes())
                file.write(ids.tobytes())
        file.write(b"\0" * _ALIGNED)  # whatever reads a little further
    np.save(folder / OFFSETS, offsets)
    empty = faiss.ArrayInvertedLists(int(lists.nlist), size)
    coarse.replace_invlists(empty, True)
    empty.this.disown()
    faiss.write_index(coarse, str(folder / VECTORS))
    try:
        exact.replace(folder / EXACT)
    except OSError:  # another file system
        shutil.copyfile(exact, folder / EXACT)
    return [VECTORS, LISTS, OFFSETS, EXACT]


def read_on_disk(folder: Path, k_factor: float) -> Any:
    """The index in a folder, memory-mapped; it is read-only.

    Args:
        folder: that :func:`write_on_disk` wrote into.
        k_factor: candidates that are compared whole, in multiples of the rows wanted.

    Raises:
        ValueError: if the files do not fit together.
    """
    faiss = load_faiss()
    coarse = faiss.read_index(str(folder / VECTORS))
    offsets: npt.NDArray[Any] = np.load(folder / OFFSETS, allow_pickle=False)
    file = folder / LISTS
    if offsets.dtype != _ONE_LIST or len(offsets) != coarse.nlist or int(offsets["size"].sum()) != coarse.ntotal:
        raise ValueError(f"{folder / OFFSETS} does not belong to {folder / VECTORS}")
    size = int(coarse.code_size)
    ends = offsets["offset"] + offsets["capacity"] * np.uint64(size + 8)
    if (offsets["size"] > offsets["capacity"]).any() or int(ends.max()) > file.stat().st_size:
        raise ValueError(f"{folder / OFFSETS} does not belong to {file}")
    lists = faiss.OnDiskInvertedLists(int(coarse.nlist), size, str(file))
    faiss.memcpy(lists.lists.data(), faiss.swig_ptr(offsets.view(np.uint8)), offsets.nbytes)
    lists.read_only, lists.totsize = True, file.stat().st_size
    lists.do_mmap()
    coarse.replace_invlists(lists, True)
    lists.this.disown()
    index = refined(coarse, folder / EXACT)
    index.k_factor = k_factor
    return index
