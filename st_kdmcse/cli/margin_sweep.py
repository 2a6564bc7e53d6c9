"""Figure 7: train KDMCSE with several margins over seeds, and plot the score against the margin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import ListType, friendly_errors, quiet_libraries
from st_kdmcse.cli.grid import compare_grid, finish, grid_options, prepare_report, report_files, split_options
from st_kdmcse.experiments.grid import margin_grid, run_grid
from st_kdmcse.experiments.report import write_sweep_report

MARGINS = "0.025,0.05,0.075,0.1,0.125,0.15,0.175,0.2,0.225"


@command()
@grid_options(without=["margin"])
@click.option("--margins", type=ListType(float), default=MARGINS, show_default=True, help="Margins in radians.")
def main(
    root: Path,
    margins: list[float],
    seeds: list[int],
    jobs: int,
    keep_checkpoints: bool,
    data_dir: str | None,
    output: Path | None,
    bootstrap: int,
    bootstrap_seed: int,
    **arguments: Any,
) -> None:
    """Train KDMCSE with several margins in ROOT/margin-M/seed-N, and write a report with the score against the margin.

    \b
    python evaluation/margin_sweep.py sweep --text wiki1m_for_simcse.txt --features flickr30k-features --seeds 5

    A finished run is never repeated and an interrupted one goes on where it was: give the same command again.
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    output = output or root / "report"
    with friendly_errors("stopped; the same command goes on from there"):
        tasks = prepare_report(data_dir, output)
        options, config = split_options(arguments, root)
        result = run_grid(margin_grid(root, margins, seeds, config, **options), keep_checkpoints, jobs)
        comparison = compare_grid(result, tasks, bootstrap, bootstrap_seed)
        finish(result, write_sweep_report(comparison, output), report_files(output))
