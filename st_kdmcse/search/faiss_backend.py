"""Rows in memory: vectors in a FAISS index, ids, texts and metadata in SQLite."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from st_kdmcse.search.base import Filter, Hit, Matrix, NewRows, unit_rows
from st_kdmcse.search.factory import (
    EXACT_ROWS,
    Built,
    build_faiss,
    choose_factory,
    hurry_training,
    is_exact,
    new_index,
    train,
)
from st_kdmcse.search.faiss_library import faiss_reason, load_faiss
from st_kdmcse.search.gpu import MOST_RESULTS, GpuSearch
from st_kdmcse.search.table import Positions, RowTable
from st_kdmcse.search.tuning import RECALL_AT, Tuning, as_float, effort_name, get_effort, searching

logger = logging.getLogger(__name__)

Selection = npt.NDArray[np.bool_]

_REMEMBERED_FILTERS = 16
_COMPACT_ABOVE, _COMPACT_SHARE = 1000, 0.25
_MOST_EFFORT = 4096
_QUERIES_AT_A_TIME = 1024
_ROWS_AT_A_TIME = 1000
_TRIED_ROWS, _TRIED_LISTS = 300, 16
_RECALL_TARGET = 0.95  # of an index that was never tuned


class FaissBackend:
    """Rows of one machine as a :class:`~st_kdmcse.search.base.SearchBackend`; nothing is on disk until it is saved.

    Whatever the index type, a search returns as many rows as there are, up to k: where the approximate search finds
    fewer (with a filter that lets few rows through, or a large k), it compares with all rows instead. A row that is
    removed or replaced leaves its vector behind, which no search returns; when these are more than a quarter
    the index is filled again without them, as :meth:`compact` does. Calls from several threads take turns.

    An index is trained and tuned again whenever it is filled again, and when rows are added to one that has none: lists
    and codes that were learned from other rows find too little.

    On a GPU, with FAISS's wheel for it, searches without a filter run there, see
    :class:`~st_kdmcse.search.gpu.GpuSearch`. Other searches, those after a removal, and index types that FAISS has for
    CPUs alone run on the CPU.

    Scores of an index that compresses (SQ, PQ) are those of the compressed vectors, and approximate.

    Args:
        index: of FAISS, for inner products; vector i belongs to the row at position i of the table.
        table: ids, texts and metadata.
        factory: FAISS's name of the index type.
        tuning: what was measured, if anything.
        mapped: whether the vectors are those of a file, and cannot be changed.
        exact: file of the whole vectors of an index that was built to stay on disk, and is to be saved.

    Raises:
        ImportError: without FAISS; names the extra.
        ValueError: if the two do not fit together.
    """

    def __init__(
        self,
        index: Any,
        table: RowTable,
        factory: str,
        tuning: Tuning | None = None,
        *,
        mapped: bool = False,
        exact: Path | None = None,
    ) -> None:
        self.index = index
        self.table = table
        self.factory = factory
        self.tuning = tuning
        self.mapped = mapped
        self.exact = exact
        self._lock = threading.RLock()
        self._filters: dict[str, Selection] = {}
        self._on_gpu: tuple[int, GpuSearch | None] = (-1, None)
        self._live = np.zeros(index.ntotal, dtype=np.bool_)
        positions = table.all_positions() if len(table) < index.ntotal else np.arange(index.ntotal)
        if len(table) > index.ntotal or (positions.size and positions[-1] >= index.ntotal):
            raise ValueError(
                f"the table has {len(table)} rows, the index {index.ntotal} vectors: they do not belong together"
            )
        self._live[positions] = True

    @classmethod
    def empty(cls, dim: int, factory: str = "Flat") -> FaissBackend:
        """An index without rows; a type that needs training is trained on the first rows that are added."""
        return cls(new_index(dim, factory), RowTable.temporary(), factory)

    @classmethod
    def build(
        cls,
        rows: NewRows,
        factory: str | None = None,
        recall_target: float = 0.95,
        memory_limit: int | None = None,
        show_progress_bar: bool | None = None,
        tune_queries: Matrix | None = None,
    ) -> FaissBackend:
        """An index of rows that are in memory.

        Args:
            rows: n rows.
            factory: FAISS's name of the index type; None chooses one, see
                :func:`~st_kdmcse.search.factory.choose_factory`, and logs it.
            recall_target: see :func:`~st_kdmcse.search.factory.build_faiss`.
            memory_limit: bytes for the vectors.
            show_progress_bar: None shows one in a terminal, after two seconds.
            tune_queries: (q, dim) of length 1, which the index is tuned on; None takes some of the rows.
        """
        factory = chosen_factory(len(rows), rows.embeddings.shape[1], factory, memory_limit)
        built = build_faiss(rows.embeddings, factory, recall_target, memory_limit, show_progress_bar, tune_queries)
        table = RowTable.temporary()
        with table.transaction():
            table.insert(built.order, rows.ids, rows.texts, rows.metadata)
        return cls(built.index, table, factory, built.tuning)

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return int(self.index.d)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.table)

    def add(self, rows: NewRows) -> None:
        """Store new rows; all or none.

        Raises:
            ValueError: if an id is there already, the width does not fit, or they are too few to train the index.
        """
        with self._changing():
            self._append(rows, replaced=False)

    def replace(self, rows: NewRows) -> None:
        """Store rows in the place of those with the same ids.

        Raises:
            KeyError: if an id is not there; nothing is changed.
            ValueError: if the width does not fit.
        """
        with self._changing():
            old = self.table.positions(rows.ids)
            self._append(rows, replaced=True)
            self._bury(old)

    def remove(self, ids: Sequence[str]) -> None:
        """Remove rows.

        Raises:
            KeyError: if an id is not there; nothing is changed.
        """
        with self._changing():
            old = self.table.positions(ids)
            with self.table.transaction():
                self.table.delete(ids)
            self._bury(old)

    def get(self, ids: Sequence[str]) -> list[Hit]:
        """Rows by id, with score 1.

        Raises:
            KeyError: if an id is not there.
        """
        with self._lock:
            positions = self.table.positions(ids)
            rows = self.table.rows(positions)
        hits = []
        for position in positions.tolist():
            key, text, metadata = rows[position]
            hits.append(Hit(key, text, 1.0, metadata))
        return hits

    def all_rows(self, after: str = "") -> Iterator[NewRows]:
        """All rows with their embeddings, some at a time, ordered by the code points of their ids.

        Args:
            after: only those whose ids come after this one.

        Raises:
            ValueError: if the vectors are compressed.
        """
        if not exact_scores(self.factory):
            raise ValueError(
                f"the index type {self.factory} keeps compressed vectors instead of the embeddings: build the copy "
                "from the texts"
            )
        with _readable(self.index):
            while page := self.table.after(after, _ROWS_AT_A_TIME):
                positions, ids, texts, metadata = zip(*page, strict=True)
                with self._lock:
                    vectors = self.index.reconstruct_batch(np.array(positions, dtype=np.int64))
                yield NewRows(list(ids), list(texts), vectors, list(metadata))
                after = ids[-1]

    def search(self, queries: Matrix, k: int, where: Filter | None = None) -> list[list[Hit]]:
        """The k nearest rows of each query, best first; fewer where there are fewer.

        Args:
            queries: (n, dim) float32 of length 1.
            k: at least 1.
            where: which rows may be returned.

        Raises:
            ValueError: for queries of another width, or k below 1.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries of shape {queries.shape}: the index has vectors of width {self.dim}")
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        with self._lock:
            allowed = self._allowed(where)
            count = int(np.count_nonzero(allowed))
            hits: list[list[Hit]] = []
            for start in range(0, len(queries), _QUERIES_AT_A_TIME):
                block = queries[start : start + _QUERIES_AT_A_TIME]
                # For fewer than it was tuned for, an index looks at too few candidates.
                scores, found = self._nearest(block, min(max(k, RECALL_AT), count), allowed, count)
                hits += self._hits(scores[:, :k], found[:, :k])
        return hits

    def compact(self) -> bool:
        """Fill the index again without the vectors of rows that are gone.

        It is trained and tuned on the rows that it has.

        Returns:
            Whether it could be done: vectors of some compressed types cannot be read back, and stay.
        """
        with self._changing():
            live = np.flatnonzero(self._live)
            if len(live) == self.index.ntotal:
                return True
            if not len(live):
                self.index.reset()
                self._take(Built(self.index, self.tuning, live, {}))
                return True
            logger.info("filling the index again without %s rows that are gone", f"{self.index.ntotal - len(live):,}")
            try:
                with _readable(self.index):
                    vectors = self.index.reconstruct_batch(live)
            except RuntimeError:
                return False
            built = self._built(vectors)
            with self.table.transaction():
                self.table.renumber(live)
                self.table.move(built.swaps)
            self._take(built)
            return True

    def info(self) -> dict[str, Any]:
        """Engine, index type, rows, dim, bytes of the vectors, what was measured, and whether scores are exact."""
        return {
            "engine": "faiss",
            "factory": self.factory,
            "rows": len(self),
            "dim": self.dim,
            "removed": int(self.index.ntotal) - len(self),
            "bytes": index_bytes(self.index),
            "vectors": "on disk, memory-mapped" if self.mapped else "in memory",
            "scores": "exact" if exact_scores(self.factory) else "approximate: the vectors are compressed",
            "recall": None if self.tuning is None else self.tuning.recall,
            "threads": int(load_faiss().omp_get_max_threads()),
            "device": "gpu" if self._on_gpu[1] else "cpu",  # of the last search
        }

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock, of an index that can be changed."""
        if self.mapped:
            raise ValueError(
                "the index is memory-mapped, and cannot be changed: load it with `mmap=False` where there is memory "
                "for it, or build it again"
            )
        with self._lock:
            yield

    def _append(self, rows: NewRows, replaced: bool) -> None:
        if rows.embeddings.shape[1] != self.dim:
            raise ValueError(
                f"embeddings of width {rows.embeddings.shape[1]}: the index has vectors of width {self.dim}"
            )
        if not len(rows):
            return
        if not len(self.table):
            self._fill(rows)
            return
        before, after = int(self.index.ntotal), int(self.index.ntotal) + len(rows)
        stored = False
        try:
            with self.table.transaction():
                if replaced:
                    self.table.delete(rows.ids)
                self.table.insert(range(before, after), rows.ids, rows.texts, rows.metadata)
                self.index.add(rows.embeddings)
            stored = True
        finally:
            # Vectors of a transaction that failed stay behind as those of rows that are gone.
            self._live = np.append(self._live, np.full(int(self.index.ntotal) - before, stored))
            self._filters.clear()
        if is_exact(self.factory) and before < EXACT_ROWS <= after:
            logger.info(
                "the index compares queries with all of %s rows: an index that is built again for so many is faster",
                f"{after:,}",
            )

        trained = self.tuning.rows if self.tuning and effort_name(self.index) == "nprobe" else None
        if trained and (after // trained).bit_length() > max(1, (before // trained).bit_length()):
            logger.warning(
                "the index %s was trained on %s rows, and %s were added since: one that is built again finds more",
                *(self.factory, f"{trained:,}", f"{after - trained:,}"),
            )

    def _fill(self, rows: NewRows) -> None:
        """Store the only rows."""
        with self.table.transaction():
            built = self._built(rows.embeddings)
            self.table.insert(built.order, rows.ids, rows.texts, rows.metadata)
        self._take(built)

    def _built(self, vectors: Matrix) -> Built:
        """An index of this type with these vectors, trained and tuned on them if they are enough."""
        try:
            return build_faiss(vectors, self.factory, self.tuning.target if self.tuning else _RECALL_TARGET)
        except ValueError:
            if not self.index.is_trained:
                raise
        logger.warning(
            "%s rows are too few to train the index %s, which goes by what it learned from others and may find too "
            "little: build it again when there are more",
            *(f"{len(vectors):,}", self.factory),
        )
        index = load_faiss().clone_index(self.index)
        index.reset()
        index.add(as_float(vectors))
        return Built(index, self.tuning, np.arange(len(vectors)), {})

    def _take(self, built: Built) -> None:
        """Go on with an index of all rows."""
        self.index, self.tuning = built.index, built.tuning
        self._live = np.ones(int(self.index.ntotal), dtype=np.bool_)
        self._filters.clear()
        self._on_gpu = (-1, None)

    def _bury(self, positions: Positions) -> None:
        self._live[positions] = False
        self._filters.clear()
        gone = int(self.index.ntotal) - len(self)
        if gone > max(_COMPACT_SHARE * self.index.ntotal, _COMPACT_ABOVE):
            self.compact()

    def _allowed(self, where: Filter | None) -> Selection:
        """(vectors,) which may be returned."""
        if not where:
            return self._live
        key = json.dumps(dict(where), sort_keys=True, default=repr)
        if key not in self._filters:
            selection = np.zeros(len(self._live), dtype=np.bool_)
            selection[self.table.matching(where)] = True
            if len(self._filters) >= _REMEMBERED_FILTERS:
                self._filters.pop(next(iter(self._filters)))
            self._filters[key] = selection
        return self._filters[key]

    def _nearest(self, queries: Matrix, k: int, allowed: Selection, count: int) -> tuple[Matrix, Positions]:
        """(n, k) scores and positions, for k of at most ``count`` rows that are allowed."""
        if not k or not len(queries):
            return np.zeros((len(queries), 0), dtype=np.float32), np.zeros((len(queries), 0), dtype=np.int64)
        selector = None
        if count < len(allowed):
            selector = load_faiss().IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if selector is None and k <= MOST_RESULTS and (gpu := self._gpu()):
            scores, found = gpu.search(queries, k)
        else:
            # Of the rows that the search comes by only this share counts; it was tuned for the ten nearest.
            effort = get_effort(self.index) * len(allowed) / count
            if effort_name(self.index) == "efSearch":
                effort *= max(1, k / RECALL_AT)
            effort = math.ceil(effort)
            scores, found = search_index(self.index, queries, k, selector, effort if effort <= _MOST_EFFORT else None)
        short = np.flatnonzero((found < 0).any(axis=1))
        if short.size:
            scores[short], found[short] = search_index(self.index, queries[short], k, selector, None)
        return scores, found

    def _gpu(self) -> GpuSearch | None:
        """The copy on a GPU of as many vectors as there are now, if there can be one."""
        if self._on_gpu[0] != self.index.ntotal:
            self._on_gpu = (-1, None)  # the old copy goes before the new one is made
            self._on_gpu = (int(self.index.ntotal), GpuSearch.of(self.index))
        return self._on_gpu[1]

    def _hits(self, scores: Matrix, found: Positions) -> list[list[Hit]]:
        rows = self.table.rows(np.unique(found[found >= 0]))
        scores = np.clip(scores, -1, 1)
        results = []
        for of_query, positions in zip(scores.tolist(), found.tolist(), strict=True):
            hits = []
            for score, position in zip(of_query, positions, strict=True):
                if position >= 0:
                    key, text, metadata = rows[position]
                    hits.append(Hit(key, text, score, dict(metadata)))
            results.append(hits)
        return results


@contextmanager
def _readable(index: Any) -> Iterator[None]:
    """Let vectors be read back by their positions, which inverted lists need a map for."""
    ivf = load_faiss().try_extract_index_ivf(index)
    try:
        if ivf is not None:
            ivf.make_direct_map(True)
        yield
    finally:
        if ivf is not None:
            ivf.make_direct_map(False)


def chosen_factory(rows: int, dim: int, factory: str | None, memory_limit: int | None) -> str:
    """The user's index type, or the best for so many rows; which and why is logged."""
    if factory is not None:
        try_factory(dim, factory)  # what cannot be used is refused before any work is done
        return factory
    choice = choose_factory(rows, dim, memory_limit)
    logger.info("index type %s (%s)", choice.factory, choice.reason)
    return choice.factory


@cache
def try_factory(dim: int, factory: str) -> None:
    """Try an index type with a few rows: some take no filter, or lose rows that equal others or were removed.

    Raises:
        ValueError: if FAISS knows no such index, or it cannot be used; says why.
    """
    new_index(dim, factory)
    few_lists = re.sub(r"IVF\d+", lambda found: f"IVF{min(int(found[0][3:]), _TRIED_LISTS)}", factory)
    generator = np.random.default_rng(0)
    vectors = unit_rows(generator.normal(size=(_TRIED_ROWS, dim)))
    vectors[1::2] = vectors[::2]
    ids = [str(row) for row in range(_TRIED_ROWS)]
    rows = NewRows(ids, ids, vectors, [{"third": row % 3 == 0} for row in range(_TRIED_ROWS)])
    try:
        index = new_index(dim, few_lists)
        hurry_training(index)
        train(index, vectors, few_lists)
    except ValueError:  # it needs more rows, which the build will tell
        return
    try:
        index.add(vectors)
        table = RowTable.temporary()
        with table.transaction():
            table.insert(range(_TRIED_ROWS), rows.ids, rows.texts, rows.metadata)
        backend = FaissBackend(index, table, few_lists)
        removed = slice(_TRIED_ROWS // 2)
        for change, where, expected in (
            (backend.info, None, ids),
            (backend.info, {"third": True}, ids[::3]),
            (lambda: backend.remove(ids[removed]), None, ids[_TRIED_ROWS // 2 :]),
            (lambda: backend.add(rows[removed]), None, ids),
        ):
            change()
            (hits,) = backend.search(vectors[:1], _TRIED_ROWS, where)
            if sorted(hit.id for hit in hits) != sorted(expected):
                raise RuntimeError("it finds other rows than are there")
    except RuntimeError as error:
        raise ValueError(
            f"index factory {factory!r} cannot be used here, take another (HNSW32, IVF1024,Flat): in a trial with rows "
            f"that are filtered, removed and added it failed ({faiss_reason(error)})"
        ) from error


def search_index(
    index: Any, queries: Matrix, k: int, selector: Any = None, effort: int | None = None
) -> tuple[Matrix, Positions]:
    """The k nearest vectors that a selector lets through; -1 where there are fewer.

    Args:
        index: of FAISS.
        queries: (n, dim).
        k: how many.
        selector: an ``IDSelector``; None for all.
        effort: ``nprobe`` or ``efSearch``; None compares with every vector.

    Returns:
        (n, k) scores, descending, and (n, k) positions.
    """
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            queries = faiss.downcast_VectorTransform(index.chain.at(number)).apply(queries)
        return search_index(index.index, queries, k, selector, effort)
    if isinstance(index, faiss.IndexRefine):
        if effort is None:
            return search_index(index.refine_index, queries, k, selector)
        base = faiss.downcast_index(index.base_index)
        parameters = faiss.IndexRefineSearchParameters(
            k_factor=index.k_factor, base_index_params=_parameters(base, selector, effort)
        )
    elif effort is None and hasattr(index, "storage"):
        return search_index(index.storage, queries, k, selector)
    else:
        parameters = _parameters(index, selector, effort)
    scores, found = index.search(queries, k, params=parameters)
    return scores, found


def exact_scores(factory: str) -> bool:
    """Whether an index type keeps the vectors as they are."""
    last = factory.replace("_", ",").split(",")[-1]
    return last in ("RFlat", "Refine(Flat)") or ("PCA" not in factory and (last == "Flat" or last.startswith("HNSW")))


def index_bytes(index: Any) -> int:
    """Bytes that the vectors, their links and lists take, give or take a little."""
    inner, rows = searching(index), int(index.ntotal)
    size = rows * int(getattr(inner, "storage", inner).sa_code_size())
    if hasattr(inner, "hnsw"):
        size += 4 * int(inner.hnsw.neighbors.size()) + 8 * rows
    if hasattr(inner, "nprobe"):
        size += 8 * rows + 4 * int(inner.d) * int(inner.nlist)
    if hasattr(index, "refine_index"):
        size += rows * int(index.refine_index.sa_code_size())
    return size


def _parameters(index: Any, selector: Any, effort: int | None) -> Any:
    faiss = load_faiss()
    chosen = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=min(effort or index.nlist, index.nlist), **chosen)
    if hasattr(index, "hnsw"):
        return faiss.SearchParametersHNSW(efSearch=effort, **chosen)
    return faiss.SearchParameters(**chosen) if chosen else None
