"""What all commands share."""

from __future__ import annotations

import logging
import sys

import click
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

from st_kdmcse.data import BadRowError


def quiet_libraries() -> None:
    """Leave what a user waits for: the messages of this package, and the progress bar of the trainer or its own."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("st_kdmcse").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


class friendly_errors:  # noqa: N801 - a context manager, named like one
    """Turn errors that the user can mend into one line and an exit status: 2, or 130 after Ctrl-C.

    Args:
        after_interrupt: what to say after Ctrl-C, where the exception says nothing.
    """

    def __init__(self, after_interrupt: str = "stopped") -> None:
        self._after_interrupt = after_interrupt

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            click.echo(f"\n{str(error) or self._after_interrupt}", err=True)
            sys.exit(130)
        if isinstance(error, ValueError | OSError | ImportError):
            remedy = "; --on-error skip leaves bad rows out, and lists them" if isinstance(error, BadRowError) else ""
            click.echo(f"error: {error}{remedy}", err=True)
            sys.exit(2)
