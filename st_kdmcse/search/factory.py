"""Which FAISS index for how many rows, and how hard it must search: chosen, built and tuned."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from st_kdmcse.files import progress_bar
from st_kdmcse.search.base import Matrix
from st_kdmcse.search.faiss_library import gpus, load_faiss

logger = logging.getLogger(__name__)

EXACT_ROWS = 100_000
"""Below this every row is compared with the query."""
RECALL_AT = 10

_BLOCK = 16_384
_HELD_OUT = 500
_TRAINED_PER_LIST = 64
_TRAINED_AT_LEAST = 65_536
_PLATEAU = 0.002


@dataclass(frozen=True)
class Choice:
    """An index type.

    Attributes:
        factory: FAISS's name of it, for ``faiss.index_factory``.
        memory: bytes that the vectors will take; None for a factory of the user's.
        reason: why this one, for people.
    """

    factory: str
    memory: int | None
    reason: str


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
    """

    parameter: str | None
    value: int | None
    recall: float
    target: float
    queries: int
    queries_per_second: float


class Vectors(Protocol):
    """Unit vectors that may be more than memory holds: an array, or something that reads like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, dim)."""

    def __getitem__(self, rows: Any, /) -> npt.NDArray[Any]:
        """Some rows, by slice or by an array of row numbers."""


def choose_factory(rows: int, dim: int, memory_limit: int | None = None) -> Choice:
    """The fastest index type that is accurate and fits.

    Args:
        rows: how many.
        dim: width of the vectors.
        memory_limit: bytes for the vectors; None for no limit.

    Raises:
        ValueError: if none fits; says what the smallest would take.
    """
    if rows < 0 or dim < 1:
        raise ValueError(f"{rows} rows of dim {dim}: expected at least 0 of at least 1")
    candidates = list(_candidates(rows, dim))
    fitting = [each for each in candidates if memory_limit is None or (each.memory or 0) <= memory_limit]
    if not fitting:
        smallest = min(candidates, key=lambda each: each.memory or 0)
        raise ValueError(
            f"{rows:,} rows of dim {dim} do not fit into {size_text(memory_limit or 0)}: the smallest index, "
            f"{smallest.factory}, takes {size_text(smallest.memory or 0)}; raise the memory limit, or truncate the "
            "embeddings (truncate_dim)"
        )
    return fitting[0]


def new_index(dim: int, factory: str) -> Any:
    """An empty FAISS index for cosine (inner product of unit vectors).

    Raises:
        ImportError: without FAISS.
        ValueError: if FAISS knows no such index.
    """
    faiss = load_faiss()
    if unfit := [name for name in ("IDMap", "NSG") if name in factory]:
        raise ValueError(
            f"index factory {factory!r}: {unfit[0]} cannot be added to, take another (HNSW32, IVF1024,Flat)"
        )
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS has no index {factory!r} for cosine at dim {dim}: such as Flat, HNSW32, IVF4096,Flat, IVF4096,SQ8 "
            f"or IVF4096,PQ48 with a PQ that divides {dim} ({_last_line(error)})"
        ) from error
    inner = searching(index)
    if isinstance(faiss.downcast_index(getattr(inner, "storage", inner)), faiss.IndexPQ | faiss.IndexPQFastScan):
        raise ValueError(
            f"index factory {factory!r}: PQ can be filtered within lists only, such as IVF1,PQ{dim // 4}np"
        )
    if isinstance(index, faiss.IndexRefine):
        index.k_factor = 8.0
    return index


def is_exact(factory: str) -> bool:
    """Whether an index compares the query with every row, unchanged."""
    return factory == "Flat"


def held_out_swaps(rows: int) -> dict[int, int]:
    """Which rows change places so that the last ones, see :func:`held_out_count`, are drawn from all.

    They are added last: until then an index can be measured with queries that it does not hold.
    """
    count = held_out_count(rows)
    drawn = np.random.default_rng(0).choice(rows, count, replace=False) if count else np.zeros(0, dtype=np.int64)
    first = np.setdiff1d(drawn, np.arange(rows - count, rows))
    second = np.setdiff1d(np.arange(rows - count, rows), drawn)
    pairs = [(int(here), int(there)) for here, there in zip(first, second, strict=True)]
    return dict(pairs) | {there: here for here, there in pairs}


class Reordered:
    """Vectors in the order of :func:`held_out_swaps`, read as they are needed.

    Args:
        vectors: (n, dim), read by arrays of row numbers.
    """

    def __init__(self, vectors: Vectors) -> None:
        self.shape = vectors.shape
        self.order = np.arange(vectors.shape[0])
        swaps = held_out_swaps(len(self.order))
        self.order[list(swaps)] = list(swaps.values())
        self._vectors = vectors

    def __getitem__(self, rows: Any) -> npt.NDArray[Any]:
        return self._vectors[self.order[rows]]


def held_out_count(rows: int) -> int:
    """How many rows are queries while an index is tuned: 500, of few rows a tenth."""
    return min(_HELD_OUT, rows // 10)


def build_faiss(
    vectors: Vectors,
    factory: str,
    recall_target: float = 0.95,
    memory_limit: int | None = None,
    show_progress_bar: bool | None = None,
) -> tuple[Any, Tuning | None]:
    """Train, fill and tune an index.

    Args:
        vectors: (n, dim) of length 1, in an order in which the last :func:`held_out_count` are drawn from all.
        factory: FAISS's name of the index type.
        recall_target: recall@10 to reach with as little search as possible, in (0, 1].
        memory_limit: bytes for the sample that the index is trained on.
        show_progress_bar: None shows one in a terminal, once it has taken two seconds.

    Returns:
        The index with the n vectors, and what was measured; None for an exact index or too few rows.

    Raises:
        ValueError: if there are too few rows to train such an index.
    """
    check_recall_target(recall_target)
    rows, dim = vectors.shape
    index = new_index(dim, factory)
    if rows:
        train(index, vectors, factory, memory_limit)
    held_out = 0 if is_exact(factory) else held_out_count(rows)
    with _progress(rows, "Filling the index", show_progress_bar) as progress:
        for block in _blocks(0, rows - held_out):
            index.add(_float(vectors[block]))
            progress.update(block.stop - block.start)
        measured = None
        if held_out:
            queries = _float(vectors[rows - held_out : rows])
            measured = tune(index, vectors, queries, rows - held_out, recall_target)
            index.add(queries)
            progress.update(held_out)
    return index, measured


def train(index: Any, vectors: Vectors, factory: str, memory_limit: int | None = None) -> None:
    """Train an index on a sample of rows, if its type needs that.

    Raises:
        ValueError: if there are too few.
    """
    if index.is_trained:
        return
    rows, dim = vectors.shape
    faiss = load_faiss()
    ivf = faiss.try_extract_index_ivf(index)
    lists = 0 if ivf is None else int(ivf.nlist)
    wanted = max(_TRAINED_AT_LEAST, _TRAINED_PER_LIST * lists)
    if memory_limit is not None:
        wanted = max(min(wanted, memory_limit // (4 * dim)), 2 * lists, 1024)
    sample = np.arange(rows)
    if wanted < rows:
        sample = np.sort(np.random.default_rng(1).choice(rows, wanted, replace=False))
    logger.info("training %s on %s rows", factory, f"{len(sample):,}")
    if ivf is not None and gpus():
        ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(ivf.d))
    try:
        index.train(_float(vectors[sample]))
    except RuntimeError as error:
        raise ValueError(
            f"{rows:,} rows are too few to train the index {factory}: take Flat or HNSW32, or fewer lists "
            f"({_last_line(error)})"
        ) from error


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
            "qd,qkd->qk", queries, _float(vectors[np.maximum(found, 0).ravel()]).reshape(*found.shape, -1)
        )
        recall = float(((scores >= worst_accepted) & (found >= 0)).mean())
        tried.append(Tuning(parameter, value, round(recall, 4), target, len(queries), round(len(queries) / seconds, 1)))
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
    for block in _blocks(0, vectors.shape[0] if rows is None else rows):
        candidates = _float(vectors[block])
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
    """Its value; 1 where there is none."""
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


def size_text(size: float) -> str:
    """Bytes for people, such as "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _candidates(rows: int, dim: int) -> Iterator[Choice]:
    """Index types in the order of preference."""
    lists = 2 ** int(
        min(round(math.log2(4 * math.sqrt(rows + 1))), math.log2(max(rows, _TRAINED_PER_LIST) / _TRAINED_PER_LIST))
    )
    ivf = f"IVF{lists}_HNSW32" if lists > 1 << 14 else f"IVF{lists}"
    small, shared = rows < EXACT_ROWS, 4 * dim * lists
    few = f"{rows:,} rows, fewer than {EXACT_ROWS:,}"
    compressed = f"{rows:,} rows whose vectors do not fit into memory whole"
    if small:
        yield Choice("Flat", 4 * dim * rows, f"{few}: exact search")
        yield Choice("SQfp16", 2 * dim * rows, f"{compressed}: halves, nearly exact")
        yield Choice("SQ8", dim * rows, f"{compressed}: one byte a dimension, scores are approximate")
    else:
        for keep, width, reason in (
            ("RFlat", 4, f"{rows:,} rows: lists of near vectors, scanned by 2-bit codes"),
            ("Refine(SQfp16)", 2, f"{compressed}: lists scanned by 2-bit codes, then halves, nearly exact"),
        ):
            if dim % 2 == 0:
                memory = (width * dim + dim // 4 + 8) * rows + shared
                yield Choice(f"{ivf},PQ{dim // 2}x4fs,{keep}", memory, reason)
        if dim % 2:
            yield Choice(f"{ivf},Flat", (4 * dim + 8) * rows + shared, f"{rows:,} rows: lists of near vectors")
        yield Choice(f"{ivf},SQ8", (dim + 8) * rows + shared, f"{compressed}: lists of one byte a dimension")
    for width in (2, 4, 8):
        if dim % width == 0 and rows >= 10_000:
            reason = f"{compressed}: product quantisation, scores are approximate and recall suffers"
            yield Choice(f"{ivf},PQ{dim // width}np", (dim // width + 8) * rows + shared, reason)


def _ladder(index: Any) -> list[int | None]:
    """Values to try, each about 1.4 times the one before."""
    name = effort_name(index)
    if name is None:
        return [None]
    lowest, highest = (1, searching(index).nlist) if name == "nprobe" else (RECALL_AT, 4096)
    steps = math.ceil(2 * math.log2(max(highest / lowest, 1)))
    return sorted({min(highest, round(lowest * 2 ** (step / 2))) for step in range(steps + 1)})


def _blocks(start: int, stop: int) -> Iterator[slice]:
    for first in range(start, stop, _BLOCK):
        yield slice(first, min(first + _BLOCK, stop))


def _float(vectors: npt.NDArray[Any]) -> Matrix:
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].rsplit(": ", 1)[-1]


def _progress(total: int, description: str, show: bool | None) -> tqdm[Any]:
    return progress_bar(total, description, "row", show)
