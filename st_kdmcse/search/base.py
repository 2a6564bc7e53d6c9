"""What every search engine offers: rows with an embedding, a text and metadata; search by cosine, with filters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from st_kdmcse.data.characters import control_character

Matrix = npt.NDArray[np.float32]

Metadata = Mapping[str, str | int | float | bool | None]
"""What is known about a row: names and plain values, for filters and for display."""

Filter = Mapping[str, Any]
"""Which rows a search may return, by metadata; all conditions must hold:

- ``{"lang": "en"}``: equal;
- ``{"lang": ["en", "de"]}``: one of them;
- ``{"year": {"gte": 2000, "lt": 2010}}``: comparisons, of eq, ne, gt, gte, lt and lte.

A row without the name fulfils none of them, ``ne`` included.
"""

COMPARISONS = ("eq", "ne", "gt", "gte", "lt", "lte")
MAX_ID_LENGTH = 512
"""Characters of an id."""


@dataclass(frozen=True)
class Hit:
    """A search result.

    Attributes:
        id: of the row.
        text: of the row.
        score: cosine with the query, in [-1, 1].
        metadata: of the row.
    """

    id: str
    text: str
    score: float
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NewRows:
    """Rows to be stored.

    Attributes:
        ids: n distinct ids, 1 to 512 characters.
        texts: n texts.
        embeddings: (n, dimension) float32 of length 1.
        metadata: n mappings of plain values.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    embeddings: Matrix
    metadata: Sequence[Metadata]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ids)

    def __getitem__(self, rows: slice) -> NewRows:
        """Some of the rows."""
        return NewRows(self.ids[rows], self.texts[rows], self.embeddings[rows], self.metadata[rows])

    def taken(self, rows: Sequence[int]) -> NewRows:
        """The rows with these numbers."""
        pick = lambda values: [values[row] for row in rows]  # noqa: E731
        return NewRows(pick(self.ids), pick(self.texts), self.embeddings[list(rows)], pick(self.metadata))

    @classmethod
    def checked(
        cls,
        ids: Sequence[str],
        texts: Sequence[str],
        embeddings: npt.ArrayLike,
        metadata: Sequence[Metadata] | None = None,
    ) -> NewRows:
        """Rows whose parts fit together.

        Args:
            ids: n ids.
            texts: n texts.
            embeddings: (n, dimension), normalised here.
            metadata: n mappings; None for none.

        Raises:
            ValueError: for lengths that differ, ids that are empty, too long or there twice, control characters in ids
                or metadata, embeddings that are not finite or zero, or metadata that are not plain; names the row.
        """
        matrix = np.asarray(embeddings, dtype=np.float32)
        metadata = [{} for _ in ids] if metadata is None else metadata
        if matrix.ndim != 2 or not len(ids) == len(texts) == len(matrix) == len(metadata):
            raise ValueError(
                f"{len(ids)} ids, {len(texts)} texts, embeddings of shape {matrix.shape} and {len(metadata)} metadata: "
                "expected one of each a row"
            )
        seen: set[str] = set()
        for row, key in enumerate(ids):
            if not isinstance(key, str) or not 0 < len(key) <= MAX_ID_LENGTH:
                raise ValueError(f"row {row}: the id {key!r} is not a text of 1 to {MAX_ID_LENGTH} characters")
            if found := control_character(key):
                raise ValueError(f"row {row}: the id {key!r} holds the control character {found}: leave it out")
            if key in seen:
                raise ValueError(f"row {row}: the id {key!r} is there twice; ids name one row each")
            seen.add(key)
            _check_metadata(metadata[row], f"row {row} (id {key!r})")
        return cls(list(ids), list(texts), unit_rows(matrix, lambda row: f"row {row} (id {ids[row]!r})"), metadata)


class SearchBackend(Protocol):
    """A place where rows are kept and found."""

    @property
    def dim(self) -> int:
        """Width of the embeddings."""

    def __len__(self) -> int:
        """Number of rows."""

    def add(self, rows: NewRows) -> None:
        """Store new rows; all or none.

        Raises:
            ValueError: if an id is there already, or the width does not fit; names the id.
        """

    def replace(self, rows: NewRows) -> None:
        """Store rows in the place of those with the same ids.

        Raises:
            KeyError: if an id is not there; nothing is changed.
        """

    def remove(self, ids: Sequence[str]) -> None:
        """Remove rows.

        Raises:
            KeyError: if an id is not there; nothing is changed.
        """

    def get(self, ids: Sequence[str]) -> list[Hit]:
        """Rows by id, with score 1.

        Raises:
            KeyError: if an id is not there.
        """

    def all_rows(self, after: str = "") -> Iterator[NewRows]:
        """All rows with their embeddings, some at a time, ordered by the code points of their ids.

        Args:
            after: only those whose ids come after this one.

        Raises:
            ValueError: if the embeddings are not kept as they were.
        """

    def search(self, queries: Matrix, k: int, where: Filter | None = None) -> list[list[Hit]]:
        """The k nearest rows of each query, best first; fewer where there are fewer.

        Args:
            queries: (n, dim) float32 of length 1.
            k: at least 1.
            where: which rows may be returned.
        """

    def info(self) -> dict[str, Any]:
        """What it is, for people and JSON: engine, index type, rows, dim, bytes."""


def unit_rows(matrix: npt.ArrayLike, name: Any = lambda row: f"row {row}") -> Matrix:
    """Rows of length 1.

    Args:
        matrix: (n, dimension).
        name: describes a row by its number, for the error.

    Raises:
        ValueError: if a row is zero or not finite.
    """
    wide = np.asarray(matrix, dtype=np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
    if bad.size:
        raise ValueError(f"{name(int(bad[0]))}: the embedding is zero or not finite, so it has no direction")
    return np.ascontiguousarray(wide / lengths, dtype=np.float32)


def conditions(where: Filter) -> list[tuple[str, str, Any]]:
    """The conditions of a filter as (name, comparison, value); "in" has a list of values.

    Raises:
        ValueError: for an unknown comparison or a value that is not plain.
    """
    found: list[tuple[str, str, Any]] = []
    for name, wanted in where.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"a filter has names of metadata as keys, got {name!r}")
        if isinstance(wanted, Mapping):
            unknown = [each for each in wanted if each not in COMPARISONS]
            if unknown or not wanted:
                raise ValueError(f"filter on {name!r}: unknown comparison {unknown}: choose from {COMPARISONS}")
            found += [(name, comparison, _plain(name, value)) for comparison, value in wanted.items()]
        elif isinstance(wanted, list | tuple):
            found.append((name, "in", [_plain(name, value) for value in wanted]))
        else:
            found.append((name, "eq", _plain(name, wanted)))
    return found


def _plain(name: str, value: Any) -> str | int | float | bool:
    if not isinstance(value, str | int | float | bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"filter on {name!r}: {value!r} is not a text, a number or a truth value")
    return value


def _check_metadata(metadata: Metadata, where: str) -> None:
    if not isinstance(metadata, Mapping):
        raise ValueError(f"{where}: the metadata are {metadata!r}, expected names and values, or {{}}")
    for name, value in metadata.items():
        if not isinstance(name, str) or not isinstance(value, str | int | float | bool | None):
            raise ValueError(f"{where}: metadata {name!r}: {value!r} is not a text, a number or a truth value")
        for text in (name, value):
            if found := control_character(text):
                raise ValueError(f"{where}: metadata {name!r}: {text!r} holds the control character {found}")
    try:
        json.dumps(dict(metadata), allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{where}: metadata must not be nan or infinite: {error}") from error
