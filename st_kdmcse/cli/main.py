"""The command ``st-kdmcse``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

COMMANDS = {
    "demo": ("demo:main", "Try it all: train on generated scenes, score, search. No data, no network."),
    "train": ("training:train_command", "Train a sentence encoder on sentences and captioned images."),
    "extract": ("extraction:extract", "Encode images and captions with a frozen teacher, and write a feature store."),
    "merge": ("extraction:merge_command", "Join the shards of an extraction into a feature store."),
    "inspect": ("extraction:inspect", "Show what is in a feature store."),
    "evaluate": ("main:evaluate", "Score a model on benchmarks, or look at what it has learned."),
    "export": ("export:main", "Make a model of sentences and images of a finished run."),
    "ablate": ("ablation:main", "Train several methods over seeds, and compare them."),
    "sweep": ("margin_sweep:main", "Train KDMCSE with several margins over seeds, and compare them."),
    "tune": ("tune:main", "Search for the options that score best, and train with them."),
    "compare": ("compare:main", "Compare finished runs, seed by seed."),
    "index": ("index:index", "Make a search index of a file of texts, and keep it up to date."),
    "search": ("search:search", "Search an index by meaning."),
    "serve": ("serve:serve", "Search an index in the browser, on a page that this machine serves."),
    "duplicates": ("search:duplicates", "Find near-duplicate texts in a file."),
}
"""Where each command is, in ``st_kdmcse.cli``, and what the list of commands says about it."""

EVALUATIONS = {
    "sts": ("sts:main", "Score a model on STS12 to STS16, STS-B and SICK-R, and CxC."),
    "cxc": ("cxc:main", "Score a model on caption pairs, or captions and images, of Crisscrossed Captions."),
    "transfer": ("transfer:main", "Score a model on MR, CR, SUBJ, MPQA, SST2, TREC and MRPC."),
    "retrieval": ("retrieval:main", "Find images by captions and captions by images: recall of student and teacher."),
    "mteb": ("mteb:main", "Run benchmarks or tasks of MTEB into official result files."),
    "alignment": ("alignment_uniformity:main", "Measure alignment and uniformity of models."),
    "thresholds": ("threshold_statistics:main", "Show how often a teacher's score reaches a threshold."),
    "plot": ("visualize:main", "Draw maps of sentences, and list nearest neighbours."),
}
"""Those of ``st-kdmcse evaluate``."""


class LazyGroup(click.Group):
    """A group that imports a command when it is called: PyTorch and the libraries around it take seconds.

    Args:
        table: of the commands, such as :data:`COMMANDS`.
    """

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, context_settings={"max_content_width": 120}, **kwargs)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is no such command."""
        if cmd_name not in self._table:
            return None
        module, _, attribute = self._table[cmd_name][0].partition(":")
        command: Any = getattr(import_module(f"st_kdmcse.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name, or say which one is near."""
        name = args[0]
        near = difflib.get_close_matches(name, self._table, n=1)
        if near and name not in self._table:
            ctx.fail(f"No such command {name!r}: did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._table.items()])


@click.group(cls=LazyGroup, table=COMMANDS)
@click.version_option(package_name="st-kdmcse")
def main() -> None:
    """Sentence encoders with knowledge from CLIP: train them, score them, search with them."""


@click.group(cls=LazyGroup, table=EVALUATIONS)
def evaluate() -> None:
    """Score a model on benchmarks, or look at what it has learned."""
