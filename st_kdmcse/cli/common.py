"""What all commands share: quiet libraries, errors in one line, and parameters shown as the flags of the command."""

from __future__ import annotations

import logging
import math
import re
import sqlite3
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

from st_kdmcse.cli.commands import shows_tracebacks
from st_kdmcse.data import BadRowError
from st_kdmcse.precision import PRECISIONS, Precision

Command = Callable[..., Any]

_PARAMETER = re.compile(r"`([a-z][a-z0-9_]*(?:=False)?)`")
_PREFIXES = ("", "extraction_")


def quiet_libraries() -> None:
    """Show the messages of this package and one progress bar at a time, and silence the libraries under it."""
    handler = logging.StreamHandler()
    handler.setFormatter(_FlagFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("st_kdmcse").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


def with_flags(message: str) -> str:
    """A message of the library in the words of the command that runs.

    ```batch_size``` becomes ``--batch-size``, and ```bf16=False``` ``--no-bf16``.

    Args:
        message: with parameters in backquotes; those that the command does not have stay as they are.
    """
    context = click.get_current_context(silent=True)
    if context is None:
        return message
    flags: dict[str, str] = {}
    for parameter in context.command.params:
        if isinstance(parameter, click.Option) and parameter.name:
            flags[parameter.name] = max(parameter.opts, key=len)
            flags |= {f"{parameter.name}=False": off for off in parameter.secondary_opts}

    def flag(match: re.Match[str]) -> str:
        found = (flags.get(prefix + match[1]) for prefix in _PREFIXES)
        return next((each for each in found if each), match[0])

    return _PARAMETER.sub(flag, message)


class _FlagFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return with_flags(super().format(record))


def precision_option(default: Precision) -> Callable[[Command], Command]:
    """The option ``--precision`` of commands that encode texts.

    Args:
        default: "auto", or "float32" for scores that are reported.
    """
    text = "Encode texts in it; auto is bfloat16 where that is faster."
    return click.option("--precision", type=click.Choice(PRECISIONS), default=default, show_default=True, help=text)


def pooling_option(command: Command) -> Command:
    """The option ``--pooling`` of commands that score models."""
    text = "Pooling of a plain encoder, with which none was saved.  [mean, with a warning]"
    return click.option("--pooling", type=click.Choice(["cls", "mean"]), help=text)(command)


def cxc_options(command: Command) -> Command:
    """Give a command the caption pairs of CxC as a task: ``cxc`` and ``coco_captions``."""
    path = click.Path(path_type=Path)
    captions = "Annotations of MS-COCO with the captions of --cxc, such as captions_val2014.json; may be repeated."
    command = click.option("--coco-captions", type=path, multiple=True, callback=_with_cxc, help=captions)(command)
    return click.option("--cxc", type=path, is_eager=True, help="sts_val.csv or sts_test.csv of CxC.")(command)


def _with_cxc(context: click.Context, parameter: click.Parameter, value: tuple[Path, ...]) -> tuple[Path, ...]:
    if bool(value) != (context.params.get("cxc") is not None):
        raise click.UsageError("--cxc and --coco-captions go together: give both, or none")
    return value


class _Finite(click.types.FloatParamType):
    """A number that is neither infinite nor nan."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Whole(click.types.IntParamType):
    """A whole number of 32 bits; with a range of click, its upper end would stand in the help text.

    Args:
        smallest: that is allowed.
        largest: that is allowed.
    """

    def __init__(self, smallest: int, largest: int = 2**31 - 1) -> None:
        self._smallest, self._largest = smallest, largest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        number = super().convert(value, param, ctx)
        if not self._smallest <= number <= self._largest:
            self.fail(f"{number} is not from {self._smallest} to {self._largest}", param, ctx)
        return number


class ListType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A list separated by commas.

    Args:
        kind: of each part.
    """

    name = "A,B,..."

    def __init__(self, kind: Callable[[str], Any] = str) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The parts as a list."""
        if isinstance(value, list):
            return value
        try:
            return [self._kind(part.strip()) for part in str(value).split(",") if part.strip()]
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


NUMBER = _Finite()
"""The type of options that are numbers."""
COUNT = Whole(-(2**31))
"""The type of options that are whole numbers; what is below 0 has messages of its own."""
SEED = Whole(0, 2**32 - 1)
"""The type of seeds, as NumPy takes them."""


class friendly_errors:  # noqa: N801 - a context manager, named like one
    """Turn errors that the user can mend into one line and an exit status: 2, or 130 after Ctrl-C.

    Args:
        after_interrupt: what to say after Ctrl-C, where the exception says nothing.
    """

    def __init__(self, after_interrupt: str = "stopped") -> None:
        self._after_interrupt = after_interrupt

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            click.echo(f"\n{with_flags(str(error)) or self._after_interrupt}", err=True)
            sys.exit(130)
        if isinstance(error, ValueError | OSError | ImportError | sqlite3.Error):
            if shows_tracebacks():
                click.echo("".join(traceback.format_exception(error)), err=True)
            remedy = "; --on-error skip leaves bad rows out, and lists them" if isinstance(error, BadRowError) else ""
            click.echo(f"error: {with_flags(str(error))}{remedy}", err=True)
            sys.exit(2)
