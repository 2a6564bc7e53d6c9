"""Plain text sentences, such as the million Wikipedia sentences that SimCSE trains on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from datasets import config as datasets_config

from st_kdmcse.data.lines import named_errors, read_lines
from st_kdmcse.data.seen import Seen
from st_kdmcse.files import atomic_file, byte_progress, is_gzip, is_parquet, sha256_file

logger = logging.getLogger(__name__)

_IN_MEMORY_BYTES = 1 << 26
_CHUNK_ROWS = 1 << 16
_CHUNK_CHARACTERS = 1 << 24
_PARQUET_ROWS = 1 << 13
_BUFFER_BYTES = 1 << 20
_CACHE_VERSION = 1  # counted up when the same file would give other sentences
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_sentences(
    path: str | Path,
    column: str | None = None,
    deduplicate: bool = False,
    cache_dir: str | Path | None = None,
    show_progress_bar: bool | None = None,
) -> Dataset:
    """Read a file with one sentence a line, or a row.

    The file is UTF-8 text, the same compressed with gzip, or a Parquet table; its content tells which, not its name. A
    byte order mark and Windows line ends are tolerated. Blank lines and missing values are skipped (their number is
    logged). A sentence is kept without surrounding whitespace.

    Text of up to 64 MiB is held in memory. Anything else is read once, in chunks, into a memory-mapped Arrow file in
    ``cache_dir``: memory does not grow with the file. The Arrow file takes about as much disk as the text. Later runs
    find it by the SHA-256 of the source. Delete it whenever no dataset uses it; a damaged one is written again.

    Args:
        path: the file.
        column: of a table, which column holds the sentences; None takes the only column of strings, or else the one
            named ``sentence``, or else ``text``.
        deduplicate: leave out sentences that came before (the number is logged).
        cache_dir: folder for Arrow files; None is ``st_kdmcse`` in the cache of ``datasets`` (``HF_DATASETS_CACHE``).
        show_progress_bar: None shows one in a terminal if it takes more than two seconds.

    Returns:
        A dataset with the column ``sentence``. Its fingerprint depends on the file's content and the options alone.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, has no sentence, is damaged, binary or not UTF-8 (names the line or row), has no
            such column or no obvious one, or if the cache cannot be written.
    """
    path = Path(path)
    column = _checked_column(path, column)
    size = path.stat().st_size
    with byte_progress(size, f"Checksum of {path.name}", show_progress_bar) as progress:
        identity = [_CACHE_VERSION, sha256_file(path, progress.update), column, deduplicate]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    # The fingerprint that datasets finds here; without one it would pickle the text, or take the time of the cache.
    schema = pa.schema([("sentence", pa.string())], {"huggingface": json.dumps({"fingerprint": key})})
    cached = Path(cache_dir or Path(datasets_config.HF_DATASETS_CACHE) / "st_kdmcse") / f"{key}.arrow"

    in_memory = size <= _IN_MEMORY_BYTES and not is_gzip(path) and not is_parquet(path)
    if not in_memory and (dataset := _open_cached(cached, schema)) is not None:
        return dataset
    with byte_progress(size, f"Reading {path.name}", show_progress_bar) as progress:
        batches = _batches(_sentences(path, column, deduplicate, progress.update), schema)
        if in_memory:
            return Dataset(pa.Table.from_batches(batches))
        _write_cached(cached, schema, batches)
    return Dataset.from_file(str(cached))


def iter_sentences(path: str | Path, column: str | None = None, deduplicate: bool = False) -> Iterator[str]:
    """The sentences of :func:`read_sentences` one by one, in bounded memory and without a cache.

    Args:
        path: the file.
        column: of a table, which column holds the sentences, as in :func:`read_sentences`.
        deduplicate: leave out sentences that came before.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as :func:`read_sentences`; what is wrong inside of the file shows when the iteration gets there.
    """
    path = Path(path)
    return _sentences(path, _checked_column(path, column), deduplicate, on_bytes=lambda _: None)


def _checked_column(path: Path, column: str | None) -> str | None:
    """The column to read; None for text."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file with one sentence a line")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}: give a file with one sentence a line")
    if not is_parquet(path):
        if column is not None:
            raise ValueError(f"{path} is read as text and has no column {column!r}: leave the column out")
        return None
    with named_errors(path):
        schema = pq.read_schema(path)
    strings = [field.name for field in schema if _holds_strings(field.type)]
    if column is None:
        obvious = strings if len(strings) == 1 else [name for name in ("sentence", "text") if name in strings]
        column = obvious[0] if obvious else None
    if column not in strings:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
        what = "which column holds the sentences is not clear" if column is None else f"no column {column!r} of strings"
        raise ValueError(f"{path}: {what}; name one of its columns of strings. Its columns: {found}")
    return column


def _holds_strings(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _sentences(path: Path, column: str | None, deduplicate: bool, on_bytes: Callable[[int], object]) -> Iterator[str]:
    texts = read_lines(path, on_bytes) if column is None else _rows(path, column, on_bytes)
    unit = "lines" if column is None else "rows"
    kept = blank = repeated = 0
    with Seen() if deduplicate else nullcontext() as seen:
        for text in texts:
            sentence = text.strip()
            if not sentence:
                blank += 1
            elif seen is not None and not seen.add(sentence):
                repeated += 1
            else:
                kept += 1
                yield sentence
    if not kept:
        raise ValueError(f"{path} has no sentence: it is empty or all its {unit} are blank")
    if blank:
        logger.info("%s: skipped %d blank %s", path, blank, unit)
    if repeated:
        logger.info("%s: left out %d repeated sentences", path, repeated)


def _rows(path: Path, column: str, on_bytes: Callable[[int], object]) -> Iterator[str]:
    """The values of a column; a missing one is empty."""
    # With a buffer, and not ahead of time: else a whole row group is in memory, and a file may be a single one.
    with (
        named_errors(path),
        pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True) as file,
    ):
        size, rows = path.stat().st_size, file.metadata.num_rows
        row = reported = 0
        for batch in file.iter_batches(_PARQUET_ROWS, columns=[column]):
            for value in batch.column(0).cast(pa.large_string()).cast(pa.large_binary()).to_pylist():
                try:
                    yield (value or b"").decode()
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path}, row {row}, column {column!r}: not UTF-8 ({error.reason}); write the column again"
                    ) from error
                row += 1
            on_bytes(size * row // rows - reported)
            reported = size * row // rows


def _batches(sentences: Iterator[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    chunk: list[str] = []
    characters = 0
    for sentence in sentences:
        chunk.append(sentence)
        characters += len(sentence)
        if len(chunk) == _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
            yield pa.record_batch([pa.array(chunk, pa.string())], schema=schema)
            chunk, characters = [], 0
    if chunk:
        yield pa.record_batch([pa.array(chunk, pa.string())], schema=schema)


def _open_cached(cached: Path, schema: pa.Schema) -> Dataset | None:
    """The cached sentences; None if there are none, or if what is there is cut off or something else."""
    try:
        with cached.open("rb") as file:
            file.seek(-len(_END_OF_STREAM), os.SEEK_END)
            if file.read() != _END_OF_STREAM:  # cut off between two batches, a stream reads well
                return None
        with pa.memory_map(str(cached)) as file, pa.ipc.open_stream(file) as stream:
            if not stream.schema.equals(schema, check_metadata=True):
                return None
        return Dataset.from_file(str(cached))
    except (OSError, pa.ArrowException):
        return None


def _write_cached(cached: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    try:
        with atomic_file(cached, "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for batch in batches:
                stream.write_batch(batch)
    except OSError as error:
        raise ValueError(
            f"the sentences cannot be written to the cache {cached.parent} ({error}): give another `cache_dir`, or set "
            "HF_DATASETS_CACHE to a folder with room"
        ) from error
