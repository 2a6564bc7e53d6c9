"""Score a model on the seven STS tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import Whole, cxc_options, friendly_errors, precision_option, quiet_libraries
from st_kdmcse.data import STS_TASKS, load_cxc, load_sts_tasks
from st_kdmcse.encoding import assumed_pooling, load_model
from st_kdmcse.evaluation.sts import AS_SAVED, AVERAGE, POOLINGS, STSResult, evaluate_poolings, evaluate_sts, has_pooler
from st_kdmcse.files import check_output_file, write_json
from st_kdmcse.precision import Precision, resolve_precision
from st_kdmcse.provenance import provenance


@command()
@click.option("--model", required=True, help="Model: hub name or folder.")
@click.option(
    "--data-dir",
    required=True,
    help="SentEval directory, a folder of the hub's STS data sets, or their organisation on the hub (mteb).",
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file for the result.")
@click.option("--tasks", help=f"Tasks, separated by commas.  [{','.join(STS_TASKS)}]")
@cxc_options
@click.option(
    "--pooling",
    help=f"Other poolings to score: {','.join(POOLINGS)}, separated by commas; or all. Of a plain encoder, with which "
    "none was saved, the first is that of the model.  [mean, with a warning]",
)
@click.option("--device", help="Device, such as cpu or cuda:1.  [a GPU if there is one]")
@click.option("--batch-tokens", type=Whole(1), help="Tokens encoded at a time.  [CPU: 2048; else 16384]")
@precision_option("float32")
def main(
    model: str,
    data_dir: str,
    output: Path | None,
    tasks: str | None,
    cxc: Path | None,
    coco_captions: tuple[Path, ...],
    pooling: str | None,
    device: str | None,
    batch_tokens: int | None,
    precision: Precision,
) -> None:
    """Score a model on STS12 to STS16, STS-B and SICK-R (test sets): Spearman x 100 in SentEval's "all" setting.

    The average is that of these seven; CxC stands beside it.
    """
    quiet_libraries()
    with friendly_errors():
        check_output_file(output)
        names = [name.strip() for name in tasks.split(",")] if tasks else STS_TASKS
        found = load_sts_tasks(data_dir, names)
        if cxc is not None:
            found.append(load_cxc(cxc, coco_captions))
        poolings = [name.strip() for name in pooling.split(",")] if pooling else []
        encoder = load_model(model, device, _of_encoder(poolings))
        assumed = assumed_pooling(encoder)
        own = AS_SAVED if assumed is None else f"{assumed} (none saved)"
        computed = resolve_precision(precision, encoder.device)
        if pooling:
            if pooling == "all":
                poolings = [name for name in POOLINGS if name != "pooler" or has_pooler(encoder, model)]
            elif "pooler" in poolings and not has_pooler(encoder, model):
                raise ValueError(f"--pooling pooler: the checkpoint of {model} has no weights of a pooler")
            poolings = [name for name in poolings if name != assumed]
            results = evaluate_poolings(encoder, found, poolings, batch_tokens=batch_tokens, precision=computed)
        else:
            results = {AS_SAVED: evaluate_sts(encoder, found, batch_tokens=batch_tokens, precision=computed)}
        click.echo(table({own if name == AS_SAVED else name: result for name, result in results.items()}))
        if computed != "float32":
            click.echo(f"embeddings were computed in {computed}")
        result = results.pop(AS_SAVED)
        absent = [name for name in names if name in result.absent]
        if absent:
            click.echo(f"absent from {data_dir}: {', '.join(absent)}; so there is no {AVERAGE}")
        if output:
            checksums = {name: details["data_sha256"] for name, details in result.details.items()}
            record: dict[str, Any] = {
                "precision": computed,
                "spearman": result.spearman,
                "absent": absent,
                "details": result.details,
                "pooling": {
                    name: {"spearman": each.spearman, "details": each.details} for name, each in results.items()
                },
                **provenance(encoder, model, checksums),
            }
            write_json(output, record)
            click.echo(f"details: {output}")


def _of_encoder(poolings: list[str]) -> Literal["cls", "mean"] | None:
    """The pooling that a plain encoder is loaded with, from those asked for."""
    first = poolings[0] if poolings else None
    return "cls" if first == "cls" else "mean" if first == "mean" else None


def table(results: dict[str, STSResult]) -> str:
    """Spearman x 100, a row a model or pooling, a column a task."""
    width = max(map(len, results))
    columns = list(next(iter(results.values())).spearman)
    lines = [" " * width + "".join(f"{column:>8}" for column in columns)]
    for name, result in results.items():
        scores = [result.spearman[column] for column in columns]
        lines.append(f"{name:{width}}" + "".join("       -" if score is None else f"{score:8.2f}" for score in scores))
    return "\n".join(lines)
