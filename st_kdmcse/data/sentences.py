"""Plain text sentences, such as the million Wikipedia sentences that SimCSE trains on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
from datasets import Dataset
from datasets import config as datasets_config

from st_kdmcse.data.seen import Seen
from st_kdmcse.data.tables import FileFormat, columns_of, file_format, listed, texts_of, unit_of
from st_kdmcse.files import atomic_file, byte_progress, is_gzip, sha256_file

logger = logging.getLogger(__name__)

_IN_MEMORY_BYTES = 1 << 26
_CHUNK_ROWS = 1 << 16
_CHUNK_CHARACTERS = 1 << 24
_CACHE_VERSION = 2  # counted up when the same file would give other sentences


def read_sentences(
    path: str | Path,
    column: str | None = None,
    deduplicate: bool = False,
    cache_dir: str | Path | None = None,
    show_progress_bar: bool | None = None,
) -> Dataset:
    """Read a file with one sentence a line, or a row.

    The file is UTF-8 text, a table (``.csv`` with commas, ``.tsv`` with tabs, each with a header; ``.jsonl``, or
    ``.json`` with a list of objects), either of them compressed with gzip (``.csv.gz``), or a Parquet table. Text that
    looks like a table, and whatever is no text, is refused. A byte order mark and the line ends of Windows and old Macs
    are tolerated. Blank lines and missing values are skipped (their number is logged). A sentence is kept without
    surrounding whitespace.

    Text of up to 64 MiB is held in memory. Anything else is read once, in chunks, into a memory-mapped Arrow file in
    ``cache_dir``: memory does not grow with the file. The Arrow file takes about as much disk as the text. Later runs
    find it by the SHA-256 of the source, and read it if it has its own. Delete it whenever no dataset uses it; a
    damaged one is written again.

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
        ValueError: if it is a folder, has no sentence, is damaged, no text or not UTF-8 (names the line or row), has no
            such column or no obvious one, looks like a table by the name of a text, or if the cache cannot be written.
    """
    path = Path(path)
    kind, column = _checked_source(path, column)
    size = path.stat().st_size
    with byte_progress(size, f"Checksum of {path.name}", show_progress_bar) as progress:
        identity = [_CACHE_VERSION, sha256_file(path, progress.update), kind, column, deduplicate]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    # The fingerprint that datasets finds here; without one it would pickle the text, or take the time of the cache.
    schema = pa.schema([("sentence", pa.string())], {"huggingface": json.dumps({"fingerprint": key})})
    cached = Path(cache_dir or Path(datasets_config.HF_DATASETS_CACHE) / "st_kdmcse") / f"{key}.arrow"

    in_memory = size <= _IN_MEMORY_BYTES and kind != "parquet" and not is_gzip(path)
    if not in_memory and (dataset := _open_cached(cached, schema)) is not None:
        return dataset
    with byte_progress(size, f"Reading {path.name}", show_progress_bar) as progress:
        batches = _batches(_sentences(path, kind, column, deduplicate, progress.update), schema)
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
    return _sentences(path, *_checked_source(path, column), deduplicate, on_bytes=lambda _: None)


def _checked_source(path: Path, column: str | None) -> tuple[FileFormat, str]:
    """The format of the file, and the column to read."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file with one sentence a line")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}: give a file with one sentence a line")
    if not path.stat().st_size:
        raise ValueError(f"{path} has no sentence: it is empty")
    kind = file_format(path)
    if kind == "text":
        if column is not None:
            raise ValueError(f"{path} is read as text and has no column {column!r}: leave the column out")
        return kind, "text"
    columns = columns_of(path, kind)
    texts = [name for name, holds in columns.items() if holds == "text"]
    if column is None:
        obvious = texts if len(texts) == 1 else [name for name in ("sentence", "text") if name in texts]
        column = obvious[0] if obvious else None
    if column is None or column not in texts:
        what = "which column holds the sentences is not clear" if column is None else f"no column {column!r} of strings"
        raise ValueError(
            f"{path}: {what}; name one as `text_column`. Its columns of strings: {listed(texts)}; others: "
            f"{listed(name for name in columns if name not in texts)}"
        )
    return kind, column


def _sentences(
    path: Path, kind: FileFormat, column: str, deduplicate: bool, on_bytes: Callable[[int], object]
) -> Iterator[str]:
    texts, unit = texts_of(path, kind, column, on_bytes), f"{unit_of(kind)}s"
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
    """The cached sentences; None if there are none, or if what is there is damaged or something else."""
    try:
        with _checksum_file(cached).open(encoding="ascii", errors="replace") as file:
            if file.read() != sha256_file(cached):
                return None
        with pa.memory_map(str(cached)) as source, pa.ipc.open_stream(source) as stream:
            if not stream.schema.equals(schema, check_metadata=True):
                return None
        return Dataset.from_file(str(cached))
    except (OSError, pa.ArrowException):
        return None


def _checksum_file(cached: Path) -> Path:
    return cached.with_suffix(".sha256")


def _write_cached(cached: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    try:
        with atomic_file(cached, "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for batch in batches:
                stream.write_batch(batch)
        with atomic_file(_checksum_file(cached)) as file:
            file.write(sha256_file(cached))
    except OSError as error:
        raise ValueError(
            f"the sentences cannot be written to the cache {cached.parent} ({error}): give another `cache_dir`, or set "
            "HF_DATASETS_CACHE to a folder with room"
        ) from error
