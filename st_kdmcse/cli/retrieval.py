"""``st-kdmcse evaluate retrieval``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import friendly_errors, precision_option, quiet_libraries
from st_kdmcse.data import FeatureStore, open_captions, sha256_file
from st_kdmcse.data.readers import FORMATS
from st_kdmcse.encoding import load_model
from st_kdmcse.evaluation.retrieval import Retrieval, evaluate_images, retrieval_table
from st_kdmcse.files import check_output_file, write_json
from st_kdmcse.losses.heads import HEADS_DIR
from st_kdmcse.precision import Precision
from st_kdmcse.provenance import provenance
from st_kdmcse.training.retrieval import RetrievalHeads, image_text_retrieval

_PATH = click.Path(path_type=Path)


@command()
@click.argument("model")
@click.option("--captions", help="Captions of --images, in any format of extract; for a model of sentences and images.")
@click.option("--images", type=_PATH, help="Folder of the images of --captions.")
@click.option("--captions-format", type=click.Choice(["auto", *FORMATS]), default="auto", help="Format of --captions.")
@click.option("--split", help="Part of --captions: a name, or a file of image ids.")
@click.option("--features", type=_PATH, help="Feature store of images that were not trained on; for a run.")
@click.option("--only", type=_PATH, help="Images of --features: an id a line, or a .csv with a column image.  [all]")
@click.option(
    "--folds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Parts of successive images to average over; 5 for the 1K protocol of MS-COCO.",
)
@click.option("--output", type=_PATH, help="JSON file for the result.")
@click.option("--device", help="Device, such as cpu or cuda:1.  [a GPU if there is one]")
@precision_option("float32")
def main(
    model: str,
    captions: str | None,
    images: Path | None,
    captions_format: str,
    split: str | None,
    features: Path | None,
    only: Path | None,
    folds: int,
    output: Path | None,
    device: str | None,
    precision: Precision,
) -> None:
    """Find images by captions and captions by images, by Karpathy's protocol.

    MODEL is a model of sentences and images, such as export makes, and --captions and --images are files; or it is the
    folder of a run with its heads, and --features has features of its teacher, which is then shown beside it.

    R@k is the share of queries, in percent, with a right result among the first k. Chance stands below.

    \b
    st-kdmcse evaluate retrieval kdmcse-bert-image --captions dataset_flickr30k.json --images flickr30k --split test
    st-kdmcse evaluate retrieval kdmcse-bert-image --captions dataset_coco.json --images coco --split test --folds 5
    st-kdmcse evaluate retrieval kdmcse-bert --features flickr30k-test-features
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors():
        check_output_file(output)
        if (captions is None) == (features is None):
            raise ValueError("give either --captions, for a model of sentences and images, or --features, for a run")
        if captions is None and (images is not None or split is not None):
            raise ValueError("--images and --split go with --captions")
        if only is not None and features is None:
            raise ValueError("--only goes with --features")
        results: Mapping[str, Mapping[str, Retrieval]]
        if features is not None:
            store = FeatureStore.open(features)
            heads = RetrievalHeads.load(Path(model, HEADS_DIR), store)
            encoder = load_model(model, device)
            results = image_text_retrieval(encoder, heads, store, only, folds)
            about, data = {"teacher": store.teacher}, {"features": store.checksum}
        else:
            reader = open_captions(captions or "", images, captions_format, split)
            encoder = load_model(model, device)
            results = {"model": evaluate_images(encoder, reader, folds, precision=precision)}
            file = Path(captions or "")
            about, data = {}, {"captions": sha256_file(file)} if file.is_file() else {}
        click.echo(retrieval_table(results))
        if features is not None:
            click.echo(f"teacher: {store.teacher}" + ("" if store.shared_space else "; it has no space of both"))
        if output is not None:
            _write(output, results, {"folds": folds, **about, **provenance(encoder, Path(model).name, data)})


def _write(output: Path, results: Mapping[str, Mapping[str, Retrieval]], origin: Mapping[str, Any]) -> None:
    records = {
        name: {direction: each.to_dict() for direction, each in result.items()} for name, result in results.items()
    }
    write_json(output, {"retrieval": records, **origin})
    click.echo(f"details: {output}")
