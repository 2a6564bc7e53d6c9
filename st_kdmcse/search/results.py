"""Tables of results: CSV, JSON lines or Parquet, written a row at a time, whole or not at all."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from st_kdmcse.files import atomic_path

_PARQUET_ROWS = 1 << 12

OUTPUT_SUFFIXES = (".csv", ".jsonl", ".parquet")
"""Formats of :func:`write_rows`."""


def output_file(path: str | Path, source: str | Path | None = None) -> Path:
    """The path of a file for :func:`write_rows`, checked before the work that leads to it.

    Args:
        path: the file.
        source: the file that the results are made from.

    Raises:
        ValueError: if the suffix is not one of :data:`OUTPUT_SUFFIXES`, or it is a folder, or the source itself.
    """
    path = Path(path)
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(f"{path} is to be written as which format? Give it one of {', '.join(OUTPUT_SUFFIXES)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file")
    if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
        raise ValueError(f"{path} is what is read: give another file for the results")
    return path


def write_rows(path: str | Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a table of results a row at a time; whole or not at all.

    Args:
        path: ``.csv``, ``.jsonl`` or ``.parquet``; its folder is made.
        schema: names and types of the columns.
        rows: a value for each column.

    Returns:
        The number of rows.

    Raises:
        ValueError: for another suffix.
    """
    path = output_file(path)
    write = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}[path.suffix.lower()]
    with atomic_path(path) as temporary:
        return write(temporary, schema, rows)


def _write_csv(path: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, schema.names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row)
            count += 1
    return count


def _write_jsonl(path: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({name: row[name] for name in schema.names}, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    rows = iter(rows)
    with pq.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(rows, _PARQUET_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema))
            count += len(chunk)
    return count
