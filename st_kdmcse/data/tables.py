"""Rows of a table in each of its formats: text, CSV, TSV, JSON and Parquet, one at a time."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from st_kdmcse.data.json_files import json_items, parse_json
from st_kdmcse.data.lines import named_errors, read_lines
from st_kdmcse.files import is_parquet

OnBytes = Callable[[int], object]
FileFormat = Literal["text", "csv", "tsv", "json lines", "json list", "parquet"]
ColumnKind = Literal["text", "plain", "other"]

_BY_NAME: dict[str, FileFormat] = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "json lines", ".ndjson": "json lines",
}  # fmt: skip
_TABLE_NAMES = ".csv, .tsv, .jsonl, .json or .parquet"
_JSON_ROWS_FOR_COLUMNS = 100
_FIELD_CHARACTERS = 1 << 24
_PARQUET_ROWS = 1 << 12
_BUFFER_BYTES = 1 << 20
_LINES_FOR_FORMAT = 20
_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
_COLUMN_NAME = re.compile(r"[^\W\d][\w .-]{0,40}(?<! )")


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        place: the line, the row of a Parquet file, or the position in a JSON list, for messages.
        number: the id, where no column holds one.
        values: by column.
    """

    place: int
    number: int
    values: Mapping[str, Any]


def file_format(path: Path, of_others: FileFormat = "text") -> FileFormat:
    """The format of a table: Parquet by its content, others by their names.

    Args:
        path: the file.
        of_others: the format of files with none of the names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, or its content is not what its name says.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: give a file of texts (.txt, .csv, .tsv, .jsonl, .json, .parquet)")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: give a file with a text a line, or a table")
    if is_parquet(path):
        return "parquet"
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix == ".json":
        return _json_format(path)
    found = _BY_NAME.get(suffix, of_others)
    if found == "text":
        _refuse_table(path)
    return found


def unit_of(file_format: FileFormat) -> str:
    """What the place of a row counts, for messages."""
    return {"parquet": "row", "json list": "item"}.get(file_format, "line")


def columns_of(path: Path, file_format: FileFormat) -> dict[str, ColumnKind]:
    """The columns of a table and what they hold; of JSON, those of the first 100 rows."""
    if file_format == "parquet":
        with named_errors(path):
            return {each.name: _parquet_kind(each.type) for each in pq.read_schema(path)}
    if file_format in ("json lines", "json list"):
        columns: dict[str, ColumnKind] = {}
        for row in islice(rows_of(path, file_format, [], lambda _: None), _JSON_ROWS_FOR_COLUMNS):
            for name, value in row.values.items():
                if columns.get(name, "plain") == "plain":
                    columns[name] = "text" if isinstance(value, str) else "plain" if is_plain(value) else "other"
        return columns
    line, header = next(_fields(path, file_format, lambda _: None), (1, []))
    check_separator(header, file_format, f"{path}, line {line}")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}, line {line}: the header has {twice!r} twice: give each column its own name")
    return dict.fromkeys(header, "text")


def check_separator(
    fields: Sequence[str],
    file_format: FileFormat,
    where: str,
    is_row: Callable[[Sequence[str]], bool] = lambda _: True,
) -> None:
    """Refuse a first row that is one field, with the separators of another format in it.

    Args:
        fields: the row.
        file_format: "csv" or "tsv".
        where: file and line.
        is_row: tells whether the fields between other separators are a row.

    Raises:
        ValueError: naming the separator that the file has.
    """
    other = _separator(fields[0], "," if file_format == "csv" else "\t") if len(fields) == 1 else None
    if other is not None and is_row(fields[0].split(other)):
        remedy = {"\t": "name it .tsv", ",": "name it .csv"}.get(other, "write it with commas (.csv) or tabs (.tsv)")
        expected = "commas" if file_format == "csv" else "tabs"
        raise ValueError(f"{where}: {fields[0][:100]!r} is separated by {_SEPARATORS[other]}, not {expected}: {remedy}")


def texts_of(path: Path, file_format: FileFormat, column: str, on_bytes: OnBytes) -> Iterator[str]:
    """The texts of a column, in order; a missing one is empty.

    Raises:
        ValueError: for a value that is no text; names the file and the row.
    """
    if file_format == "text":
        yield from read_lines(path, on_bytes)
    elif file_format == "parquet":
        for _, (values,) in _parquet_batches(path, [column], on_bytes):
            yield from (value or "" for value in values)
    else:
        for row in rows_of(path, file_format, [column], on_bytes):
            value = row.values.get(column)
            if not isinstance(value, str | None):
                where = f"{path}, {unit_of(file_format)} {row.place}"
                raise ValueError(
                    f"{where}: {column!r} is {shown(value)}, no text: correct it, or choose another column"
                )
            yield value or ""


def rows_of(path: Path, file_format: FileFormat, names: list[str], on_bytes: OnBytes) -> Iterator[Row]:
    """The rows; those of a parquet file with the named columns, others with all."""
    if file_format == "parquet":
        return _parquet_rows(path, names, on_bytes)
    if file_format == "json lines":
        return _json_lines(path, on_bytes)
    if file_format == "json list":
        return _json_list(path, on_bytes)
    if file_format == "text":
        return (Row(line, line, {"text": text}) for line, text in enumerate(read_lines(path, on_bytes), start=1))
    return _table_rows(path, file_format, on_bytes)


def json_object(text: str, where: str) -> dict[str, Any]:
    """The object on a line.

    Raises:
        ValueError: if there is no JSON object, or half of a surrogate pair in it; names the place.
    """
    try:
        values = parse_json(text)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise ValueError(f"{where}: half of a surrogate pair ({error}): correct it") from error
    except ValueError as error:
        raise ValueError(f"{where}: no valid JSON ({error}): write one object a line") from error
    if not isinstance(values, dict):
        raise ValueError(f'{where}: {shown(values)} is no JSON object: write {{"text": ...}}')
    return values


def _json_format(path: Path) -> FileFormat:
    """Whether a .json is a list of objects, or has an object a line."""
    first = next((line for line in read_lines(path, lambda _: None) if line.strip()), "").strip()
    if first.startswith("["):
        return "json list"
    try:
        json_object(first, str(path))
    except ValueError as error:
        raise ValueError(
            f"{path} is neither a JSON list of objects nor JSON lines, one object a line: write it as one of them"
        ) from error
    return "json lines"


def _refuse_table(path: Path) -> None:
    """Refuse a table by the name of a text, whose rows would be taken for sentences."""
    lines: list[str] = []
    with suppress(ValueError):  # what is wrong with a line shows when it is read
        lines += (line for line in islice(read_lines(path, lambda _: None), _LINES_FOR_FORMAT) if line.strip())
    if not lines:
        return
    first, what = lines[0].strip(), None
    if first[0] in "[{":
        with suppress(ValueError):
            what = "JSON" if first in ("[", "{") or isinstance(parse_json(first), dict | list) else None
    separator = _separator(first)
    if what is None and separator is not None and len(lines) > 1:
        with suppress(csv.Error):
            rows = list(csv_reader(lines, separator))
            names = all(_COLUMN_NAME.fullmatch(field) for field in rows[0])
            if (names or (separator == "\t" and len(rows) > 2)) and len(set(map(len, rows))) == 1:
                what = f"a table with columns separated by {_SEPARATORS[separator]} (first {first[:60]!r})"
    if what is not None:
        raise ValueError(f"{path} is read as text, and looks like {what}: name it {_TABLE_NAMES} if it is that")


def _separator(line: str, ignored: str = "") -> str | None:
    return next((each for each in _SEPARATORS if each != ignored and each in line), None)


def _json_lines(path: Path, on_bytes: OnBytes) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path, on_bytes), start=1):
        if line.strip():
            yield Row(number, number, json_object(line, f"{path}, line {number}"))


def _json_list(path: Path, on_bytes: OnBytes) -> Iterator[Row]:
    for number, values in enumerate(json_items(path, "item", on_bytes)):
        where = f"{path}, item {number + 1}"
        if not isinstance(values, dict):
            raise ValueError(f'{where}: {shown(values)} is no JSON object: write {{"text": ...}}')
        yield Row(number + 1, number, values)


def _table_rows(path: Path, file_format: FileFormat, on_bytes: OnBytes) -> Iterator[Row]:
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


def _fields(path: Path, file_format: FileFormat, on_bytes: OnBytes) -> Iterator[tuple[int, list[str]]]:
    """First line and fields of each row that is not blank; the first one is the header."""
    lines = read_lines(path, on_bytes)
    if file_format == "tsv":
        for number, text in enumerate(lines, start=1):
            if text.strip():
                yield number, text.rstrip("\r\n").split("\t")
        return
    reader = csv_reader(lines)
    line = 1
    try:
        for values in reader:
            if values:
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {csv_problem(error)}") from error


def csv_reader(lines: Iterable[str], separator: str = ",") -> Any:
    """A strict reader of CSV, for fields of up to 16 million characters."""
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_CHARACTERS))  # the default is 131,072
    return csv.reader(lines, delimiter=separator, strict=True)


def csv_problem(error: csv.Error) -> str:
    """What is wrong in a row of a CSV file, and the remedy."""
    if "field limit" in str(error):
        return f'a field of more than {csv.field_size_limit():,} characters: is a quote (") opened and not closed?'
    if "end of data" in str(error) or "expected after" in str(error):
        return (
            'a quote (") is opened there and not closed, or goes on after its end; double the quotes inside of a text'
        )
    return f"no row of a CSV file ({error}): correct it"


def _parquet_rows(path: Path, names: list[str], on_bytes: OnBytes) -> Iterator[Row]:
    for start, columns in _parquet_batches(path, names, on_bytes):
        for number, values in enumerate(zip(*columns, strict=True), start=start):
            yield Row(number, number, dict(zip(names, values, strict=True)))


def _parquet_batches(path: Path, names: list[str], on_bytes: OnBytes) -> Iterator[tuple[int, list[Iterable[Any]]]]:
    """Number of the first row and the columns of some rows at a time."""
    # With a buffer, and not ahead of time: else a whole row group is in memory, and a file may be a single one.
    with (
        named_errors(path),
        pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True) as file,
    ):
        size, rows, number, reported = path.stat().st_size, file.metadata.num_rows, 0, 0
        for batch in file.iter_batches(_PARQUET_ROWS, columns=names):
            yield number, [_values(path, batch.column(name), name, number) for name in names]
            number += len(batch)
            on_bytes(size * number // rows - reported)
            reported = size * number // rows


def _values(path: Path, column: pa.Array, name: str, start: int) -> Iterable[Any]:
    """The values of a column; dates and decimals as plain values."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        for row, value in enumerate(column, start=start):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, row {row}, column {name!r}: not UTF-8 ({error.reason}): write it again"
                ) from error
        raise
    return (
        map(_from_parquet, values) if pa.types.is_temporal(column.type) or pa.types.is_decimal(column.type) else values
    )


def _parquet_kind(kind: pa.DataType) -> ColumnKind:
    types = pa.types
    if holds_texts(kind):
        return "text"
    if types.is_dictionary(kind):
        kind = kind.value_type
    plain = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal, types.is_null)
    date_or_time = (types.is_date, types.is_timestamp, types.is_time)
    return "plain" if any(test(kind) for test in (*plain, *date_or_time)) else "other"


def holds_texts(kind: pa.DataType) -> bool:
    """Whether values of a type of Arrow are texts."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


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
