"""``st-kdmcse index build|add|update|remove|info``, ``search`` and ``duplicates``."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import click
import pyarrow as pa

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import friendly_errors, precision_option, quiet_libraries
from st_kdmcse.cli.index import _texts
from st_kdmcse.cli.search_options import (
    Address,
    File,
    Mmap,
    Model,
    file_options,
    record_file,
    say_what_was_skipped,
)
from st_kdmcse.data.images import load_image
from st_kdmcse.encoding import load_model
from st_kdmcse.files import progress_bar
from st_kdmcse.precision import Precision
from st_kdmcse.search.base import Filter, Hit
from st_kdmcse.search.duplicates import DUPLICATE_COLUMNS, Duplicates, find_duplicates
from st_kdmcse.search.filters import parse_filter, search_typed, typed
from st_kdmcse.search.records import RecordFile
from st_kdmcse.search.results import output_file, write_rows
from st_kdmcse.search.semantic_index import SemanticIndex

Item = TypeVar("Item")

RESULT_COLUMNS = pa.schema(
    [
        ("query_id", pa.string()),
        ("query", pa.string()),
        ("rank", pa.int32()),
        ("score", pa.float32()),
        ("id", pa.string()),
        ("text", pa.string()),
        ("metadata", pa.string()),
    ]
)
"""Columns of the results of ``search --queries``."""

_QUERIES_AT_A_TIME = 256
_PAIRS_SHOWN = 20
_PAIRS_WRITTEN = 1_000_000
_TEXT_LINES = 4


@command()
@Address
@click.argument("query", nargs=-1)
@click.option("-k", type=click.IntRange(1), default=10, show_default=True, help="Results of each query.")
@click.option(
    "--filter",
    "conditions",
    multiple=True,
    metavar="NAME=VALUE",
    help="Only texts whose metadata fulfil it, with =, !=, <, <=, > or >=; repeat it for more.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document, for programs.")
@click.option("--image", type=click.Path(path_type=Path), help="Image to search by, instead of a QUERY.")
@click.option("--queries", type=click.Path(path_type=Path), help="File of queries, in any format of index build.")
@click.option("--out", type=click.Path(path_type=Path), help="File for their results: .csv, .jsonl or .parquet.")
@file_options("number of the line, or row", with_metadata=False)
@Model
@Mmap
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Encode queries in it; bfloat16 is for many.",
)
def search(
    address: str,
    query: tuple[str, ...],
    k: int,
    conditions: tuple[str, ...],
    as_json: bool,
    image: Path | None,
    queries: Path | None,
    out: Path | None,
    model: str | None,
    mmap: bool | None,
    precision: Precision,
    **columns: Any,
) -> None:
    """Search the index DIR (a folder, or the address of a Milvus collection) by meaning.

    Without QUERY it asks for queries until Ctrl-D. A value of a filter is a number or truth value if it looks like one;
    in double quotes it is text, and ["en", "de"] is one of several. Results show values as filters take them.

    \b
    st-kdmcse search my-index "a dog in the snow"
    st-kdmcse search my-index "a dog in the snow" -k 3 --filter lang=en --filter 'year>=2000' --json
    st-kdmcse search my-index --queries queries.txt --out results.parquet
    st-kdmcse search my-images --image photo.jpg
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()

    def opened() -> SemanticIndex:
        return SemanticIndex.open(address, model, precision=precision, mmap=mmap)

    with friendly_errors("stopped; nothing was written"):
        where = parse_filter(conditions)
        text = " ".join(query)
        if query and not text.strip():
            raise ValueError("the query is empty: say what to search for")
        if image is not None:
            if query or queries is not None:
                raise ValueError("--image goes without a query and --queries")
            picture = load_image(image)
            (hits,) = search_typed(opened(), [picture], k, where, images=True)
            click.echo(document(None, k, where, hits, image) if as_json else table(hits))
        elif queries is not None:
            if query or as_json or out is None:
                raise ValueError("--queries goes with --out FILE, without a query and --json")
            out = output_file(out, queries)
            records = record_file(queries, columns)
            total = records.check()
            count = write_rows(out, RESULT_COLUMNS, _results(opened(), records, total, k, where, out))
            click.echo(f"{count:,} results of {total:,} queries are in {out}")
            say_what_was_skipped(records)
        elif out is not None or any(columns.values()):
            raise ValueError("--out and the columns of a file go with --queries FILE")
        elif query:
            (hits,) = search_typed(opened(), [text], k, where)
            click.echo(document(text, k, where, hits) if as_json else table(hits))
        else:
            _prompt(opened(), k, where, as_json)


@command()
@File
@click.option("--model", required=True, help="Sentence encoder: hub name or folder.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    show_default=True,
    help="Cosine from which on two texts are duplicates.",
)
@click.option("--out", type=click.Path(path_type=Path), help="File for the pairs: .csv, .jsonl or .parquet.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    help=f"Pairs to keep, the best.  [{_PAIRS_SHOWN}; with --out {_PAIRS_WRITTEN:,}]",
)
@file_options("number of the line, or row", with_metadata=False)
@precision_option("auto")
def duplicates(
    file: Path,
    model: str,
    threshold: float,
    out: Path | None,
    limit: int | None,
    precision: Precision,
    **columns: Any,
) -> None:
    """Find pairs of texts in FILE that say nearly the same; equal texts are paired with the first of them.

    \b
    st-kdmcse duplicates sentences.txt --model kdmcse-bert
    st-kdmcse duplicates articles.csv --text-column title --model kdmcse-bert --threshold 0.95 --out pairs.csv
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors("stopped; nothing was written"):
        out = None if out is None else output_file(out, file)
        records = record_file(file, {**columns, "metadata": []})
        records.check()
        encoder = load_model(model)
        limit = limit or (_PAIRS_SHOWN if out is None else _PAIRS_WRITTEN)
        found = find_duplicates(records, encoder, threshold=threshold, limit=limit, precision=precision)
        if out is None:
            click.echo(pair_table(found))
        else:
            write_rows(out, DUPLICATE_COLUMNS, (pair._asdict() for pair in found.pairs))
        click.echo(_summary(found, threshold, out))
        say_what_was_skipped(records)


def table(hits: Sequence[Hit]) -> str:
    """Search results for a terminal: rank, score, id, and text with metadata, as wide as the terminal."""
    if not hits:
        return "nothing found"
    rows = [
        (rank, hit.score, [(hit.id, hit.text), *([("", _joined(hit.metadata))] if hit.metadata else [])])
        for rank, hit in enumerate(hits, start=1)
    ]
    return _layout(rows)


def document(query: str | None, k: int, where: Filter | None, hits: Sequence[Hit], image: Path | None = None) -> str:
    """Search results as JSON; of a search by image, its file stands in the place of the query."""
    asked = {"query": query} if image is None else {"image": str(image)}
    results = [
        {"rank": rank, "score": hit.score, "id": hit.id, "text": hit.text, "metadata": hit.metadata}
        for rank, hit in enumerate(hits, start=1)
    ]
    return json.dumps({**asked, "k": k, "filter": where, "results": results}, indent=2, ensure_ascii=False)


def pair_table(found: Duplicates) -> str:
    """Pairs of duplicates for a terminal: rank, score, ids and texts."""
    rows = [
        (rank, pair.score, [(pair.id1, pair.text1), (pair.id2, pair.text2)])
        for rank, pair in enumerate(found.pairs, start=1)
    ]
    return _layout(rows) if rows else "no duplicates"


def _results(
    opened: SemanticIndex, records: RecordFile, total: int, k: int, where: Filter | None, out: Path
) -> Iterator[dict[str, Any]]:
    queries = iter(records)
    with progress_bar(total, "Searching", "query") as progress:
        while chunk := list(islice(queries, _QUERIES_AT_A_TIME)):
            for record, hits in zip(chunk, search_typed(opened, _texts(chunk), k, where), strict=True):
                for rank, hit in enumerate(hits, start=1):
                    metadata: Any = hit.metadata
                    if out.suffix.lower() != ".jsonl":
                        metadata = json.dumps(metadata, ensure_ascii=False)
                    yield {
                        "query_id": record.id,
                        "query": record.text,
                        "rank": rank,
                        "score": hit.score,
                        "id": hit.id,
                        "text": hit.text,
                        "metadata": metadata,
                    }
            progress.update(len(chunk))


def _prompt(opened: SemanticIndex, k: int, where: Filter | None, as_json: bool) -> None:
    """Search for what is typed, until there is no more."""
    if sys.stdin is None:
        raise ValueError("there is no input to read queries from: give a query")
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its history and editing
    typed = sys.stdin.isatty()
    if typed:
        click.echo(f"{len(opened):,} texts. Type a query; Ctrl-D ends.")
    while True:
        try:
            query = input("> " if typed else "")
            if query.strip():
                (hits,) = search_typed(opened, [query], k, where)
                click.echo(document(query, k, where, hits) if as_json else f"{table(hits)}\n")
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        except (ValueError, OSError) as error:
            click.echo(f"error: {error}", err=True)


def _summary(found: Duplicates, threshold: float, out: Path | None) -> str:
    equal = f"{found.equal:,} equal an earlier one"
    text = f"{found.records:,} texts, {equal}; {found.found:,} pairs score {threshold} or more"
    if found.found > len(found.pairs):
        text += f", of which the best {len(found.pairs):,} are kept (--limit)"
    if not found.exact:
        text += "; within nearest lists, so a few may be missing"
    return text if out is None else f"{text}; they are in {out}"


def _layout(rows: Sequence[tuple[int, float, list[tuple[str, str]]]]) -> str:
    """Rows of rank, score, and pairs of id and text, wrapped to the width of the terminal."""
    width = shutil.get_terminal_size((100, 24)).columns
    keys = min(max(len(key) for _, _, parts in rows for key, _ in parts), max(8, 2 * width // 5))
    texts = max(20, width - keys - 17)
    lines = [f"{'rank':>4}  {'score':>7}  {'id':{keys}}  text"]
    for rank, score, parts in rows:
        first = f"{rank:4}  {score:7.4f}"
        for key, text in parts:
            for left, right in zip_longest(textwrap.wrap(_printable(key), keys), _wrapped(text, texts), fillvalue=""):
                lines.append(f"{first:13}  {left:{keys}}  {right}".rstrip())
                first = ""
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    """A text's lines, each wrapped; the first few of them."""
    lines = [
        line
        for part in text[: width * (_TEXT_LINES + 1)].splitlines()
        for line in textwrap.wrap(_printable(part), width)
    ]
    if len(lines) > _TEXT_LINES:
        lines = [*lines[: _TEXT_LINES - 1], f"{lines[_TEXT_LINES - 1][: width - 4]} ..."]
    return lines


def _printable(text: str) -> str:
    """The text on one line, without characters that would steer the terminal."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def _joined(metadata: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name}: {typed(value)}" for name, value in metadata.items() if value is not None)
    return f"[{values}]" if values else ""
