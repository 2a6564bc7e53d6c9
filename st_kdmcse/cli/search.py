"""``st-kdmcse index build|add|update|remove|info``, ``search`` and ``duplicates``."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import click
import pyarrow as pa

from st_kdmcse.cli.common import friendly_errors, quiet_libraries
from st_kdmcse.data.store import FeatureStore
from st_kdmcse.encoding import load_model
from st_kdmcse.files import progress_bar
from st_kdmcse.losses.heads import HEADS_DIR
from st_kdmcse.search.address import MilvusAddress, open_backend, parse_address
from st_kdmcse.search.base import Filter, Hit
from st_kdmcse.search.build import build_index
from st_kdmcse.search.duplicates import DUPLICATE_COLUMNS, Duplicates, find_duplicates
from st_kdmcse.search.filters import parse_filter
from st_kdmcse.search.images import index_images
from st_kdmcse.search.records import RecordFile, TextRecord, output_file, write_rows
from st_kdmcse.search.semantic_index import SemanticIndex
from st_kdmcse.search.storage import read_index

Command = Callable[..., Any]
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

_ADDED_AT_A_TIME = 512
_QUERIES_AT_A_TIME = 256
_PAIRS_SHOWN = 20
_PAIRS_WRITTEN = 1_000_000
_TEXT_LINES = 4
_UNITS = {"": 1, **{unit: 1 << (10 * power) for power, unit in enumerate("KMGT", start=1)}}


class SizeType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number of bytes, such as ``4GiB``, ``512MiB`` or ``1.5G``; units are powers of 1,024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number of bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
        size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
        if not size:
            self.fail(f"{value!r} is not a size, such as 4GiB or 512MiB", param, ctx)
        return size


class NamesType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Names separated by commas; ``none`` is none."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The names as a list."""
        if isinstance(value, list):
            return value
        return [] if value == "none" else [name.strip() for name in value.split(",") if name.strip()]


def file_options(with_id: str = "", with_metadata: bool = True) -> Callable[[Command], Command]:
    """Give a command the options of a :class:`RecordFile`.

    Args:
        with_id: what the help says about rows without an id column.
        with_metadata: whether there is metadata to be kept.
    """
    options = [
        click.option("--text-column", help="Column of the texts.  [text, sentence, caption, or the only one of texts]"),
        click.option("--id-column", help=f"Column of the ids.  [{with_id}]"),
        click.option(
            "--metadata",
            type=NamesType(),
            metavar="A,B|none",
            help="Columns to keep, for filters and display.  [all others]",
        ),
        click.option("--refuse-empty", is_flag=True, help="Stop at a row without text, instead of leaving it out."),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options if with_metadata else [*options[:2], options[3]]):
            command = option(command)
        return command

    return decorate


Address = click.argument("address", metavar="DIR")
Model = click.option("--model", help="Hub name or folder, if the model is not where the index was made.")
File = click.argument("file", type=click.Path(path_type=Path))
Factory = click.option("--factory", help="FAISS's name of an index type, such as IVF4096,Flat.  [chosen by size]")
RecallTarget = click.option(
    "--recall-target",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Recall@10 that an approximate index is tuned to.",
)
MemoryLimit = click.option(
    "--memory-limit", type=SizeType(), help="Memory for the vectors, such as 4GiB.  [that of the machine]"
)
_SETTINGS = {"max_content_width": 120}


@click.group()
def index() -> None:
    """Make a search index of a file of texts, and keep it up to date.

    DIR is a folder, or the address of a collection of Milvus: milvus://HOST:19530/COLLECTION, or
    milvus:///path/to/file.db?collection=NAME for a file on this machine.
    """


@index.command(context_settings=_SETTINGS)
@File
@click.option("--model", required=True, help="Sentence encoder: hub name or folder.")
@click.option("--out", required=True, metavar="DIR", help="Folder of the index, or the address of a Milvus collection.")
@file_options("number of the line, or row")
@Factory
@RecallTarget
@MemoryLimit
@click.option("--devices", type=NamesType(), metavar="A,B", help="That share the encoding: cuda:0,cuda:1.  [all GPUs]")
def build(
    file: Path,
    model: str,
    out: str,
    factory: str | None,
    recall_target: float,
    memory_limit: int | None,
    devices: list[str] | None,
    **columns: Any,
) -> None:
    """Index the texts of FILE: one a line (.txt, also .gz), or a table (.csv, .tsv, .jsonl, .parquet).

    Interrupted or killed, the same command goes on where it was.

    \b
    st-kdmcse index build sentences.txt --model kdmcse-bert --out my-index
    st-kdmcse index build articles.csv --text-column title --id-column number --model kdmcse-bert --out my-index
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors("stopped; what was encoded is kept, and the same command goes on from there"):
        records = _record_file(file, columns)
        place = parse_address(out)
        if isinstance(place, MilvusAddress):
            if factory or memory_limit or devices:
                raise ValueError("--factory, --memory-limit and --devices are for an index in a folder, not in Milvus")
            total = records.check()
            made = SemanticIndex.open(out, model, create=True)
            _fill(made, records, total)
        else:
            made = build_index(
                records,
                load_model(model),
                str(Path(model).absolute()) if Path(model).is_dir() else model,
                place,
                source=records.identity(),
                factory=factory,
                recall_target=recall_target,
                memory_limit=memory_limit,
                devices=devices,
            )
        click.echo(f"{len(made):,} texts of {file} are in {out}")
        _say_what_was_skipped(records)
        click.echo(f'search it: st-kdmcse search {shlex.quote(out)} "a query"')


@index.command(context_settings=_SETTINGS)
@click.argument("features", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Sentence encoder that was trained with the heads: hub name or folder.")
@click.option("--heads", type=click.Path(path_type=Path), help="Folder of the trained heads.  [MODEL/heads]")
@click.option("--images", "folder", type=click.Path(path_type=Path), help="Folder of the image files, to show them.")
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder of the index.")
@Factory
@RecallTarget
@MemoryLimit
def images(
    features: Path,
    model: str,
    heads: Path | None,
    folder: Path | None,
    out: Path,
    factory: str | None,
    recall_target: float,
    memory_limit: int | None,
) -> None:
    """Index the images of the feature store FEATURES, to be found by sentences, with heads that were trained on it.

    \b
    st-kdmcse index images flickr30k-features --model kdmcse-bert --images flickr30k-images --out my-images
    st-kdmcse search my-images "a dog in the snow"
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors("stopped; nothing was written"):
        made = index_images(
            FeatureStore.open(features),
            load_model(model),
            Path(model, HEADS_DIR) if heads is None else heads,
            out,
            images=folder,
            factory=factory,
            recall_target=recall_target,
            memory_limit=memory_limit,
        )
        click.echo(f"{len(made):,} images of {features} are in {out}")
        click.echo(f'search them: st-kdmcse search {shlex.quote(str(out))} "a query"')


@index.command(context_settings=_SETTINGS)
@Address
@File
@file_options("new ids are made")
@Model
def add(address: str, file: Path, model: str | None, **columns: Any) -> None:
    """Add the texts of FILE to the index DIR, a folder: all or none, and an interruption changes nothing."""
    quiet_libraries()
    with friendly_errors("stopped; the index is as it was (one in Milvus has what was added so far)"):
        records = _record_file(file, columns)
        total = records.check()
        opened = SemanticIndex.open(address, model)
        made: list[str] = []
        for chunk in _chunks(records, total):
            ids = None if columns["id_column"] is None else [record.id for record in chunk]
            new = opened.add(_texts(chunk), ids, _metadata(chunk), show_progress_bar=False)
            made += new[: _PAIRS_SHOWN - len(made)]
        opened.save()
        click.echo(f"added {total:,} texts: {len(opened):,} are in {address}")
        _say_what_was_skipped(records)
        if columns["id_column"] is None:
            more = f" and {total - len(made):,} more" if total > len(made) else ""
            click.echo(f"their ids: {', '.join(made)}{more}")


@index.command(context_settings=_SETTINGS)
@Address
@File
@file_options("required")
@Model
def update(address: str, file: Path, model: str | None, **columns: Any) -> None:
    """Replace texts and metadata of the index DIR by those of FILE with the same ids: all or none."""
    quiet_libraries()
    with friendly_errors("stopped; the index is as it was (one in Milvus has what was replaced so far)"):
        if columns["id_column"] is None:
            raise ValueError("--id-column is missing: which texts of the index are to be replaced?")
        records = _record_file(file, columns)
        total = records.check()
        opened = SemanticIndex.open(address, model)
        for chunk in _chunks(records, total):
            ids = [record.id for record in chunk]
            opened.update(ids, _texts(chunk), _metadata(chunk), show_progress_bar=False)
        opened.save()
        click.echo(f"replaced {total:,} of the {len(opened):,} texts in {address}")
        _say_what_was_skipped(records)


@index.command(context_settings=_SETTINGS)
@Address
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@Model
def remove(address: str, ids: tuple[str, ...], model: str | None) -> None:
    """Remove texts from the index DIR by their ids: all or none."""
    quiet_libraries()
    with friendly_errors("stopped; the index is as it was"):
        opened = SemanticIndex.open(address, model)
        before = len(opened)
        opened.remove(ids)
        opened.save()
        click.echo(f"removed {before - len(opened):,} of {before:,} texts in {address}")


@index.command(context_settings=_SETTINGS)
@Address
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(address: str, as_json: bool) -> None:
    """Show what the index DIR is: engine, model, counts, size, and whether its files are intact."""
    quiet_libraries()
    with friendly_errors():
        found = _info(address)
        if as_json:
            click.echo(json.dumps(found, indent=2, ensure_ascii=False))
            return
        found.pop("versions", None)
        width = max(map(len, found))
        for name, value in found.items():
            if value is not None:
                click.echo(f"{name:{width}}  {_shown(value)}")


@click.command(context_settings=_SETTINGS)
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
@click.option("--queries", type=click.Path(path_type=Path), help="File of queries, in any format of index build.")
@click.option("--out", type=click.Path(path_type=Path), help="File for their results: .csv, .jsonl or .parquet.")
@file_options("number of the line, or row", with_metadata=False)
@Model
def search(
    address: str,
    query: tuple[str, ...],
    k: int,
    conditions: tuple[str, ...],
    as_json: bool,
    queries: Path | None,
    out: Path | None,
    model: str | None,
    **columns: Any,
) -> None:
    """Search the index DIR (a folder, or the address of a Milvus collection) by meaning.

    Without QUERY it asks for queries until Ctrl-D. A value of a filter is a number or truth value if it looks like one;
    in double quotes it is text, and ["en", "de"] is one of several.

    \b
    st-kdmcse search my-index "a dog in the snow"
    st-kdmcse search my-index "a dog in the snow" -k 3 --filter lang=en --filter 'year>=2000' --json
    st-kdmcse search my-index --queries queries.txt --out results.parquet
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors("stopped; nothing was written"):
        where = parse_filter(conditions)
        text = " ".join(query)
        if query and not text.strip():
            raise ValueError("the query is empty: say what to search for")
        if queries is not None:
            if query or as_json or out is None:
                raise ValueError("--queries goes with --out FILE, without a query and --json")
            out = output_file(out, queries)
            records = _record_file(queries, columns)
            total = records.check()
            opened = SemanticIndex.open(address, model)
            count = write_rows(out, RESULT_COLUMNS, _results(opened, records, total, k, where, out))
            click.echo(f"{count:,} results of {total:,} queries are in {out}")
            _say_what_was_skipped(records)
        elif out is not None or any(columns.values()):
            raise ValueError("--out and the columns of a file go with --queries FILE")
        elif query:
            hits = SemanticIndex.open(address, model).search(text, k, where)
            click.echo(document(text, k, where, hits) if as_json else table(hits))
        else:
            _prompt(SemanticIndex.open(address, model), k, where, as_json)


@click.command(context_settings=_SETTINGS)
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
def duplicates(file: Path, model: str, threshold: float, out: Path | None, limit: int | None, **columns: Any) -> None:
    """Find pairs of texts in FILE that say nearly the same; equal texts are paired with the first of them.

    \b
    st-kdmcse duplicates sentences.txt --model kdmcse-bert
    st-kdmcse duplicates articles.csv --text-column title --model kdmcse-bert --threshold 0.95 --out pairs.csv
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors("stopped; nothing was written"):
        out = None if out is None else output_file(out, file)
        records = _record_file(file, {**columns, "metadata": []})
        records.check()
        encoder = load_model(model)
        limit = limit or (_PAIRS_SHOWN if out is None else _PAIRS_WRITTEN)
        found = find_duplicates(records, encoder, threshold=threshold, limit=limit)
        if out is None:
            click.echo(pair_table(found))
        else:
            write_rows(out, DUPLICATE_COLUMNS, (pair._asdict() for pair in found.pairs))
        click.echo(_summary(found, threshold, out))
        _say_what_was_skipped(records)


def table(hits: Sequence[Hit]) -> str:
    """Search results for a terminal: rank, score, id, and text with metadata, as wide as the terminal."""
    if not hits:
        return "nothing found"
    rows = [
        (rank, hit.score, [(hit.id, hit.text), *([("", _joined(hit.metadata))] if hit.metadata else [])])
        for rank, hit in enumerate(hits, start=1)
    ]
    return _layout(rows)


def document(query: str, k: int, where: Filter | None, hits: Sequence[Hit]) -> str:
    """Search results as JSON."""
    results = [
        {"rank": rank, "score": hit.score, "id": hit.id, "text": hit.text, "metadata": hit.metadata}
        for rank, hit in enumerate(hits, start=1)
    ]
    return json.dumps({"query": query, "k": k, "filter": where, "results": results}, indent=2, ensure_ascii=False)


def pair_table(found: Duplicates) -> str:
    """Pairs of duplicates for a terminal: rank, score, ids and texts."""
    rows = [
        (rank, pair.score, [(pair.id1, pair.text1), (pair.id2, pair.text2)])
        for rank, pair in enumerate(found.pairs, start=1)
    ]
    return _layout(rows) if rows else "no duplicates"


def _record_file(path: Path, columns: Mapping[str, Any]) -> RecordFile:
    return RecordFile(
        path,
        text_column=columns["text_column"],
        id_column=columns["id_column"],
        metadata=columns.get("metadata"),
        on_empty="raise" if columns["refuse_empty"] else "skip",
    )


def _say_what_was_skipped(records: RecordFile) -> None:
    if records.skipped:
        click.echo(f"left out {records.skipped:,} without text, the first at {records.first_skipped}")


def _chunks(records: Iterable[TextRecord], total: int, done: int = 0) -> Iterator[list[TextRecord]]:
    """Records from number ``done`` on, some at a time, with a progress bar."""
    remaining = islice(records, done, None)
    with progress_bar(total, "Encoding", "text", initial=done) as progress:
        while chunk := list(islice(remaining, _ADDED_AT_A_TIME)):
            yield chunk
            progress.update(len(chunk))


def _fill(opened: SemanticIndex, records: RecordFile, total: int) -> None:
    """Put records into an index that keeps them at once, after those that an interrupted run has put there."""
    done = len(opened)
    if done:
        last = next(islice(records, done - 1, None), None)
        try:
            same = last is not None and opened.get([last.id])[0].text == last.text
        except KeyError:
            same = False
        if not same:
            raise ValueError("there are other texts in that collection: add to it with st-kdmcse index add")
    for chunk in _chunks(records, total, done):
        opened.add(_texts(chunk), [record.id for record in chunk], _metadata(chunk), show_progress_bar=False)


def _texts(chunk: Iterable[TextRecord]) -> list[str]:
    return [record.text for record in chunk]


def _metadata(chunk: Iterable[TextRecord]) -> list[dict[str, Any]]:
    return [record.metadata for record in chunk]


def _info(address: str) -> dict[str, Any]:
    """What an index is, without loading its model."""
    place = parse_address(address)
    if isinstance(place, MilvusAddress):
        backend: Any = open_backend(address)
        header = backend.identity or {}
    else:
        backend, header = read_index(place)
    details = {name: header[name] for name in ("tuning", "versions", "date") if name in header}
    intact = {} if isinstance(place, MilvusAddress) else {"checksums": "ok"}
    return {**backend.info(), "model": header.get("model"), **details, **intact}


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items() if each is not None)
    if isinstance(value, list):
        return " + ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _results(
    opened: SemanticIndex, records: RecordFile, total: int, k: int, where: Filter | None, out: Path
) -> Iterator[dict[str, Any]]:
    queries = iter(records)
    with progress_bar(total, "Searching", "query") as progress:
        while chunk := list(islice(queries, _QUERIES_AT_A_TIME)):
            for record, hits in zip(chunk, opened.search(_texts(chunk), k, where), strict=True):
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
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its history and editing
    typed = sys.stdin.isatty()
    if typed:
        click.echo(f"{len(opened):,} texts. Type a query; Ctrl-D ends.")
    while True:
        try:
            query = input("> " if typed else "")
            if query.strip():
                hits = opened.search(query, k, where)
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
    values = ", ".join(f"{name}: {value}" for name, value in metadata.items() if value is not None)
    return f"[{values}]" if values else ""
