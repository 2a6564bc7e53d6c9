"""Ids, texts and metadata of an index in SQLite, by the position that a row has in the vectors."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from st_kdmcse.search.base import Filter, Metadata, conditions

Positions = npt.NDArray[np.int64]

_SCHEMA = """CREATE TABLE IF NOT EXISTS "rows" (
    position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, text TEXT NOT NULL, metadata TEXT NOT NULL)"""
_AMONG = "(SELECT value FROM json_each(?))"
_PARAMETERS = 500
_OPERATORS = {"eq": "=", "ne": "!=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


class RowTable:
    """Rows in a SQLite database; a file of a saved index is never written to.

    A table that was opened from a file turns, with its first change, into a temporary copy (in memory while small, then
    in a file that vanishes with the process), which :meth:`write` saves. Calls from several threads take turns.

    Args:
        database: an open database.
        read_only: whether the first change needs a copy.
        rows: how many there are, if that is known; counting reads the whole file.
    """

    def __init__(self, database: sqlite3.Connection, read_only: bool = False, rows: int | None = None) -> None:
        self._database = database
        self._read_only = read_only
        self._lock = threading.RLock()
        if not read_only:
            database.execute(_SCHEMA)
        last = int(database.execute('SELECT COALESCE(MAX(position), -1) FROM "rows"').fetchone()[0])
        if rows is None or last < rows - 1:
            rows = int(database.execute('SELECT COUNT(*) FROM "rows"').fetchone()[0])
        self._count = rows

    @classmethod
    def temporary(cls) -> RowTable:
        """An empty table that lasts as long as the process."""
        # An empty name is SQLite's temporary database: in its cache while small, then in a file that is deleted.
        return cls(_connect(""))

    @classmethod
    def create(cls, path: Path) -> RowTable:
        """The table in a file, made if it is missing; every transaction is on disk when it ends."""
        return cls(_connect(path.resolve().as_uri()))

    @classmethod
    def open(cls, path: Path, rows: int | None = None) -> RowTable:
        """The table of a saved index.

        Args:
            path: its file.
            rows: how many there are, if that is known.

        Raises:
            ValueError: if the file is not such a table.
        """
        try:
            return cls(_connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1"), read_only=True, rows=rows)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is not the table of an index: {error}") from error

    def __len__(self) -> int:
        """Number of rows."""
        return self._count

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Changes that happen together or, if the block raises, not at all."""
        with self._lock:
            if self._read_only:
                copy = _connect("")
                self._database.backup(copy)
                self._database.close()
                self._database, self._read_only = copy, False
            self._database.execute("BEGIN")
            before = self._count
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # SQLite has ended it already where a disk is full
                    self._database.execute("ROLLBACK")
                self._count = before
                raise

    def insert(
        self, positions: Iterable[int], ids: Sequence[str], texts: Sequence[str], metadata: Sequence[Metadata]
    ) -> None:
        """Add rows, inside of a :meth:`transaction`.

        Args:
            positions: n positions that are free.
            ids: n ids.
            texts: n texts.
            metadata: n mappings of plain values.

        Raises:
            ValueError: if an id is there already; names it.
        """
        contents = (json.dumps(dict(each), ensure_ascii=False) for each in metadata)
        positions = [int(position) for position in positions]
        rows = zip(positions, ids, texts, contents, strict=True)
        try:
            self._database.executemany('INSERT INTO "rows" VALUES (?, ?, ?, ?)', rows)
        except sqlite3.IntegrityError as error:
            known = self.known(ids)  # the first ones of these rows as well, which are where they belong
            taken = (
                each for each, position in zip(ids, positions, strict=True) if known.get(each, position) != position
            )
            raise ValueError(
                f"the id {next(taken, ids[0])!r} is there already: ids name one row each; update it, or remove it first"
            ) from error
        self._count += len(ids)

    def delete(self, ids: Iterable[str]) -> None:
        """Remove rows, inside of a :meth:`transaction`; ids that are not there are passed over."""
        cursor = self._database.execute(f'DELETE FROM "rows" WHERE id IN {_AMONG}', (_json(ids),))
        self._count -= cursor.rowcount

    def renumber(self, positions: Positions) -> None:
        """Give the rows, in the order of these positions (all of them, ascending), the positions 0, 1, 2, ...

        Inside of a :meth:`transaction`.
        """
        moves = ((new, int(old)) for new, old in enumerate(positions) if new != old)
        self._database.executemany('UPDATE "rows" SET position = ? WHERE position = ?', moves)

    def move(self, positions: Mapping[int, int]) -> None:
        """Have rows change places, inside of a :meth:`transaction`.

        Args:
            positions: new positions by old ones; the same ones, in another order.
        """
        away = (({"old": old, "new": -1 - new}) for old, new in positions.items())
        self._database.executemany('UPDATE "rows" SET position = :new WHERE position = :old', away)
        self._database.execute('UPDATE "rows" SET position = -1 - position WHERE position < 0')

    def known(self, ids: Iterable[str]) -> dict[str, int]:
        """Positions of those ids that are there."""
        with self._lock:
            found = self._database.execute(f'SELECT id, position FROM "rows" WHERE id IN {_AMONG}', (_json(ids),))
            return dict(found.fetchall())

    def positions(self, ids: Sequence[str]) -> Positions:
        """(n,) positions of n ids.

        Raises:
            KeyError: if an id is not there; names it.
        """
        known = self.known(ids)
        missing = [each for each in ids if each not in known]
        if missing:
            raise KeyError(f"there is no row with the id {missing[0]!r}")
        return np.array([known[each] for each in ids], dtype=np.int64)

    def all_positions(self) -> Positions:
        """Positions of all rows, ascending."""
        return self._positions('SELECT position FROM "rows" ORDER BY position')

    def rows(self, positions: Iterable[int]) -> dict[int, tuple[str, str, dict[str, Any]]]:
        """Id, text and metadata by position."""
        wanted, found = [int(position) for position in positions], []
        with self._lock:
            for start in range(0, len(wanted), _PARAMETERS):
                some = wanted[start : start + _PARAMETERS]  # twice as fast as a list in JSON
                query = f'SELECT position, id, text, metadata FROM "rows" WHERE position IN (?{",?" * (len(some) - 1)})'
                found += self._database.execute(query, some).fetchall()
        nothing = json.dumps({})  # is most often there, and need not be read
        return {
            position: (key, text, {} if metadata == nothing else json.loads(metadata))
            for position, key, text, metadata in found
        }

    def after(self, key: str, count: int) -> list[tuple[int, str, str, dict[str, Any]]]:
        """Position, id, text and metadata of the next rows after an id, ordered by id; at most so many."""
        query = 'SELECT position, id, text, metadata FROM "rows" WHERE id > ? ORDER BY id LIMIT ?'
        with self._lock:
            found = self._database.execute(query, (key, count)).fetchall()
        return [(position, key, text, json.loads(metadata)) for position, key, text, metadata in found]

    def last_id(self) -> str:
        """The greatest id; "" without rows."""
        with self._lock:
            return str(self._database.execute("SELECT COALESCE(MAX(id), '') FROM \"rows\"").fetchone()[0])

    def matching(self, where: Filter) -> Positions:
        """Positions of the rows that a filter lets through, ascending.

        Raises:
            ValueError: for a filter that is not one.
        """
        clauses, values = ["1"], []
        for name, comparison, wanted in conditions(where):
            clause, parameters = _clause(comparison, wanted)
            clauses.append(
                f"EXISTS (SELECT 1 FROM json_each(metadata) WHERE key = ? AND type != 'null' AND ({clause}))"
            )
            values += [name, *parameters]
        return self._positions(f'SELECT position FROM "rows" WHERE {" AND ".join(clauses)} ORDER BY position', values)

    def write(self, path: Path) -> None:
        """Write everything into a new file."""
        target = sqlite3.connect(path)
        try:
            target.execute("PRAGMA synchronous = OFF")  # who saves an index calls fsync once, at the end
            with self._lock:
                self._database.backup(target)
        finally:
            target.close()

    def close(self) -> None:
        """Let go of the database."""
        with self._lock:
            self._database.close()

    def _positions(self, query: str, values: Sequence[Any] = ()) -> Positions:
        with self._lock:
            return np.fromiter((row[0] for row in self._database.execute(query, values)), dtype=np.int64)


def _connect(name: str) -> sqlite3.Connection:
    database = sqlite3.connect(name, uri=True, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA cache_size = -65536")
    return database


def _json(values: Iterable[Any]) -> str:
    return json.dumps(list(values), ensure_ascii=False)


def _clause(comparison: str, wanted: Any) -> tuple[str, list[Any]]:
    """A comparison with a row of json_each. Numbers, texts and truth values are never equal, and have no order."""
    if comparison == "in":
        of_kind: dict[str, list[Any]] = {}
        for value in wanted:
            of_kind.setdefault(_kinds(value), []).append(value)
        clauses = [f"type IN {kinds} AND value IN {_AMONG}" for kinds in of_kind]
        return " OR ".join(clauses) or "0", [_json(values) for values in of_kind.values()]
    kinds = _kinds(wanted)
    if comparison == "ne":
        return f"type NOT IN {kinds} OR value != ?", [wanted]
    return f"type IN {kinds} AND value {_OPERATORS[comparison]} ?", [wanted]


def _kinds(value: Any) -> str:
    """What json_each calls values that may equal this one."""
    if isinstance(value, bool):
        return "('true', 'false')"
    return "('text')" if isinstance(value, str) else "('integer', 'real')"
