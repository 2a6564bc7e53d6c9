"""``st-kdmcse evaluate mteb``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import Whole, friendly_errors, pooling_option, precision_option, quiet_libraries
from st_kdmcse.encoding import load_model
from st_kdmcse.evaluation.mteb_results import evaluate_mteb, load_mteb_tasks
from st_kdmcse.files import check_output_file
from st_kdmcse.precision import Precision, resolve_precision


@command()
@click.option("--model", required=True, help="Model: hub name or folder.")
@click.option("--benchmark", help='Benchmark, such as "MTEB(eng, v2)".')
@click.option("--tasks", help="Tasks instead, separated by commas, such as STS12,NFCorpus.")
@click.option(
    "--output-dir", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the results."
)
@click.option("--name", help="Name of the model in the results: ORGANIZATION/NAME.  [hub name, or local/FOLDER]")
@pooling_option
@click.option("--device", help="Device, such as cpu or cuda:1.  [a GPU if there is one]")
@click.option("--batch-size", type=Whole(1), default=32, show_default=True, help="Texts encoded at a time.")
@precision_option("float32")
def main(
    model: str,
    benchmark: str | None,
    tasks: str | None,
    output_dir: Path,
    name: str | None,
    pooling: Literal["cls", "mean"] | None,
    device: str | None,
    batch_size: int,
    precision: Precision,
) -> None:
    """Run a benchmark or tasks of MTEB with mteb's library, into result files that its tools and leaderboard read.

    \b
    st-kdmcse evaluate mteb --model kdmcse-bert --benchmark "MTEB(eng, v2)" --output-dir mteb-results
    st-kdmcse evaluate mteb --model kdmcse-bert --tasks STS12,SICK-R --output-dir mteb-results

    The data come from the Hugging Face hub. Tasks with results in the folder, by the same weights, are not run again.
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors(f"stopped: the same command goes on after the tasks in {output_dir}"):
        check_output_file(output_dir / "results.json")  # makes the folder, or says why it cannot
        found = load_mteb_tasks(benchmark, [each.strip() for each in tasks.split(",")] if tasks else [])
        encoder = load_model(model, device, pooling)
        computed = resolve_precision(precision, encoder.device)
        result = evaluate_mteb(
            encoder, found, output_dir, name=name or _name(model), batch_size=batch_size, precision=computed
        )
        click.echo(table(result))
        if computed != "float32":
            click.echo(f"embeddings were computed in {computed}")
        click.echo(f"results: {output_dir / 'results'}")
        if result.exceptions:
            first = result.exceptions[0]
            reason = str(first.exception).strip().partition("\n")[0]
            raise ValueError(
                f"{len(result.exceptions)} of {len(found)} tasks failed, the first is {first.task_name}: {reason}; the "
                "same command tries those again, and no others"
            )


def _name(model: str) -> str:
    """The name of a hub model, or of a folder."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def table(result: Any) -> str:
    """The main score x 100 of each task."""
    rows = [(each.task_name, 100 * each.get_score(), each.task.metadata.main_score) for each in result.task_results]
    width = max((len(name) for name, *_ in rows), default=0)
    return "\n".join(f"{name:{width}}  {score:6.2f}  {metric}" for name, score, metric in rows)
