"""Files of records to be indexed, and of results: text, CSV, TSV, JSON, parquet, a row at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from st_kdmcse.data.characters import control_character
from st_kdmcse.data.lines import named_errors
from st_kdmcse.data.seen import Seen
from st_kdmcse.data.tables import (
    ColumnKind,
    OnBytes,
    Row,
    columns_of,
    file_format,
    is_plain,
    listed,
    rows_of,
    shown,
    unit_of,
)
from st_kdmcse.files import byte_progress, sha256_file
from st_kdmcse.search.base import MAX_ID_LENGTH

OnEmpty = Literal["skip", "raise"]


_TEXT_COLUMNS = ("text", "sentence", "caption")

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?")
_TRUTH = re.compile(r"true|false", re.IGNORECASE)
_Reader = tuple[re.Pattern[str], Callable[[str], Any]]
_READERS: tuple[_Reader, ...] = (
    (_INTEGER, int),
    (_NUMBER, float),
    (_TRUTH, lambda value: value.lower() == "true"),
)


@dataclass(frozen=True)
class TextRecord:
    """A text to be indexed.

    Attributes:
        id: names the record; 1 to 512 characters.
        text: not blank.
        metadata: names and plain values.
    """

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


class RecordFile:
    """The records of a file, read again by each iteration, in memory that does not grow with the file.

    ===================== ================================================== ==========================
    name                  content                                            id without an id column
    ===================== ================================================== ==========================
    ``.jsonl, .ndjson``   a JSON object a line                               number of the line, from 1
    ``.json``             a list of JSON objects                             number of the row, from 0
    ``.csv``              commas and a header; quotes where they are needed  number of the row, from 0
    ``.tsv``              tabs and a header; quotes are part of the text     number of the row, from 0
    ``.parquet``          a table                                            number of the row, from 0
    anything else         a text a line                                      number of the line, from 1
    ===================== ================================================== ==========================

    All but parquet are UTF-8, and may be compressed (``.csv.gz``). A text is kept as it is apart from surrounding
    whitespace, however long it is. Metadata of CSV and TSV are numbers or truth values where all values of the column
    are, which takes a pass over the file; dates of a parquet file are texts in ISO 8601. Missing values are None.

    Args:
        path: the file.
        text_column: which column holds the texts; None takes ``text``, ``sentence`` or ``caption`` (in any case), or
            the only column of texts.
        id_column: which column holds the ids, texts or whole numbers; None numbers the records, see above.
        metadata: names of columns to keep; None keeps all others that hold plain values, an empty list none.
        on_empty: "skip" leaves out rows without text and counts them in :attr:`skipped`, "raise" refuses them.

    Attributes:
        path: the file.
        text_column: the column of the texts; "text" for a file of a text a line.
        skipped: how many rows the last whole pass left out, because they had no text.
        first_skipped: file and line, or row, of the first of them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, or has no such column, or no obvious one of texts. While it is read, naming the
            line or row: for what is not UTF-8, not JSON, has another number of columns than the header, has no text
            (with "raise"), no id, or the id of an earlier row.

    Example:
        ::

            file = RecordFile("articles.csv", text_column="title", id_column="number", metadata=["year"])
            for record in file:
                print(record.id, record.text, record.metadata["year"])
    """

    def __init__(
        self,
        path: str | Path,
        *,
        text_column: str | None = None,
        id_column: str | None = None,
        metadata: Sequence[str] | None = None,
        on_empty: OnEmpty = "skip",
    ) -> None:
        self.path = Path(path)
        self.skipped = 0
        self.first_skipped = ""
        self._on_empty = on_empty
        self._id_column = id_column
        self._wanted = None if metadata is None else tuple(metadata)
        self._format = file_format(self.path)
        self._unit = unit_of(self._format)
        self._metadata: tuple[str, ...] = ()
        if self._format == "text":
            self.text_column = self._without_columns(text_column)
        else:
            columns = columns_of(self.path, self._format)
            self.text_column = self._choose_text(columns, text_column)
            self._metadata = self._choose_metadata(columns)

    @cached_property
    def num_rows(self) -> int | None:
        """Rows, with or without text; None if only a pass over the file can tell."""
        if self._format != "parquet":
            return None
        with named_errors(self.path):
            return int(pq.read_metadata(self.path).num_rows)

    def __call__(self) -> Iterator[TextRecord]:
        """The records from the beginning; what :func:`~st_kdmcse.search.build.build_index` wants."""
        return iter(self)

    def __iter__(self) -> Iterator[TextRecord]:
        return self._records(lambda _: None)

    def check(self, show_progress_bar: bool | None = None) -> int:
        """Read the whole file, so that what is wrong in it shows now and not after hours of encoding.

        Args:
            show_progress_bar: None shows one in a terminal if it takes more than two seconds.

        Returns:
            The number of records.

        Raises:
            ValueError: as the class says.
        """
        with byte_progress(self.path.stat().st_size, f"Checking {self.path.name}", show_progress_bar) as progress:
            return sum(1 for _ in self._records(progress.update))

    def identity(self, show_progress_bar: bool | None = None) -> dict[str, str]:
        """What the records depend on: name, size and SHA-256 of the file, and the options.

        Args:
            show_progress_bar: None shows one in a terminal if it takes more than two seconds.
        """
        size = self.path.stat().st_size
        with byte_progress(size, f"Checksum of {self.path.name}", show_progress_bar) as progress:
            checksum = sha256_file(self.path, progress.update)
        options = [self._format, self.text_column, self._id_column, self._wanted]
        return {"file": self.path.name, "bytes": str(size), "sha256": checksum, "options": json.dumps(options)}

    def _records(self, on_bytes: OnBytes) -> Iterator[TextRecord]:
        rows = skipped = 0
        first_skipped = ""
        with Seen() as seen:
            for row in self._rows(on_bytes):
                rows += 1
                text = self._text(row)
                if not text:
                    skipped += 1
                    first_skipped = first_skipped or self._where(row)
                    continue
                key = str(row.number) if self._id_column is None else self._id(row)
                if self._id_column is not None and not seen.add(key):
                    raise self._duplicate(key, row)
                yield TextRecord(key, text, self._plain_metadata(row))
        if rows == skipped:
            raise ValueError(f"{self.path} has no text: it is empty, or all its {self._unit}s are")
        self.skipped, self.first_skipped = skipped, first_skipped

    def _where(self, row: Row) -> str:
        return f"{self.path}, {self._unit} {row.place}"

    def _text(self, row: Row) -> str:
        value = row.values.get(self.text_column)
        if not isinstance(value, str | None):
            raise ValueError(
                f"{self._where(row)}: {self.text_column!r} is {shown(value)}, no text: correct it, or choose another "
                "text column"
            )
        text = (value or "").strip()
        if not text and self._on_empty == "raise":
            raise ValueError(f"{self._where(row)}: there is no text: fill it in, or skip such rows")
        return text

    def _id(self, row: Row) -> str:
        value = row.values.get(str(self._id_column))
        if isinstance(value, float) and value.is_integer():  # whole numbers of a column with gaps, in pandas
            value = int(value)
        if not isinstance(value, str | int) or isinstance(value, bool) or not 0 < len(str(value)) <= MAX_ID_LENGTH:
            raise ValueError(
                f"{self._where(row)}: the id {shown(value)} in {self._id_column!r} is neither a text of 1 to "
                f"{MAX_ID_LENGTH} characters nor a whole number: correct it, or choose another id column"
            )
        if found := control_character(value):
            raise ValueError(
                f"{self._where(row)}: the id {shown(value)} in {self._id_column!r} holds the control character "
                f"{found}: remove it"
            )
        return str(value)

    def _duplicate(self, key: str, row: Row) -> ValueError:
        first = next((each for each in self._rows() if self._text(each) and self._id(each) == key), row)
        return ValueError(
            f"{self._where(row)}: the id {key!r} is that of {self._unit} {first.place} too: give each row its own, or "
            "choose another id column"
        )

    def _plain_metadata(self, row: Row) -> dict[str, Any]:
        if self._format in ("csv", "tsv"):
            self._check_characters(row, {name: row.values[name] for name in self._metadata})
            return {name: read(row.values[name]) if row.values[name] else None for name, read in self._readers.items()}
        found = {name: row.values[name] for name in self._metadata if name in row.values}
        if self._format.startswith("json") and self._wanted is None:  # each line may have other names
            used = (self.text_column, self._id_column, "")
            found = {name: value for name, value in row.values.items() if name not in used and is_plain(value)}
        self._check_characters(row, found)
        for name, value in found.items():
            if not is_plain(value) or (isinstance(value, float) and math.isinf(value)):
                raise ValueError(
                    f"{self._where(row)}: {name!r} is {shown(value)}, no text, number or truth value: leave it out of "
                    "the metadata"
                )
            if isinstance(value, float) and math.isnan(value):  # a missing value, in pandas
                found[name] = None
        return found

    def _check_characters(self, row: Row, metadata: Mapping[str, Any]) -> None:
        for name, value in metadata.items():
            if found := control_character(name) or control_character(value):
                raise ValueError(
                    f"{self._where(row)}: {name!r} is {shown(value)}, with the control character {found}: leave it out"
                )

    @cached_property
    def _readers(self) -> dict[str, Callable[[str], Any]]:
        """How to read each column of metadata of a text table: as the first kind that fits all its values."""
        kinds: dict[str, tuple[_Reader, ...]] = dict.fromkeys(self._metadata, _READERS)
        if kinds:
            with byte_progress(self.path.stat().st_size, f"Columns of {self.path.name}") as progress:
                for row in self._rows(progress.update):
                    for name, left in kinds.items():
                        if left and (value := row.values[name]):
                            kinds[name] = tuple(kind for kind in left if kind[0].fullmatch(value))
        return {name: left[0][1] if left else str for name, left in kinds.items()}

    def _rows(self, on_bytes: OnBytes = lambda _: None) -> Iterator[Row]:
        names = {self.text_column, *self._metadata, *([self._id_column] if self._id_column is not None else [])}
        return rows_of(self.path, self._format, sorted(names), on_bytes)

    def _without_columns(self, text_column: str | None) -> str:
        given = {"text column": text_column, "id column": self._id_column, "metadata": self._wanted or None}
        unused = [what for what, value in given.items() if value is not None]
        if unused:
            raise ValueError(
                f"{self.path} is read as a text a line and has no columns: leave out {' and '.join(unused)}, or name "
                "the file .csv, .tsv, .jsonl, .json or .parquet if it is that"
            )
        return "text"

    def _choose_text(self, columns: Mapping[str, ColumnKind], wanted: str | None) -> str:
        texts = [name for name, kind in columns.items() if kind == "text"]
        if wanted is None:
            common = [name for known in _TEXT_COLUMNS for name in texts if name.lower() == known]
            others = [name for name in texts if name != self._id_column]
            if not common and len(others) != 1:
                raise ValueError(
                    f"{self.path}: which column holds the texts is not clear; choose a text column of "
                    f"{listed(texts or columns)}"
                )
            wanted = (common or others)[0]
        if wanted not in columns:
            raise ValueError(f"{self.path}: no column {wanted!r}; choose a text column of {listed(texts or columns)}")
        if columns[wanted] != "text":
            raise ValueError(f"{self.path}: {wanted!r} holds no texts; choose a text column of {listed(texts)}")
        if self._id_column is not None and self._id_column not in columns:
            raise ValueError(f"{self.path}: no column {self._id_column!r}; choose an id column of {listed(columns)}")
        return wanted

    def _choose_metadata(self, columns: Mapping[str, ColumnKind]) -> tuple[str, ...]:
        if self._wanted is None:
            used = (self.text_column, self._id_column, "")
            return tuple(name for name, kind in columns.items() if kind != "other" and name not in used)
        for name in self._wanted:
            if name not in columns:
                raise ValueError(f"{self.path}: no column {name!r} for the metadata; choose of {listed(columns)}")
            if columns[name] == "other":
                raise ValueError(
                    f"{self.path}: {name!r} holds no texts, numbers or truth values: leave it out of the metadata"
                )
        return self._wanted
