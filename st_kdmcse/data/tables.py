"""Rows of a table in each of its formats: text, CSV, TSV, JSON lines and Parquet, one at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from st_kdmcse.data.lines import named_errors, read_lines
from st_kdmcse.files import is_parquet

OnBytes = Callable[[int], object]
ColumnKind = Literal["text", "plain", "other"]
_JSON_ROWS_FOR_COLUMNS = 100
_FIELD_CHARACTERS = 1 << 24
_PARQUET_ROWS = 1 << 12
_BUFFER_BYTES = 1 << 20


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        place: the line, or the row of a Parquet file, for messages.
        number: the id, where no column holds one.
        values: by column.
    """

    place: int
    number: int
    values: Mapping[str, Any]


def file_format(path: Path) -> str:
    """The format of a table: "parquet" by its content; "csv", "tsv", "json" or "text" by its name."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: give a file of texts (.txt, .csv, .tsv, .jsonl, .parquet)")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: give a file with a text a line, or a table")
    if is_parquet(path):
        return "parquet"
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix == ".json":
        raise ValueError(f"{path}: write it as JSON lines, one object a line, and name it .jsonl")
    return {".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".ndjson": "json"}.get(suffix, "text")


def columns_of(path: Path, file_format: str) -> dict[str, ColumnKind]:
    """The columns of a table and what they hold; of JSON lines, those of the first 100."""
    if file_format == "parquet":
        with named_errors(path):
            return {each.name: _parquet_kind(each.type) for each in pq.read_schema(path)}
    if file_format == "json":
        columns: dict[str, ColumnKind] = {}
        for row in islice(_json_rows(path, lambda _: None), _JSON_ROWS_FOR_COLUMNS):
            for name, value in row.values.items():
                if columns.get(name, "plain") == "plain":
                    columns[name] = "text" if isinstance(value, str) else "plain" if is_plain(value) else "other"
        return columns
    line, header = next(_fields(path, file_format, lambda _: None), (1, []))
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}, line {line}: the header has {twice!r} twice: give each column its own name")
    return dict.fromkeys(header, "text")


def rows_of(path: Path, file_format: str, names: list[str], on_bytes: OnBytes) -> Iterator[Row]:
    """The rows; those of a parquet file with the named columns, others with all."""
    if file_format == "parquet":
        return _parquet_rows(path, names, on_bytes)
    if file_format == "json":
        return _json_rows(path, on_bytes)
    if file_format == "text":
        return (Row(line, line, {"text": text}) for line, text in enumerate(read_lines(path, on_bytes), start=1))
    return _table_rows(path, file_format, on_bytes)


def _json_rows(path: Path, on_bytes: OnBytes) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path, on_bytes), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if "\\u" in line:
                json.dumps(values, ensure_ascii=False).encode()
        except UnicodeError as error:
            raise ValueError(f"{path}, line {number}: half of a surrogate pair ({error}): correct it") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no valid JSON ({error}): write one object a line") from error
        if not isinstance(values, dict):
            raise ValueError(f'{path}, line {number}: {shown(values)} is no JSON object: write {{"text": ...}}')
        yield Row(number, number, values)


def _table_rows(path: Path, file_format: str, on_bytes: OnBytes) -> Iterator[Row]:
    fields = _fields(path, file_format, on_bytes)
    _, header = next(fields)
    for number, (line, values) in enumerate(fields):
        if len(values) != len(header):
            separator, remedy = ("tabs", "") if file_format == "tsv" else ("commas", "put texts in quotes, ")
            raise ValueError(
                f"{path}, line {line}: {len(values)} columns separated by {separator}, expected {len(header)} as in "
                f"the header: {remedy}correct the row, or leave it out"
            )
        yield Row(line, number, dict(zip(header, values, strict=True)))


def _fields(path: Path, file_format: str, on_bytes: OnBytes) -> Iterator[tuple[int, list[str]]]:
    """First line and fields of each row that is not blank; the first one is the header."""
    lines = read_lines(path, on_bytes)
    if file_format == "tsv":
        for number, text in enumerate(lines, start=1):
            if text.strip():
                yield number, text.rstrip("\r\n").split("\t")
        return
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_CHARACTERS))  # the default is 131,072
    reader = csv.reader(lines, strict=True)
    line = 1
    try:
        for values in reader:
            if values:
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f'{path}, line {line}: {error}: a quote (") is opened there and not closed, or goes on after its end; '
            "double the quotes inside of a text"
        ) from error


def _parquet_rows(path: Path, names: list[str], on_bytes: OnBytes) -> Iterator[Row]:
    # With a buffer, and not ahead of time: else a whole row group is in memory.
    with named_errors(path), pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        size, rows, number, reported = path.stat().st_size, file.metadata.num_rows, 0, 0
        for batch in file.iter_batches(_PARQUET_ROWS, columns=names):
            columns = [_values(path, batch.column(name), name, number) for name in names]
            for values in zip(*columns, strict=True):
                yield Row(number, number, dict(zip(names, values, strict=True)))
                number += 1
            on_bytes(size * number // rows - reported)
            reported = size * number // rows


def _values(path: Path, column: pa.Array, name: str, start: int) -> Iterable[Any]:
    """The values of a column; dates and decimals as plain values."""
    values: list[Any] = []
    for row, value in enumerate(column, start=start):
        try:
            values.append(value.as_py())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, row {row}, column {name!r}: not UTF-8 ({error.reason}): write it again"
            ) from error
    return (
        map(_from_parquet, values) if pa.types.is_temporal(column.type) or pa.types.is_decimal(column.type) else values
    )


def _parquet_kind(kind: pa.DataType) -> ColumnKind:
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    plain = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal, types.is_null)
    date_or_time = (types.is_date, types.is_timestamp, types.is_time)
    return "plain" if any(test(kind) for test in (*plain, *date_or_time)) else "other"


def _from_parquet(value: Any) -> Any:
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    return float(value) if isinstance(value, Decimal) else value


def is_plain(value: Any) -> bool:
    """Whether metadata may hold a value."""
    return isinstance(value, str | int | float | bool | None)


def shown(value: Any) -> str:
    """A value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def listed(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(map(repr, names)) or "none"
