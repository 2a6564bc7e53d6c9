"""Near-duplicate texts of a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sentence_transformers import SentenceTransformer

from st_kdmcse.encoding import encode_distinct
from st_kdmcse.files import progress_bar
from st_kdmcse.precision import Precision
from st_kdmcse.search.base import Matrix
from st_kdmcse.search.faiss_library import load_faiss
from st_kdmcse.search.records import TextRecord

DUPLICATE_COLUMNS = pa.schema(
    [
        ("id1", pa.string()),
        ("id2", pa.string()),
        ("score", pa.float32()),
        ("text1", pa.string()),
        ("text2", pa.string()),
    ]
)
"""Columns of a table of :class:`Duplicate`."""

_EXACT_UP_TO = 100_000
_LISTS_SEARCHED = 32
_BLOCK_ROWS = 256
_BLOCK_SCORES = 1 << 24
_TRAINING_ROWS_PER_LIST = 64
_ROUNDING = 1e-6


class Duplicate(NamedTuple):
    """Two records that say the same.

    Attributes:
        id1: of the one that comes first.
        id2: of the other.
        score: cosine, in [-1, 1]; 1 where the texts are equal.
        text1: of the first.
        text2: of the other.
    """

    id1: str
    id2: str
    score: float
    text1: str
    text2: str


@dataclass(frozen=True)
class Duplicates:
    """What :func:`find_duplicates` found.

    Attributes:
        records: how many there are.
        equal: how many of them have the text of an earlier one.
        found: pairs, those above the limit included.
        exact: whether all pairs of texts were compared; else a pair is missed now and then.
        pairs: the best ones, best first.
    """

    records: int
    equal: int
    found: int
    exact: bool
    pairs: list[Duplicate]


def find_duplicates(
    records: Iterable[TextRecord],
    model: SentenceTransformer,
    *,
    threshold: float = 0.9,
    limit: int = 1_000_000,
    exact_up_to: int = _EXACT_UP_TO,
    show_progress_bar: bool | None = None,
    precision: Precision = "auto",
) -> Duplicates:
    """Pairs of records whose embeddings have a cosine of at least ``threshold``.

    Records with equal texts are paired with the first of them alone, and only that one with others: m copies are m - 1
    pairs. Up to ``exact_up_to`` distinct texts each is compared with each; more are sorted into about 4 * sqrt(n) lists
    by the nearest of as many centres, and each text is compared with those in the 32 nearest lists.

    Memory: the texts, their embeddings twice, and the ``limit`` best pairs.

    Args:
        records: such as a :class:`~st_kdmcse.search.records.RecordFile`.
        model: any sentence-transformers model.
        threshold: above 0, at most 1.
        limit: keep that many pairs, the best.
        exact_up_to: distinct texts up to which all pairs are compared.
        show_progress_bar: None shows one in a terminal, after two seconds.
        precision: that texts are encoded in; "auto" is bfloat16 where that is faster, which moves a cosine by up to
            about 0.002.

    Raises:
        ValueError: for a threshold or limit out of range, no record, or an embedding that is not finite or zero.
        ImportError: without faiss.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold is {threshold}, expected a cosine above 0 and up to 1")
    if limit < 1:
        raise ValueError(f"the limit is {limit} pairs, expected at least 1")
    load_faiss()
    ids: list[str] = []
    first: dict[str, int] = {}
    copies: list[tuple[int, str]] = []
    for record in records:
        row = first.setdefault(record.text, len(ids))
        if row < len(ids):
            copies.append((row, record.id))
        else:
            ids.append(record.id)
    texts = list(first)
    del first
    vectors = encode_distinct(model, texts, show_progress_bar=show_progress_bar, precision=precision).matrix
    _normalise(vectors, texts)
    exact = len(texts) <= exact_up_to
    best = _BestPairs(max(0, limit - len(copies)))
    for left, right, scores in _near_pairs(vectors, threshold, exact, show_progress_bar):
        best.add(left, right, scores)
    pairs = [Duplicate(ids[row], key, 1.0, texts[row], texts[row]) for row, key in copies[:limit]]
    pairs += [
        Duplicate(ids[left], ids[right], score, texts[left], texts[right]) for left, right, score in best.sorted()
    ]
    return Duplicates(len(ids) + len(copies), len(copies), best.found + len(copies), exact, pairs)


class _BestPairs:
    """The best of many pairs, in memory that depends on the limit alone.

    Args:
        limit: how many to keep.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[npt.NDArray[Any]] = []
        self._count = 0
        self.found = 0

    def add(self, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]) -> None:
        """Add pairs of rows with their scores."""
        kept = np.empty(len(left), dtype=[("score", np.float32), ("left", np.int64), ("right", np.int64)])
        kept["score"], kept["left"], kept["right"] = -scores, left, right
        self._kept.append(kept)
        self._count += len(kept)
        self.found += len(kept)
        if self._count > 2 * self._limit:
            self._shrink()

    def sorted(self) -> Iterator[tuple[int, int, float]]:
        """The pairs with their scores, best first, then in the order of the rows."""
        self._shrink()
        for score, left, right in (pair for kept in self._kept for pair in kept.tolist()):
            yield left, right, -score

    def _shrink(self) -> None:
        if self._kept:
            self._kept = [np.sort(np.concatenate(self._kept))[: self._limit]]
            self._count = len(self._kept[0])


def _near_pairs(
    vectors: Matrix, threshold: float, exact: bool, show_progress_bar: bool | None
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Rows left < right with a score of at least the threshold, of some left rows at a time."""
    faiss = load_faiss()
    count, dim = vectors.shape
    lists = 1 if exact else 4 * math.isqrt(count)
    index = faiss.index_factory(dim, "Flat" if exact else f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    if not exact:
        drawn = np.random.default_rng(0).permutation(count)[: _TRAINING_ROWS_PER_LIST * lists]
        index.train(vectors[np.sort(drawn)])
        index.nprobe = _LISTS_SEARCHED
    index.add(vectors)
    rows = max(1 if exact else _BLOCK_ROWS, _BLOCK_SCORES // count)
    with progress_bar(count, "Comparing", "text", show_progress_bar) as progress:
        for start in range(0, count, rows):
            block = vectors[start : start + rows]
            limits, scores, right = index.range_search(block, threshold - _ROUNDING)
            left = np.repeat(np.arange(start, start + len(block)), np.diff(limits).astype(np.int64))
            once = left < right
            yield left[once], right[once], np.minimum(scores[once], 1)
            progress.update(len(block))


def _normalise(vectors: Matrix, texts: list[str]) -> None:
    """Give the rows length 1, in their place."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    if not lengths.all():
        text = texts[int(np.argmin(lengths))]
        raise ValueError(f"the embedding of {text[:60]!r} is zero, so it has no direction: use another model")
    vectors /= lengths[:, None]
