"""How hard an index must search to reach a recall against exact search."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from st_kdmcse.search.base import Matrix
from st_kdmcse.search.faiss_library import load_faiss

logger = logging.getLogger(__name__)

RECALL_AT = 10

_BLOCK = 16_384

_PLATEAU = 0.002


@dataclass(frozen=True)
class Tuning:
    """How an index was set, and what was measured.

    Attributes:
        parameter: ``nprobe`` or ``efSearch``; None for an index that has neither.
        value: of the parameter.
        recall: recall@10 against exact search, in [0, 1]; a found row counts if no other of the ten nearest is nearer.
        target: recall that was wanted.
        queries: rows that the index did not hold, which were searched for.
        queries_per_second: of the index alone, searching for all of them at once.
        rows: how many the index had; None where that was not noted.
    """

    parameter: str | None
    value: int | None
    recall: float
    target: float
    queries: int
    queries_per_second: float
    rows: int | None = None


def tune(index: Any, vectors: Vectors, queries: Matrix, rows: int, target: float) -> Tuning:
    """Set ``nprobe`` or ``efSearch`` to the least with which an index reaches a recall.

    Args:
        index: with the first ``rows`` vectors in it.
        vectors: (n, dim) of length 1.
        queries: (q, dim), not in the index.
        rows: how many of ``vectors`` count.
        target: recall@10 in (0, 1]; where it is out of reach, the best is taken and a warning says so.
    """
    k = min(RECALL_AT, rows)
    best, _ = exact_search(vectors, queries, k, rows)
    worst_accepted = best[:, -1:] - 1e-5
    parameter = effort_name(index)
    tried: list[Tuning] = []
    for value in _ladder(index):
        if value is not None:
            set_effort(index, value)
        began = time.perf_counter()
        _, found = index.search(queries, k)
        seconds = time.perf_counter() - began
        scores = np.einsum(
            "qd,qkd->qk", queries, as_float(vectors[np.maximum(found, 0).ravel()]).reshape(*found.shape, -1)
        )
        recall = float(((scores >= worst_accepted) & (found >= 0)).mean())
        speed = round(len(queries) / seconds, 1)
        tried.append(Tuning(parameter, value, round(recall, 4), target, len(queries), speed, rows + len(queries)))
        if recall >= target or (len(tried) > 4 and recall - tried[-4].recall < _PLATEAU):
            break
    highest = max(each.recall for each in tried)
    reached = next(each for each in tried if each.recall >= min(target, highest - _PLATEAU))
    if reached.value is not None:
        set_effort(index, reached.value)
    if reached.recall < target:
        logger.warning(
            f"the index reaches recall@{k} {reached.recall:.3f}, below {target:.3f}: its vectors are compressed, or it "
            "does not suit the data; allow more memory, or choose another factory"
        )
    else:
        setting = f" with {parameter} {reached.value}" if parameter else ""
        logger.info("measured recall@%d %.3f%s (wanted: %.3f)", k, reached.recall, setting, target)
    return reached


def exact_search(
    vectors: Vectors, queries: Matrix, k: int, rows: int | None = None
) -> tuple[Matrix, npt.NDArray[np.int64]]:
    """The k nearest of all vectors, read in blocks.

    Args:
        vectors: (n, dim) of length 1.
        queries: (q, dim) of length 1.
        k: at most n.
        rows: how many of ``vectors`` to compare; all.

    Returns:
        (q, k) scores, descending, and (q, k) rows.
    """
    faiss = load_faiss()
    scores = np.full((len(queries), 0), 0, dtype=np.float32)
    found = np.full((len(queries), 0), 0, dtype=np.int64)
    for block in row_blocks(0, vectors.shape[0] if rows is None else rows):
        candidates = as_float(vectors[block])
        new_scores, new = faiss.knn(queries, candidates, min(k, len(candidates)), faiss.METRIC_INNER_PRODUCT)
        scores, found = np.hstack([scores, new_scores]), np.hstack([found, new + block.start])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, found = np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)
    return scores, found


def effort_name(index: Any) -> str | None:
    """The parameter that trades time for recall: ``nprobe``, ``efSearch``, or None."""
    inner = searching(index)
    return "nprobe" if hasattr(inner, "nprobe") else "efSearch" if hasattr(inner, "hnsw") else None


def get_effort(index: Any) -> int:
    """Its value; 1 for an index without one."""
    inner, name = searching(index), effort_name(index)
    return 1 if name is None else int(inner.nprobe if name == "nprobe" else inner.hnsw.efSearch)


def set_effort(index: Any, value: int) -> None:
    """Set it."""
    inner = searching(index)
    if effort_name(index) == "nprobe":
        inner.nprobe = value
    else:
        inner.hnsw.efSearch = value


def searching(index: Any) -> Any:
    """The index inside of transforms and refinement that does the search."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return searching(index.index)
    if isinstance(index, faiss.IndexRefine):
        return searching(index.base_index)
    return index


def check_recall_target(target: float) -> None:
    """Raise a ValueError unless it is in (0, 1]."""
    if not 0 < target <= 1:
        raise ValueError(f"recall_target is {target}, expected more than 0 and at most 1")


def _ladder(index: Any) -> list[int | None]:
    """Values to try, each about 1.4 times the one before."""
    name = effort_name(index)
    if name is None:
        return [None]
    lowest, highest = (1, searching(index).nlist) if name == "nprobe" else (RECALL_AT, 4096)
    steps = math.ceil(2 * math.log2(max(highest / lowest, 1)))
    return sorted({min(highest, round(lowest * 2 ** (step / 2))) for step in range(steps + 1)})


class Vectors(Protocol):
    """Unit vectors that may be more than memory holds: an array, or something that reads like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, dim)."""

    def __getitem__(self, rows: Any, /) -> npt.NDArray[Any]:
        """Some rows, by slice or by an array of row numbers."""


def row_blocks(start: int, stop: int) -> Iterator[slice]:
    """Slices that cut rows into blocks."""
    for first in range(start, stop, _BLOCK):
        yield slice(first, min(first + _BLOCK, stop))


def as_float(vectors: npt.NDArray[Any]) -> Matrix:
    """Contiguous float32, as FAISS takes it."""
    return np.ascontiguousarray(vectors, dtype=np.float32)
