"""The files of a feature store, opened and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from st_kdmcse.data.layout import (
    ARROW,
    CSV,
    FORMAT,
    IMAGES,
    MANIFEST,
    SCHEMA,
    TEXTS,
    VERSION,
    Array,
)
from st_kdmcse.files import read_manifest


def read_store_manifest(folder: Path) -> dict[str, Any] | None:
    """The checked content of the manifest; None for a folder without one."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_manifest(path, FORMAT, VERSION, _REMEDY)
    for name, (fits, expected) in _FIELDS.items():
        if not fits(manifest.get(name, _OPTIONAL.get(name))):
            raise ValueError(f"{path} says {name} = {manifest.get(name)!r}, expected {expected}: {_REMEDY}")
    return manifest


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_files(value: Any) -> bool:
    """Whether a value describes the files of a store, and no file elsewhere."""
    return (
        isinstance(value, dict)
        and set(value) in ({IMAGES, TEXTS, ARROW}, {IMAGES, TEXTS, CSV})
        and all(isinstance(entry, dict) and _is_count(entry.get("bytes")) for entry in value.values())
        and all(re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))) for entry in value.values())
    )


_REMEDY = "copy or write the store again"
_OPTIONAL = {"shared_space": True, "source": {}}
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "teacher": (lambda value: isinstance(value, str), "a text"),
    "dim": (_is_count, "a whole number"),
    "dtype": (lambda value: isinstance(value, str), "a text"),
    "normalized": (lambda value: isinstance(value, bool), "true or false"),
    "shared_space": (lambda value: isinstance(value, bool), "true or false"),
    "source": (lambda value: isinstance(value, dict), "an object"),
    "images": (_is_count, "a whole number"),
    "rows": (_is_count, "a whole number"),
    "files": (_is_files, f"bytes and sha256 of {IMAGES}, {TEXTS} and {ARROW} (or {CSV}), and of no other file"),
}


def table_name(folder: Path, manifest: Mapping[str, Any] | None) -> str:
    """Which of the two encodings of the table the store uses."""
    if manifest is not None:
        return ARROW if ARROW in manifest["files"] else CSV
    return CSV if (folder / CSV).exists() and not (folder / ARROW).exists() else ARROW


def require_file(path: Path) -> None:
    """Refuse a store without one of its files."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: a feature store holds {IMAGES}, {TEXTS} and {ARROW} (or {CSV}); copy or write the "
            "store again"
        )


def open_array(path: Path) -> Array:
    """(n, T) features, memory-mapped; a file that is cut off or of another layout is a ValueError."""
    require_file(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError, SyntaxError, TokenError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is not a whole .npy file ({error}): copy or write the store again") from error
    if array.ndim != 2 or 0 in array.shape or array.dtype not in (np.float16, np.float32):
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, expected (n, T) float16 or float32")
    if not array.flags.c_contiguous:
        raise ValueError(f"{path} is in Fortran order: save numpy.ascontiguousarray of it")
    expected, size = array.offset + array.nbytes, path.stat().st_size
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, its header says {expected:,}: copy or write the store again")
    return array.view(np.ndarray)


def open_table(path: Path) -> pa.Table:
    """The table of captions, memory-mapped if it is ``captions.arrow``; a damaged one is a ValueError."""
    require_file(path)
    try:
        if path.name == CSV:
            table = pa.csv.read_csv(
                path,
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(
                    include_columns=SCHEMA.names, column_types=SCHEMA, strings_can_be_null=False
                ),
            )
        else:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        table.validate()
        names = table.column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or is not a table of captions ({error})") from error
    for field in SCHEMA:
        if field.name not in names or table.schema.field(field.name).type != field.type:
            raise ValueError(f"{path} has no {field.type} column {field.name!r}; its columns: {names}")
        if table.column(field.name).null_count:
            raise ValueError(f"{path}: the column {field.name!r} has missing values; fill them in, or leave them out")
    if not table.num_rows:
        raise ValueError(f"{path} has no rows: write the store again")
    for name in ("image", "caption"):
        if not all(map(_ends_in_order, table.column(name).chunks)):
            raise ValueError(f"{path} is damaged: texts of the column {name!r} lie outside of it; copy it again")
    return table


def _ends_in_order(texts: pa.StringArray) -> bool:
    """Whether each text of an Arrow array lies within its bytes: reading another one would end the process."""
    _, offsets, content = texts.buffers()
    if not len(texts):
        return True
    ends = np.frombuffer(offsets, np.int32, len(texts) + 1, texts.offset * 4)
    size = 0 if content is None else content.size
    return bool(ends[0] >= 0 and ends[-1] <= size and (ends[1:] >= ends[:-1]).all())
