"""Search on a GPU: exact where an index keeps whole vectors, else in the same lists as on the CPU."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from st_kdmcse.search.base import Matrix
from st_kdmcse.search.factory import size_text
from st_kdmcse.search.faiss_library import gpus, load_faiss
from st_kdmcse.search.tuning import searching

logger = logging.getLogger(__name__)

MOST_RESULTS = 2048
"""What FAISS finds for a query at most on a GPU, and how many lists it looks at."""

_SHARE_OF_MEMORY = 0.8


class GpuSearch:
    """A copy of an index on a GPU.

    Whole vectors are compared with each query: on a GPU that is fast, and exact. An index that has none to compare, or
    more than the GPU's memory holds, is searched in its lists, as many of them as on the CPU, with the same recall.
    Lists of vectors go there in half precision where they do not fit whole.

    Args:
        index: of FAISS: Flat, HNSW over it, IVF over Flat, SQ or PQ, or anything with RFlat.

    Raises:
        ValueError: if FAISS has no such index for GPUs, or it does not fit into the GPU's memory.
        RuntimeError: of FAISS, if it cannot copy it.
    """

    def __init__(self, index: Any) -> None:
        faiss = load_faiss()
        flat = _whole_vectors(index)
        free, _ = torch.cuda.mem_get_info()
        options = faiss.GpuClonerOptions()
        if flat is not None and _fits(4 * int(flat.d) * int(flat.ntotal), free):
            copied = flat
        else:
            copied = _lists(index)
            rows, width = int(copied.ntotal), int(copied.code_size)
            if not _fits(rows * (width + 8), free):
                halves = isinstance(copied, faiss.IndexIVFFlat) and _fits(rows * (width // 2 + 8), free)
                if not halves:
                    raise ValueError(
                        f"it takes {size_text(rows * (width + 8))}, and {size_text(free)} of the GPU's memory are free"
                    )
                options.useFloat16 = True
            if isinstance(copied, faiss.IndexIVFPQ):
                options.useFloat16 = True  # else tables of many codes do not fit into the memory that threads share
            options.allowCpuCoarseQuantizer = True  # HNSW over the centres
        self._resources = faiss.StandardGpuResources()
        self._index = faiss.index_cpu_to_gpu(self._resources, torch.cuda.current_device(), copied, options)
        if copied is not flat:
            self._index.nprobe = int(copied.nprobe)  # what it was tuned to
        logger.info(
            "the index is searched on the GPU, %s",
            "exactly" if copied is flat else f"in its lists{', in half precision' if options.useFloat16 else ''}",
        )

    @classmethod
    def of(cls, index: Any) -> GpuSearch | None:
        """The copy, if there is a GPU and it can be made; else why not is logged."""
        if not gpus() or not index.ntotal:
            return None
        try:
            return cls(index)
        except (ValueError, RuntimeError) as error:
            logger.info("the index is searched on the CPU: %s", str(error).strip().splitlines()[-1])
            return None

    def search(self, queries: Matrix, k: int) -> tuple[Matrix, npt.NDArray[np.int64]]:
        """The k nearest vectors.

        Args:
            queries: (n, dim).
            k: at most 2,048.

        Returns:
            (n, k) scores, descending, and (n, k) positions; -1 where the lists have fewer.
        """
        scores, found = self._index.search(queries, k)
        return scores, found


def _fits(needed: int, free: int) -> bool:
    return needed <= _SHARE_OF_MEMORY * free


def _whole_vectors(index: Any) -> Any:
    """The part of an index with the whole vectors, or None."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        index = faiss.downcast_index(index.refine_index)
    elif hasattr(index, "hnsw"):
        index = faiss.downcast_index(index.storage)
    return index if isinstance(index, faiss.IndexFlat) else None


def _lists(index: Any) -> Any:
    """The lists of an index that a GPU can search; raises a ValueError where it cannot."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine | faiss.IndexPreTransform):
        raise ValueError("FAISS has lists with refinement or transforms for CPUs alone, and its vectors do not fit")
    inner = searching(index)
    if type(inner) not in (faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer):
        raise ValueError(f"FAISS has no {type(inner).__name__} for GPUs, and there are no whole vectors that fit")
    if inner.nprobe > MOST_RESULTS:
        raise ValueError(f"it looks at {inner.nprobe:,} lists, on a GPU {MOST_RESULTS:,} is the most")
    return inner
