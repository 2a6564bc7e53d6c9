"""How hard an index must search to reach a recall against exact search."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from st_kdmcse.files import progress_bar
from st_kdmcse.search.base import Matrix
from st_kdmcse.search.faiss_library import load_faiss

logger = logging.getLogger(__name__)

RECALL_AT = 10
MOST_QUERIES = 2_000
"""That are taken from the rows."""

_BLOCK = 16_384

_PLATEAU = 0.002
_ROUNDING = 1e-5
_QUANTILE = 2.576
"""Of the normal distribution: half a percent lies above."""
_NEIGHBOURS, _REFERENCE = 512, 30
_SMALLEST_GROUP, _JUMP, _GAP, _SHARE = 10, 1.35, 1.05, 0.35
_SAMPLE, _FEWEST_QUERIES = 500, 100
_MOST_CANDIDATES = 64
_QUERIES_AT_A_TIME = 256


@dataclass(frozen=True)
class Tuning:
    """How an index was set, and what was measured.

    Attributes:
        parameter: ``nprobe`` or ``efSearch``; None for an index that has neither.
        value: of the parameter.
        recall: recall@10 against exact search, in [0, 1]; a found row counts if no other of the ten nearest is nearer.
        target: recall that was wanted.
        queries: how many were searched for, none of them in the index.
        queries_per_second: of the index alone, searching for all of them at once.
        rows: how many the index had; None where that was not noted.
        low: lower end of the 99 % confidence interval of the recall on queries like these; None where not noted.
        high: its upper end.
        source: what the queries were, "rows" that were left out of the index until then, or "queries" of the user's.
        near_copies: rows that were left out with them, because they nearly equal one.
    """

    parameter: str | None
    value: int | None
    recall: float
    target: float
    queries: int
    queries_per_second: float
    rows: int | None = None
    low: float | None = None
    high: float | None = None
    source: str | None = None
    near_copies: int | None = None

    @property
    def met(self) -> bool:
        """Whether the interval lies above the target."""
        return self.low is not None and self.low >= self.target

    def __str__(self) -> str:
        """What was measured, in a line."""
        interval = "" if self.low is None else f" ({self.low:.3f} to {self.high:.3f} with 99 % confidence)"
        kind = "rows left out" if self.source == "rows" else "queries"
        setting = "" if self.parameter is None else f" with {self.parameter} {self.value}"
        met = "" if self.low is None else ": met" if self.met else ": NOT met"
        return f"{self.recall:.3f}{interval} on {self.queries:,} {kind}{setting}; target {self.target:g}{met}"


@dataclass(frozen=True)
class TuningQueries:
    """Queries that an index is tuned on, and what exact search finds for them.

    Attributes:
        queries: (q, dim) of length 1.
        worst_accepted: (q, 1) score from which on a row is one of the nearest.
        absent: rows that must not be in the index while it is tuned, ascending: the queries themselves, where they are
            rows, and their near-copies.
        source: see :class:`Tuning`.
    """

    queries: Matrix
    worst_accepted: Matrix
    absent: npt.NDArray[np.int64]
    source: str

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.queries)


def queries_given(vectors: Vectors, queries: Matrix, show_progress_bar: bool | None = None) -> TuningQueries:
    """Tuning queries of the user's.

    Args:
        vectors: (n, dim) of length 1.
        queries: (q, dim) of length 1.
        show_progress_bar: None shows one in a terminal, after two seconds.
    """
    best, _ = exact_search(vectors, queries, min(RECALL_AT, vectors.shape[0]), show_progress_bar=show_progress_bar)
    return TuningQueries(queries, best[:, -1:] - _ROUNDING, np.zeros(0, dtype=np.int64), "queries")


def rows_as_queries(vectors: Vectors, show_progress_bar: bool | None = None) -> TuningQueries | None:
    """Rows in the place of queries that the index has never seen.

    A query that is new has no copy in the index; a row may have many, which are found with ease and would flatter the
    recall. So a row's near-copies are taken out with it: those less than half as far (in 1 - cosine) as its thirtieth
    neighbour, or as half of what is usual for that. Copies may be more, up to 256: those before the widest gap in a
    stretch in which twice as many neighbours are 1.35 times as far, if they are about a third as far as two rows that
    have nothing to do with each other. At most a fifth of the rows is taken out; where that leaves fewer than 100
    queries, all rows lie in such groups, and they are no copies.

    Args:
        vectors: (n, dim) of length 1.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Returns:
        Up to 2,000 queries; None if there are too few rows for any.
    """
    rows = vectors.shape[0]
    count = min(MOST_QUERIES, rows // 10)
    if not count:
        return None
    drawn = np.random.default_rng(0).choice(rows, count, replace=False)
    queries = as_float(vectors[drawn])
    scores, found = exact_search(vectors, queries, min(_NEIGHBOURS, rows), show_progress_bar=show_progress_bar)
    unrelated = float(np.median(1 - queries[:_SAMPLE] @ queries[:_SAMPLE].T))
    near = _near_copies(1 - scores, _SHARE * unrelated)
    absent, used = _taken_out(drawn, found, near, rows // 5)
    if used < min(count, _FEWEST_QUERIES):  # groups of this size are how all rows lie
        absent, used = _taken_out(drawn, found, _near_copies(1 - scores), rows // 5)
    gone = np.array(sorted(absent), dtype=np.int64)
    left = ~np.isin(found[:used], gone)
    wanted = min(RECALL_AT, rows - len(gone))
    enough = left.sum(axis=1) >= wanted  # else all known neighbours are copies
    rank = np.argmax(np.cumsum(left, axis=1) == wanted, axis=1)
    worst = np.take_along_axis(scores[:used], rank[:, None], axis=1) - _ROUNDING
    if not enough.any():
        return None
    return TuningQueries(queries[:used][enough], worst[enough], gone, "rows")


def _taken_out(
    drawn: npt.NDArray[np.int64], found: npt.NDArray[np.int64], near: npt.NDArray[np.bool_], most: int
) -> tuple[set[int], int]:
    """Rows that go with the first of those that were drawn, up to a number; and how many of these that is."""
    absent: set[int] = set()
    used = 0
    for row, copies in zip(drawn.tolist(), (each[these] for each, these in zip(found, near, strict=True)), strict=True):
        taken = absent | {row, *copies.tolist()}
        if used and len(taken) > most:
            break
        absent, used = taken, used + 1
    return absent, used


def _near_copies(distances: Matrix, farthest: float = 0) -> npt.NDArray[np.bool_]:
    """Which of the neighbours of each row are its copies.

    Args:
        distances: (q, k) of the neighbours, ascending.
        farthest: distance up to which many may be copies; 0 takes no large groups for copies.
    """
    count = distances.shape[1]
    usual = distances[:, min(_REFERENCE, count) - 1 :][:, :1]
    near: npt.NDArray[np.bool_] = distances < np.maximum(usual, np.median(usual) / 2) / 2
    sizes = np.arange(_SMALLEST_GROUP, count // 2 + 1)
    jumps = distances[:, 2 * sizes - 1] > _JUMP * distances[:, sizes - 1]
    jumps &= distances[:, sizes - 1] <= farthest
    for row in np.flatnonzero(jumps.any(axis=1)).tolist():
        for size in reversed(sizes[jumps[row]].tolist()):
            group = size + int(np.argmax(np.diff(distances[row, size - 1 : 2 * size])))
            last, following = distances[row, group - 1 : group + 1].tolist()
            if last <= farthest and following > _GAP * last:
                near[row, :group] = True
                break
    return near


def tune(index: Any, vectors: Vectors, known: TuningQueries, target: float) -> Tuning:
    """Set ``nprobe`` or ``efSearch`` to about the least whose recall is above a target with 99.5 % confidence.

    An index that refines gets more candidates where its codes are what is in the way.

    Args:
        index: with the first ``index.ntotal`` vectors in it, those of ``known.absent`` not among them.
        vectors: (n, dim) of length 1.
        known: the queries.
        target: recall@10 in (0, 1]; where it is out of reach, the best is taken and a warning says so.
    """
    parameter, values = effort_name(index), _ladder(index)
    tried: dict[tuple[float, int | None], Tuning] = {}

    def measure(value: int | None) -> Tuning:
        key = (_candidates(index), value)
        if key not in tried:
            tried[key] = _measured(index, vectors, known, target, parameter, value)
        return tried[key]

    while True:
        here = [measure(values[0])]
        for value in values[1:]:
            if here[-1].met or (len(here) > 4 and here[-1].recall - here[-5].recall < _PLATEAU):
                break
            here.append(measure(value))
        if here[-1].met or not hasattr(index, "k_factor") or index.k_factor >= _MOST_CANDIDATES:
            break
        index.k_factor *= 2
    if here[-1].met:
        chosen = _least(here, measure)
    else:
        best = max(tried, key=lambda key: tried[key].recall)
        highest = tried[best].recall
        few = min(
            (key for key in tried if tried[key].recall >= highest - _PLATEAU / 2), key=lambda key: (key[0], key[1] or 0)
        )
        if hasattr(index, "k_factor"):
            index.k_factor = few[0]
        chosen = tried[few]
    if chosen.value is not None:
        set_effort(index, chosen.value)
    if chosen.met:
        logger.info("recall@%d %s", RECALL_AT, chosen)
    elif chosen.recall < target:
        logger.warning(
            f"recall@{RECALL_AT} {chosen}. The index reaches {chosen.recall:.3f}, below {target:.3f}: its vectors are "
            "compressed, or it does not suit the data; allow more memory, or choose another factory"
        )
    else:
        logger.warning(
            f"recall@{RECALL_AT} {chosen}. So few queries, or so high a target, leave open whether it is met: give "
            "more queries as `tune_queries`, lower `recall_target`, or choose the factory Flat, which is exact"
        )
    return chosen


def confidence_interval(recalls: npt.NDArray[np.float64]) -> tuple[float, float]:
    """99 % interval of the mean recall of queries like these.

    Wilson's score interval, with as many trials as make a coin vary like the recall of these queries; a query counts
    at least as one.

    Args:
        recalls: (q,) recall of each, in [0, 1].
    """
    count, mean = len(recalls), float(recalls.mean())
    variance = float(recalls.var(ddof=1)) if count > 1 else 0.0
    trials = max(count, count * mean * (1 - mean) / variance) if variance > 0 else count
    share = _QUANTILE**2 / trials
    centre = (mean + share / 2) / (1 + share)
    half = _QUANTILE / (1 + share) * math.sqrt(mean * (1 - mean) / trials + share / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def _measured(
    index: Any, vectors: Vectors, known: TuningQueries, target: float, parameter: str | None, value: int | None
) -> Tuning:
    """What an index finds with a value of its parameter."""
    if value is not None:
        set_effort(index, value)
    k = min(RECALL_AT, int(index.ntotal))
    began = time.perf_counter()
    _, found = index.search(known.queries, k)
    seconds = time.perf_counter() - began
    hits = np.zeros(len(known))
    for start in range(0, len(known), _QUERIES_AT_A_TIME):
        these = slice(start, start + _QUERIES_AT_A_TIME)
        rows = np.maximum(found[these], 0)
        scores = np.einsum("qd,qkd->qk", known.queries[these], as_float(vectors[rows.ravel()]).reshape(*rows.shape, -1))
        hits[these] = ((scores >= known.worst_accepted[these]) & (found[these] >= 0)).mean(axis=1)
    low, high = confidence_interval(hits)
    return Tuning(
        parameter=parameter,
        value=value,
        recall=round(float(hits.mean()), 4),
        target=target,
        queries=len(known),
        queries_per_second=round(len(known) / max(seconds, 1e-9), 1),
        rows=int(index.ntotal) + len(known.absent),
        low=math.floor(low * 1e4) / 1e4,
        high=math.ceil(high * 1e4) / 1e4,
        source=known.source,
        near_copies=max(0, len(known.absent) - len(known)) if known.source == "rows" else None,
    )


def _least(tried: list[Tuning], measure: Callable[[int | None], Tuning]) -> Tuning:
    """The least value that meets the target, give or take a tenth, between the last two that were tried."""
    chosen = tried[-1]
    if len(tried) > 1 and chosen.value is not None:
        low, high = int(tried[-2].value or 0), chosen.value
        while high - low > max(1, low // 10):
            middle = measure((low + high) // 2)
            if middle.met:
                chosen, high = middle, int(middle.value or 0)
            else:
                low = int(middle.value or 0)
    return chosen


def _candidates(index: Any) -> float:
    """How many times the wanted rows an index refines; 1 for one that does not."""
    return float(getattr(index, "k_factor", 1))


def exact_search(
    vectors: Vectors, queries: Matrix, k: int, rows: int | None = None, show_progress_bar: bool | None = False
) -> tuple[Matrix, npt.NDArray[np.int64]]:
    """The k nearest of all vectors, read in blocks.

    Args:
        vectors: (n, dim) of length 1.
        queries: (q, dim) of length 1.
        k: at most n.
        rows: how many of ``vectors`` to compare; all.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Returns:
        (q, k) scores, descending, and (q, k) rows.
    """
    faiss = load_faiss()
    nearest = faiss.ResultHeap(len(queries), k, keep_max=True)
    total = vectors.shape[0] if rows is None else rows
    with progress_bar(total, "Comparing", "row", show_progress_bar) as progress:
        for block in row_blocks(0, total):
            candidates = as_float(vectors[block])
            scores, found = faiss.knn(queries, candidates, min(k, len(candidates)), faiss.METRIC_INNER_PRODUCT)
            nearest.add_result(scores, found + block.start)
            progress.update(len(candidates))
    nearest.finalize()
    return nearest.D, nearest.I


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
