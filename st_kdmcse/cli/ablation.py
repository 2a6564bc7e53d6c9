"""Tables 3 and 5: train the methods over seeds, and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import ListType, friendly_errors, quiet_libraries
from st_kdmcse.cli.grid import compare_grid, finish, grid_options, prepare_report, report_files, split_options
from st_kdmcse.experiments.grid import method_grid, run_grid
from st_kdmcse.experiments.report import write_report
from st_kdmcse.training.methods import METHODS


@command()
@grid_options()
@click.option("--methods", type=ListType(), help=f"Methods to train.  [{','.join(METHODS)}]")
def main(
    root: Path,
    methods: list[str] | None,
    seeds: list[int],
    jobs: int,
    keep_checkpoints: bool,
    data_dir: str | None,
    output: Path | None,
    bootstrap: int,
    bootstrap_seed: int,
    **arguments: Any,
) -> None:
    """Train methods over seeds in ROOT/METHOD/seed-N, and write a report that compares them.

    \b
    python evaluation/ablation.py ablation --text wiki1m_for_simcse.txt --features flickr30k-features --seeds 5

    A finished run is never repeated and an interrupted one goes on where it was: give the same command again. An
    option that a method does not have is left out for it. All methods, SimCSE too, get the sentences of --text and the
    captions of --features.
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    output = output or root / "report"
    with friendly_errors("stopped; the same command goes on from there"):
        tasks = prepare_report(data_dir, output)
        options, config = split_options(arguments, root)
        result = run_grid(method_grid(root, methods or list(METHODS), seeds, config, **options), keep_checkpoints, jobs)
        comparison = compare_grid(result, tasks, bootstrap, bootstrap_seed)
        finish(result, write_report(comparison, output, "Ablation"), report_files(output))
