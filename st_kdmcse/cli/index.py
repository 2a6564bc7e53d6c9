"""``st-kdmcse index build|images|add|update|remove|copy|info``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import click

from st_kdmcse.cli.commands import Group
from st_kdmcse.cli.common import friendly_errors, precision_option, quiet_libraries
from st_kdmcse.cli.search_options import (
    Address,
    Factory,
    File,
    MemoryLimit,
    Mmap,
    Model,
    NamesType,
    RecallTarget,
    TuneQueries,
    file_options,
    record_file,
    say_what_was_skipped,
)
from st_kdmcse.data.layout import IMAGES
from st_kdmcse.data.store import FeatureStore
from st_kdmcse.encoding import load_model
from st_kdmcse.files import progress_bar
from st_kdmcse.precision import Precision
from st_kdmcse.search.address import MilvusAddress, open_backend, parse_address
from st_kdmcse.search.build import build_index
from st_kdmcse.search.copying import COPYING, copy_index
from st_kdmcse.search.images import captions_by_image, index_images
from st_kdmcse.search.records import RecordFile, TextRecord
from st_kdmcse.search.semantic_index import SemanticIndex
from st_kdmcse.search.storage import compact_index, read_index, verified_in_full

_ADDED_AT_A_TIME = 512
_PAIRS_SHOWN = 20


@click.group(cls=Group)
def index() -> None:
    """Make a search index of a file of texts, and keep it up to date.

    DIR is a folder, or the address of a collection of Milvus: milvus://HOST:19530/COLLECTION, or
    milvus:///path/to/file.db?collection=NAME for a file on this machine.
    """


@index.command()
@File
@click.option("--model", required=True, help="Sentence encoder: hub name or folder.")
@click.option("--out", required=True, metavar="DIR", help="Folder of the index, or the address of a Milvus collection.")
@file_options("number of the line, or row")
@Factory
@RecallTarget
@TuneQueries
@MemoryLimit
@Mmap
@click.option(
    "--devices", type=NamesType(), metavar="A,B", help="Devices that share the encoding: cuda:0,cuda:1.  [all GPUs]"
)
@precision_option("auto")
def build(
    file: Path,
    model: str,
    out: str,
    factory: str | None,
    recall_target: float,
    tune_queries: Path | None,
    memory_limit: int | None,
    mmap: bool | None,
    devices: list[str] | None,
    precision: Precision,
    **columns: Any,
) -> None:
    """Index the texts of FILE: one a line (.txt, also .gz), or a table (.csv, .tsv, .jsonl, .json, .parquet).

    Interrupted or killed, the same command goes on where it was.

    \b
    st-kdmcse index build sentences.txt --model kdmcse-bert --out my-index
    st-kdmcse index build articles.csv --text-column title --id-column number --model kdmcse-bert --out my-index
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors("stopped; what was encoded is kept, and the same command goes on from there"):
        records = record_file(file, columns)
        queries = _queries(tune_queries)
        place = parse_address(out)
        if isinstance(place, MilvusAddress):
            if factory or tune_queries or memory_limit or mmap or devices:
                raise ValueError(
                    "--factory, --tune-queries, --memory-limit, --mmap and --devices are for an index in a folder, not "
                    "for Milvus"
                )
            total = records.check()
            made = SemanticIndex.open(out, model, create=True, precision=precision)
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
                precision=precision,
                tune_queries=queries,
                mmap=mmap,
            )
        click.echo(f"{len(made):,} texts of {file} are in {out}")
        say_what_was_skipped(records)
        click.echo(f'search it: st-kdmcse search {shlex.quote(out)} "a query"')


@index.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Model of texts and images, as export makes it: hub name or folder.")
@click.option(
    "--images", "folder", type=click.Path(path_type=Path), help="Folder of the images, where SOURCE is a feature store."
)
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder of the index.")
@click.option(
    "--on-error",
    type=click.Choice(["raise", "skip"]),
    default="raise",
    show_default=True,
    help="Stop at an image that cannot be decoded, or skip it.",
)
@Factory
@RecallTarget
@TuneQueries
@MemoryLimit
def images(
    source: Path,
    model: str,
    folder: Path | None,
    out: Path,
    on_error: Literal["raise", "skip"],
    factory: str | None,
    recall_target: float,
    tune_queries: Path | None,
    memory_limit: int | None,
) -> None:
    """Index the images of the folder SOURCE, to be found by sentences and by images.

    SOURCE may be a feature store: its captions are then shown with the images, which are in --images.

    \b
    st-kdmcse export kdmcse-bert --out kdmcse-bert-image
    st-kdmcse index images photos --model kdmcse-bert-image --out my-images
    st-kdmcse search my-images "a dog in the snow"
    st-kdmcse search my-images --image photo.jpg
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors("stopped; nothing was written"):
        captions = None
        if (source / IMAGES).is_file():
            if folder is None:
                raise ValueError(f"{source} is a feature store: give the folder of its images as --images")
            captions = captions_by_image(FeatureStore.open(source))
        elif folder is not None:
            raise ValueError(f"--images goes with a feature store, and {source} is none")
        made = index_images(
            folder or source,
            model,
            out,
            captions=captions,
            on_error=on_error,
            factory=factory,
            recall_target=recall_target,
            memory_limit=memory_limit,
            tune_queries=_queries(tune_queries),
        )
        click.echo(f"{len(made):,} images of {folder or source} are in {out}")
        click.echo(f'search them: st-kdmcse search {shlex.quote(str(out))} "a query"')


@index.command()
@Address
@File
@file_options("new ids are made")
@Model
@precision_option("auto")
def add(address: str, file: Path, model: str | None, precision: Precision, **columns: Any) -> None:
    """Add the texts of FILE to the index DIR, a folder: all or none, and an interruption changes nothing."""
    quiet_libraries()
    with friendly_errors("stopped; the index is as it was (one in Milvus has what was added so far)"):
        records = record_file(file, columns)
        total = records.check()
        opened = SemanticIndex.open(address, model, precision=precision, mmap=False)
        made: list[str] = []
        for chunk in _chunks(records, total):
            ids = None if columns["id_column"] is None else [record.id for record in chunk]
            new = opened.add(_texts(chunk), ids, _metadata(chunk), show_progress_bar=False)
            made += new[: _PAIRS_SHOWN - len(made)]
        opened.save()
        click.echo(f"added {total:,} texts: {len(opened):,} are in {address}")
        say_what_was_skipped(records)
        if columns["id_column"] is None:
            more = f" and {total - len(made):,} more" if total > len(made) else ""
            click.echo(f"their ids: {', '.join(made)}{more}")


@index.command()
@Address
@File
@file_options("required")
@Model
@precision_option("auto")
def update(address: str, file: Path, model: str | None, precision: Precision, **columns: Any) -> None:
    """Replace texts and metadata of the index DIR by those of FILE with the same ids: all or none."""
    quiet_libraries()
    with friendly_errors("stopped; the index is as it was (one in Milvus has what was replaced so far)"):
        if columns["id_column"] is None:
            raise ValueError("--id-column is missing: which texts of the index are to be replaced?")
        records = record_file(file, columns)
        total = records.check()
        opened = SemanticIndex.open(address, model, precision=precision, mmap=False)
        for chunk in _chunks(records, total):
            ids = [record.id for record in chunk]
            opened.update(ids, _texts(chunk), _metadata(chunk), show_progress_bar=False)
        opened.save()
        click.echo(f"replaced {total:,} of the {len(opened):,} texts in {address}")
        say_what_was_skipped(records)


@index.command()
@Address
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@Model
def remove(address: str, ids: tuple[str, ...], model: str | None) -> None:
    """Remove texts from the index DIR by their ids: all or none."""
    quiet_libraries()
    with friendly_errors("stopped; the index is as it was"):
        opened = SemanticIndex.open(address, model, mmap=False)
        before = len(opened)
        opened.remove(ids)
        opened.save()
        click.echo(f"removed {before - len(opened):,} of {before:,} texts in {address}")


@index.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@Factory
@RecallTarget
@MemoryLimit
def copy(source: str, target: str, factory: str | None, recall_target: float, memory_limit: int | None) -> None:
    """Copy the index FROM to TO: from a folder into Milvus, back, or to an index of another type.

    The embeddings are copied as they are. Interrupted or killed, the same command goes on where it was.

    \b
    st-kdmcse index copy my-index "milvus://localhost/sentences?index=HNSW&index.M=16&index.efConstruction=200"
    st-kdmcse index copy milvus://localhost/sentences my-index-again
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors("stopped; what was copied is kept, and the same command goes on from there"):
        rows = copy_index(source, target, factory=factory, recall_target=recall_target, memory_limit=memory_limit)
        click.echo(f"{rows:,} rows of {source} are in {target}")


@index.command()
@Address
def compact(address: str) -> None:
    """Leave out of the index DIR, a folder, the vectors of texts that were removed or replaced.

    The index is filled, trained and tuned again on the texts that it has. Updates do so by themselves where a
    quarter of the vectors is of no text.
    """
    quiet_libraries()
    with friendly_errors("stopped; the index is as it was"):
        gone, done = compact_index(_folder(address, "Milvus compacts by itself"))
        if done:
            click.echo(f"left out {gone:,} vectors of texts that are gone")
        else:
            click.echo(f"{gone:,} vectors of texts that are gone stay: those of this index type cannot be read back")


@index.command()
@Address
def verify(address: str) -> None:
    """Compare every byte of the index DIR, a folder, with its checksums, however large it is."""
    quiet_libraries()
    with friendly_errors():
        backend, _ = read_index(_folder(address, "Milvus has no checksums"), mmap=True, verify="full")
        click.echo(f"every byte of {address} is as it was written: {len(backend):,} texts")


@index.command()
@Address
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def info(address: str, as_json: bool) -> None:
    """Show what the index DIR is: engine, model, counts, size, recall, and whether its files are intact.

    Above 1 GB it looks at sizes and a sample of the files; index verify reads all of them.
    """
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


def _queries(file: Path | None) -> list[str] | None:
    return None if file is None else _texts(RecordFile(file))


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
        backend, header = read_index(place, mmap=True)
    details = {name: header[name] for name in ("precision", "tuning", "versions", "date") if name in header}
    if details.get("tuning"):
        details["tuning"] = {**details["tuning"], "met": backend.tuning.met, "summary": str(backend.tuning)}
    intact = (
        {}
        if isinstance(place, MilvusAddress)
        else {"checksums": "ok" if verified_in_full(header) else "sizes and a sample are ok"}
    )
    unfinished = {"unfinished copy of": header[COPYING]["from"]} if COPYING in header else {}
    return {**backend.info(), "model": header.get("model"), **details, **intact, **unfinished}


def _folder(address: str, otherwise: str) -> Path:
    place = parse_address(address)
    if isinstance(place, MilvusAddress):
        raise ValueError(f"{address} is not a folder: {otherwise}")
    return place


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items() if each is not None)
    if isinstance(value, list):
        return " + ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
