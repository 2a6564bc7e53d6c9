"""Which FAISS index for how many rows, and how hard it must search: chosen, built and tuned."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from st_kdmcse.files import progress_bar
from st_kdmcse.search.base import Matrix
from st_kdmcse.search.faiss_library import faiss_reason, gpus, load_faiss
from st_kdmcse.search.tuning import (
    Tuning,
    Vectors,
    as_float,
    check_recall_target,
    queries_given,
    row_blocks,
    rows_as_queries,
    searching,
    tune,
)

logger = logging.getLogger(__name__)

EXACT_ROWS = 100_000
"""Below this every row is compared with the query."""
_TRAINED_PER_LIST = 64
_TRAINED_AT_LEAST = 65_536


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
            f"or IVF4096,PQ48 with a PQ that divides {dim} ({faiss_reason(error)})"
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


class Reordered:
    """Vectors of which some come last, read as they are needed.

    Args:
        vectors: (n, dim), read by slices and arrays of row numbers.
        last: rows that change places with those at the end.

    Attributes:
        swaps: the rows that change places, by where they were; its own inverse.
    """

    def __init__(self, vectors: Vectors, last: Sequence[int] | npt.NDArray[np.int64] = ()) -> None:
        self.shape = vectors.shape
        rows, ends = vectors.shape[0], np.arange(vectors.shape[0] - len(last), vectors.shape[0])
        pairs = zip(np.setdiff1d(last, ends).tolist(), np.setdiff1d(ends, last).tolist(), strict=True)
        self.swaps = {here: there for first, second in pairs for here, there in ((first, second), (second, first))}
        self.order = np.arange(rows)
        self.order[list(self.swaps)] = list(self.swaps.values())
        self._vectors = vectors

    def __getitem__(self, rows: Any) -> npt.NDArray[Any]:
        return self._vectors[self.order[rows]]


@dataclass(frozen=True)
class Built:
    """An index of vectors.

    Attributes:
        index: of FAISS.
        tuning: what was measured; None for an exact index or too few rows.
        order: (n,) which of the vectors stands at each position; where two changed places, so it is its own inverse.
        swaps: the same, of those that changed places alone.
    """

    index: Any
    tuning: Tuning | None
    order: npt.NDArray[np.int64]
    swaps: Mapping[int, int]


def build_faiss(
    vectors: Vectors,
    factory: str,
    recall_target: float = 0.95,
    memory_limit: int | None = None,
    show_progress_bar: bool | None = None,
    tune_queries: Matrix | None = None,
) -> Built:
    """Train, fill and tune an index.

    Without queries, some rows are queries until the index is tuned; they, and their near-copies, are added after that.

    Args:
        vectors: (n, dim) of length 1.
        factory: FAISS's name of the index type.
        recall_target: recall@10 to reach with as little search as possible, in (0, 1].
        memory_limit: bytes for the sample that the index is trained on.
        show_progress_bar: None shows one in a terminal, after two seconds.
        tune_queries: (q, dim) of length 1; None takes rows.

    Raises:
        ValueError: if there are too few rows to train such an index.
    """
    check_recall_target(recall_target)
    rows, dim = vectors.shape
    index = new_index(dim, factory)
    known = None
    if rows and not is_exact(factory):
        known = (
            rows_as_queries(vectors, show_progress_bar)
            if tune_queries is None
            else queries_given(vectors, tune_queries, show_progress_bar)
        )
    ordered = Reordered(vectors, () if known is None else known.absent)
    held_out = 0 if known is None else len(known.absent)
    if rows:
        train(index, ordered, factory, memory_limit)
    measured = None
    with _progress(rows, "Filling the index", show_progress_bar) as progress:
        for block in row_blocks(0, rows - held_out):
            index.add(as_float(ordered[block]))
            progress.update(block.stop - block.start)
        if known is not None:
            measured = tune(index, ordered, known, recall_target)
        for block in row_blocks(rows - held_out, rows):
            index.add(as_float(ordered[block]))
            progress.update(block.stop - block.start)
    return Built(index, measured, ordered.order, ordered.swaps)


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
        index.train(as_float(vectors[sample]))
    except RuntimeError as error:
        raise ValueError(
            f"{rows:,} rows are too few to train the index {factory}: take Flat or HNSW32, or fewer lists "
            f"({faiss_reason(error)})"
        ) from error


def hurry_training(index: Any) -> None:
    """Have an index learn little, fast, where all that counts is what it can do."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            transform = faiss.downcast_VectorTransform(index.chain.at(number))
            if hasattr(transform, "niter_pq"):
                transform.niter = transform.niter_pq = transform.niter_pq_0 = 1
        hurry_training(index.index)
    if isinstance(index, faiss.IndexRefine):
        hurry_training(index.base_index)
    if hasattr(index, "do_polysemous_training"):
        index.do_polysemous_training = False
    for clustering in (getattr(part, "cp", None) for part in (index, getattr(index, "pq", None))):
        if clustering is not None:
            clustering.niter = 1


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


def _progress(total: int, description: str, show: bool | None) -> tqdm[Any]:
    return progress_bar(total, description, "row", show)
