"""Exact search on a GPU: there it is faster than the approximate one of a CPU, and needs no tuning."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from st_kdmcse.search.base import Matrix
from st_kdmcse.search.factory import size_text
from st_kdmcse.search.faiss_library import gpus, load_faiss

logger = logging.getLogger(__name__)

MOST_RESULTS = 2048
"""What FAISS finds for a query at most on a GPU."""

_SHARE_OF_MEMORY = 0.8


class GpuSearch:
    """A copy of the whole vectors of an index on a GPU, compared with each query.

    Args:
        index: of FAISS, that keeps vectors as they are: Flat, HNSW over them, or another with RFlat.

    Raises:
        ValueError: if the index keeps no whole vectors, or they do not fit into the GPU's memory.
    """

    def __init__(self, index: Any) -> None:
        faiss = load_faiss()
        flat = _whole_vectors(index)
        if flat is None:
            raise ValueError("its vectors are compressed")
        needed, (free, _) = 4 * int(flat.d) * int(flat.ntotal), torch.cuda.mem_get_info()
        if needed > _SHARE_OF_MEMORY * free:
            raise ValueError(
                f"its vectors take {size_text(needed)}, and {size_text(free)} of the GPU's memory are free"
            )
        self._resources = faiss.StandardGpuResources()
        self._index = faiss.index_cpu_to_gpu(self._resources, torch.cuda.current_device(), flat)

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
            (n, k) scores, descending, and (n, k) positions.
        """
        scores, found = self._index.search(queries, k)
        return scores, found


def _whole_vectors(index: Any) -> Any:
    """The part of an index with the whole vectors, or None."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        index = faiss.downcast_index(index.refine_index)
    elif hasattr(index, "hnsw"):
        index = faiss.downcast_index(index.storage)
    return index if isinstance(index, faiss.IndexFlat) else None
