"""Which values came before, in memory that does not grow with their number."""

from __future__ import annotations

import hashlib
import sqlite3
from types import TracebackType


class Seen:
    """A set of strings on disk: it knows a string again by a 128-bit hash.

    A context manager; the set lives in a temporary file that vanishes with it.
    """

    def __init__(self) -> None:
        # An empty name is SQLite's temporary database: in its cache while small, then in a file that is deleted.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("PRAGMA cache_size = -32768")
        self._database.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def __enter__(self) -> Seen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, value: str) -> bool:
        """Remember a string; True if it is new."""
        # A file that is not UTF-8 can leave surrogates in a name.
        digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        cursor = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,))
        return cursor.rowcount == 1

    def close(self) -> None:
        """Forget everything."""
        self._database.close()
