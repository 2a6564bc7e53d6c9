"""Compare finished training runs: one report in Markdown, HTML and JSON."""

from __future__ import annotations

from pathlib import Path

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import friendly_errors, quiet_libraries
from st_kdmcse.cli.grid import prepare_report, report_files, report_options
from st_kdmcse.experiments.comparison import compare_runs
from st_kdmcse.experiments.report import write_report
from st_kdmcse.experiments.runs import find_runs


@command()
@click.argument("run_dirs", nargs=-1, required=True)
@report_options("comparison")
@click.option("--title", default="Comparison of methods", show_default=True)
def main(
    run_dirs: tuple[str, ...],
    data_dir: str | None,
    output: Path | None,
    bootstrap: int,
    bootstrap_seed: int,
    title: str,
) -> None:
    """Compare the finished runs in RUN_DIRS: run folders, folders above them, or LABEL=FOLDER.

    \b
    python evaluation/compare.py ablation --data-dir SentEval/data/downstream
    python evaluation/compare.py ours=kdmcse-bert theirs=mcse-bert --data-dir SentEval/data/downstream

    Runs that differ in nothing but the seed make a method. The scores of a model are kept in its run folder, so that
    a second report takes seconds.
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    output = output or Path("comparison")
    with friendly_errors("stopped; the models that were scored are kept, and the same command goes on from there"):
        tasks = prepare_report(data_dir, output)
        found = find_runs(run_dirs)
        comparison = compare_runs(found.runs, tasks, replicates=bootstrap, seed=bootstrap_seed, left_out=found.left_out)
        tables = write_report(comparison, output, title)
        click.echo(f"{tables}\n\nreport: {', '.join(map(str, report_files(output)))}")
