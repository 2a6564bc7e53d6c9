"""Command-line options of the grids of training runs, and what their scripts do when the runs are over."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from st_kdmcse.cli.common import SEED, Whole
from st_kdmcse.cli.training import config_options, given_config, training_options
from st_kdmcse.config import KDMCSEConfig
from st_kdmcse.data import load_sts_tasks
from st_kdmcse.data.sts import STSTask
from st_kdmcse.experiments.comparison import Comparison, compare_runs
from st_kdmcse.experiments.grid import GridResult, shared_features
from st_kdmcse.experiments.report import check_output
from st_kdmcse.experiments.runs import read_run

Command = Callable[..., Any]

_SET_BY_THE_GRID = {"method", "seed", "output_dir", "resume", "run_name", "push_to_hub", "private"}


class SeedsType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number of seeds, from 0 on, or a list of seeds: ``5`` is ``0,1,2,3,4``."""

    name = "N|S,S,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The seeds as a list."""
        if isinstance(value, list):
            return value
        try:
            seeds = [int(part) for part in value.strip(",").split(",")] if "," in value else list(range(int(value)))
        except ValueError:
            seeds = []
        if not seeds or min(seeds) < 0:
            self.fail(f"{value!r} is neither a number of seeds, such as 5, nor a list, such as 0,1,2 or 7,", param, ctx)
        return seeds


def grid_options(*, config: bool = True, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Give a command the folder of a grid, its seeds and its report, and the options of a training.

    Args:
        config: whether it has those of the config.
        without: options that it does not have.
    """

    def decorate(command: Command) -> Command:
        command = training_options(config_options(command) if config else command, Path())
        command = report_options("ROOT/report")(command)
        parameters: list[click.Parameter] = command.__click_params__  # type: ignore[attr-defined]
        parameters[:] = [each for each in parameters if each.name not in {*_SET_BY_THE_GRID, *without}]
        for option in (
            click.option(
                "--jobs",
                type=Whole(1),
                default=1,
                show_default=True,
                help="Runs at a time; they share the CPU.",
            ),
            click.option("--keep-checkpoints", is_flag=True, help="Keep the trainer's state of finished runs."),
            click.option(
                "--seeds",
                type=SeedsType(),
                default="5",
                show_default=True,
                help="Number of seeds, from 0 on, or a list: 0,3.",
            ),
            click.argument("root", type=click.Path(path_type=Path)),
        ):
            command = option(command)
        return command

    return decorate


def report_options(output: str) -> Callable[[Command], Command]:
    """Give a command the options of a report.

    Args:
        output: where the report goes by default, for the help.
    """

    def decorate(command: Command) -> Command:
        replicates = "Replicates of the bootstrap over sentence pairs; 0 for none."
        for option in (
            click.option("--bootstrap-seed", type=SEED, default=0, show_default=True),
            click.option("--bootstrap", type=Whole(0), default=1000, show_default=True, help=replicates),
            click.option("--output", type=click.Path(path_type=Path), help=f"Folder for the report.  [{output}]"),
            click.option(
                "--data-dir",
                help="SentEval folder: score the models on its STS tasks.  [STS-B, from the training]",
            ),
        ):
            command = option(command)
        return command

    return decorate


def prepare_report(data_dir: str | None, output: Path) -> list[STSTask]:
    """Find out what would spoil the report, before anything is trained or scored for it.

    Args:
        data_dir: SentEval folder, or None.
        output: the folder of the report.

    Returns:
        The STS tasks in ``data_dir``; none without it.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: if there are no such data, or ``output`` is a file.
        ImportError: without matplotlib.
    """
    check_output(output)
    return load_sts_tasks(data_dir) if data_dir else []


def report_files(output: Path) -> list[Path]:
    """The files of a report.

    Args:
        output: its folder.
    """
    return [output / f"report.{ending}" for ending in ("html", "md", "json")]


def split_options(arguments: dict[str, Any], root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of parsed options, those of the training, and those of its config.

    Args:
        arguments: values of :func:`grid_options` by name, without those of the grid itself.
        root: the folder of the grid, where converted features go.
    """
    names = {option.name for option in fields(KDMCSEConfig)}
    options = {name: value for name, value in arguments.items() if name not in names}
    return {**options, "features": shared_features(root, options["features"])}, given_config(arguments)


def compare_grid(result: GridResult, tasks: Sequence[STSTask], bootstrap: int, bootstrap_seed: int) -> Comparison:
    """Compare the finished runs of a grid.

    Args:
        result: of :func:`~st_kdmcse.experiments.grid.run_grid`.
        tasks: of :func:`prepare_report`.
        bootstrap: replicates.
        bootstrap_seed: of the resamples.

    Raises:
        ValueError: if no run is finished.
    """
    if not result.finished:
        raise ValueError("no run has finished, so there is nothing to report")
    return compare_runs(
        [read_run(folder) for folder in result.finished],
        tasks,
        replicates=bootstrap,
        seed=bootstrap_seed,
        left_out=[f"{folder} failed: {error}" for folder, error in result.failed.items()],
    )


def finish(result: GridResult, report: str, files: Sequence[Path]) -> None:
    """Show a report, and exit with status 1 if a run has failed.

    Args:
        result: of :func:`~st_kdmcse.experiments.grid.run_grid`.
        report: the tables for the terminal.
        files: that were written.
    """
    click.echo(f"\n{report}\n\nreport: {', '.join(map(str, files))}")
    if result.failed:
        click.echo(f"{len(result.failed)} of {len(result.failed) + len(result.finished)} runs failed:", err=True)
        for folder, error in result.failed.items():
            click.echo(f"  {folder}: {error}", err=True)
        sys.exit(1)
