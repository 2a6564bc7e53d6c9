"""Options that the commands of search share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from st_kdmcse.search.records import RecordFile

Command = Callable[..., Any]


_UNITS = {"": 1, **{unit: 1 << (10 * power) for power, unit in enumerate("KMGT", start=1)}}


class SizeType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number of bytes, such as ``4GiB``, ``512MiB`` or ``1.5G``; units are powers of 1,024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number of bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
        size = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
        if not 1 <= size < 2**63:
            self.fail(f"{value!r} is not a size, such as 4GiB or 512MiB", param, ctx)
        return int(size)


class NamesType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Names separated by commas; ``none`` gives an empty list."""

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
    help="Recall@10 on new queries that an approximate index is tuned to, with 99.5 % confidence.",
)


TuneQueries = click.option(
    "--tune-queries",
    type=click.Path(path_type=Path),
    help="File of queries such as users ask, one a line, to tune the index on.  [some of what is indexed]",
)


MemoryLimit = click.option(
    "--memory-limit", type=SizeType(), help="Memory for the vectors, such as 4GiB.  [half of what is free]"
)


Mmap = click.option(
    "--mmap/--no-mmap",
    default=None,
    help="Leave the vectors on disk, memory-mapped; such an index cannot be changed.  [where memory is short]",
)


def record_file(path: Path, columns: Mapping[str, Any]) -> RecordFile:
    """The file of a command, with the columns that its options name."""
    return RecordFile(
        path,
        text_column=columns["text_column"],
        id_column=columns["id_column"],
        metadata=columns.get("metadata"),
        on_empty="raise" if columns["refuse_empty"] else "skip",
    )


def say_what_was_skipped(records: RecordFile) -> None:
    """Tell how many rows without text were left out."""
    if records.skipped:
        click.echo(f"left out {records.skipped:,} without text, the first at {records.first_skipped}")
