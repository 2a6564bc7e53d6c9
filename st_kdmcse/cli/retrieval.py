"""``st-kdmcse evaluate retrieval``."""

from __future__ import annotations

from pathlib import Path

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import friendly_errors, quiet_libraries
from st_kdmcse.data import FeatureStore
from st_kdmcse.encoding import load_model
from st_kdmcse.evaluation.retrieval import retrieval_table
from st_kdmcse.files import check_output_file, write_json
from st_kdmcse.losses.heads import HEADS_DIR
from st_kdmcse.provenance import provenance
from st_kdmcse.training.retrieval import RetrievalHeads, image_text_retrieval

_PATH = click.Path(path_type=Path)


@command()
@click.argument("run", type=_PATH)
@click.option("--features", type=_PATH, required=True, help="Feature store of images that were not trained on.")
@click.option("--only", type=_PATH, help="Images of it: an id a line, or a .csv with a column image.  [all]")
@click.option(
    "--folds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Parts of successive images to average over; 5 for the 1K protocol of MS-COCO.",
)
@click.option("--output", type=_PATH, help="JSON file for the result.")
@click.option("--device", help="Device, such as cpu or cuda:1.  [a GPU if there is one]")
def main(run: Path, features: Path, only: Path | None, folds: int, output: Path | None, device: str | None) -> None:
    """Find images by captions and captions by images, with the student in RUN and its heads, and with its teacher.

    R@k is the share of queries, in percent, with a right result among the first k. Chance stands below.
    """
    quiet_libraries()
    with friendly_errors():
        check_output_file(output)
        store = FeatureStore.open(features)
        heads = RetrievalHeads.load(run / HEADS_DIR, store)
        student = load_model(str(run), device)
        results = image_text_retrieval(student, heads, store, only, folds)
        click.echo(retrieval_table(results))
        click.echo(f"teacher: {store.teacher}" + ("" if store.shared_space else "; it has no space of both"))
        if output is not None:
            records = {
                name: {direction: each.to_dict() for direction, each in result.items()}
                for name, result in results.items()
            }
            origin = provenance(student, run.name, {"features": store.checksum})
            write_json(output, {"retrieval": records, "folds": folds, "teacher": store.teacher, **origin})
            click.echo(f"details: {output}")
