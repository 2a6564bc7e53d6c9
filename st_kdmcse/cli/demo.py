"""``st-kdmcse demo``."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import friendly_errors, quiet_libraries
from st_kdmcse.demo.run import run_demo


@command(context_settings={"show_default": True})
@click.option("--output-dir", type=click.Path(path_type=Path), default=Path("kdmcse-demo"), help="Folder; a new one.")
@click.option("--seed", type=click.IntRange(0), default=42, help="Seed of scenes and training.")
@click.option("--quick", is_flag=True, help="Make everything smaller: less than a minute.")
def main(output_dir: Path, seed: int, quick: bool) -> None:
    """Try it all in a few minutes: train on generated scenes, score, search. It needs neither data nor network."""
    quiet_libraries()
    logging.getLogger("st_kdmcse.training.student").setLevel(logging.WARNING)  # the tour says how it pools
    with friendly_errors():
        run_demo(output_dir, seed, quick)
