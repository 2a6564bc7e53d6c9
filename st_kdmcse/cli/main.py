"""The command ``st-kdmcse``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

COMMANDS = {
    "extract": ("extraction:extract", "Encode images and captions with a frozen teacher, and write a feature store."),
    "merge": ("extraction:merge_command", "Join the shards of an extraction into a feature store."),
    "inspect": ("extraction:inspect", "Show what is in a feature store."),
    "index": ("index:index", "Make a search index of a file of texts, and keep it up to date."),
    "search": ("search:search", "Search an index by meaning."),
    "serve": ("serve:serve", "Search an index in the browser, on a page that this machine serves."),
    "duplicates": ("search:duplicates", "Find near-duplicate texts in a file."),
}
"""Where each command is, in ``st_kdmcse.cli``, and what the list of commands says about it."""


class LazyGroup(click.Group):
    """A group that imports a command when it is called: PyTorch and the libraries around it take seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: Any = getattr(import_module(f"st_kdmcse.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"max_content_width": 120})
@click.version_option(package_name="st-kdmcse")
def main() -> None:
    """Sentence encoders with knowledge from CLIP: teacher features to train with, semantic search with the result."""
