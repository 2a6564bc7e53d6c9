"""Score a model on SentEval's transfer tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import COUNT, SEED, Whole, friendly_errors, pooling_option, precision_option, quiet_libraries
from st_kdmcse.data.transfer import TRANSFER_TASKS
from st_kdmcse.encoding import load_model
from st_kdmcse.evaluation.transfer import AVERAGE, TransferProtocol, evaluate_transfer
from st_kdmcse.files import check_output_file
from st_kdmcse.precision import Precision


@command()
@click.option("--model", required=True, help="Model: hub name or folder.")
@click.option("--data-dir", required=True, help="SentEval directory.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON file for the result, written after each task. The same command goes on after the tasks in it.",
)
@click.option("--tasks", help=f"Tasks, separated by commas.  [{','.join(TRANSFER_TASKS)}]")
@click.option(
    "--folds", type=COUNT, default=10, show_default=True, help="Folds of each cross-validation; fewer for a quick look."
)
@click.option(
    "--seed", type=SEED, default=1111, show_default=True, help="Seed of the shuffle before rows are dealt into folds."
)
@click.option("--device", help="Device of the embeddings, such as cpu or cuda:1.  [a GPU if there is one]")
@click.option("--batch-tokens", type=Whole(1), help="Tokens encoded at a time.  [CPU: 2048; else 16384]")
@precision_option("float32")
@pooling_option
@click.option("--jobs", type=Whole(1), help="Classifiers trained at a time.  [all cores]")
def main(
    model: str,
    data_dir: str,
    output: Path | None,
    tasks: str | None,
    folds: int,
    seed: int,
    device: str | None,
    batch_tokens: int | None,
    precision: Precision,
    pooling: Literal["cls", "mean"] | None,
    jobs: int | None,
) -> None:
    """Score a model on MR, CR, SUBJ, MPQA, SST2, TREC and MRPC: logistic regression on frozen embeddings."""
    quiet_libraries()
    with friendly_errors(f"stopped: the same command goes on after the tasks in {output}" if output else "stopped"):
        check_output_file(output)
        names = [name.strip() for name in tasks.split(",")] if tasks else list(TRANSFER_TASKS)
        result = evaluate_transfer(
            load_model(model, device, pooling),
            data_dir,
            names,
            TransferProtocol(folds, seed),
            model_name=model,
            output=output,
            jobs=jobs,
            batch_tokens=batch_tokens,
            precision=precision,
        )
        click.echo(table(result))
        if result["absent"]:
            click.echo(f"absent from {data_dir}: {', '.join(result['absent'])}; so there is no {AVERAGE}")
        if output:
            click.echo(f"details: {output}")


def table(result: dict[str, Any]) -> str:
    """Accuracy x 100, on the development part too, a row a task."""
    lines = ["task   accuracy     dev      C"]
    for name, details in result["details"].items():
        chosen = sorted(set(details["c"]))
        c = f"{chosen[0]:g}" if len(chosen) == 1 else f"{chosen[0]:g} to {chosen[-1]:g}"
        f1 = f"   F1 {details['f1']:.2f}" if "f1" in details else ""
        lines.append(f"{name:5}  {details['accuracy']:8.2f}  {details['dev_accuracy']:6.2f}      {c}{f1}")
    average = result["accuracy"][AVERAGE]
    lines.append(f"{AVERAGE:5}  " + ("       -" if average is None else f"{average:8.2f}"))
    return "\n".join(lines)
