"""``st-kdmcse evaluate cxc``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import SEED, Whole, friendly_errors, pooling_option, precision_option, quiet_libraries
from st_kdmcse.data import FeatureStore, load_cxc, load_sits
from st_kdmcse.data.cxc import cxc_kind
from st_kdmcse.encoding import load_model
from st_kdmcse.evaluation.cxc import CxCResult, evaluate_cxc, evaluate_sits
from st_kdmcse.files import check_output_file, write_json
from st_kdmcse.losses.heads import HEADS_DIR
from st_kdmcse.precision import Precision, resolve_precision
from st_kdmcse.provenance import provenance
from st_kdmcse.training.retrieval import RetrievalHeads, caption_image_similarity

_PATH = click.Path(path_type=Path)


@command()
@click.option("--model", required=True, help="Model: hub name or folder; for --features the folder of a run.")
@click.option(
    "--cxc",
    type=_PATH,
    required=True,
    help="sts_val.csv (caption pairs) or sits_val.csv (captions and images) of CxC, or the same of the test split.",
)
@click.option(
    "--captions",
    type=_PATH,
    required=True,
    multiple=True,
    help="Annotations of MS-COCO with the captions, such as captions_val2014.json; may be repeated.",
)
@click.option("--images", type=_PATH, help="Folder of the images of sits_*.csv, for a model of sentences and images.")
@click.option("--features", type=_PATH, help="Feature store of the images of sits_*.csv, for a run with its heads.")
@click.option("--output", type=_PATH, help="JSON file for the result.")
@pooling_option
@click.option("--device", help="Device, such as cpu or cuda:1.  [a GPU if there is one]")
@click.option("--batch-tokens", type=Whole(1), help="Tokens encoded at a time.  [CPU: 2048; else 16384]")
@precision_option("float32")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the bootstrap.")
def main(
    model: str,
    cxc: Path,
    captions: tuple[Path, ...],
    images: Path | None,
    features: Path | None,
    output: Path | None,
    pooling: Literal["cls", "mean"] | None,
    device: str | None,
    batch_tokens: int | None,
    precision: Precision,
    seed: int,
) -> None:
    """Score a model on Crisscrossed Captions (Parekh et al., EACL 2021): Spearman x 100 with human similarities.

    \b
    st-kdmcse evaluate cxc --model kdmcse-bert --cxc sts_val.csv --captions captions_val2014.json
    st-kdmcse evaluate cxc --model kdmcse-image --cxc sits_val.csv --captions captions_val2014.json --images val2014

    Over all pairs, and by the bootstrap of the paper: mean and standard deviation of 1,000 draws of half of the queries
    (the first column) with one pair each.
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors():
        check_output_file(output)
        kind = cxc_kind(cxc)
        if kind == "STS" and (images or features):
            raise ValueError(f"{cxc} compares captions with each other: leave out `images` and `features`")
        if kind == "SITS" and (images is None) == (features is None):
            raise ValueError(f"{cxc} compares captions with images: give either `images` or `features`")
        encoding: dict[str, Any] = {"batch_tokens": batch_tokens, "seed": seed}
        if kind == "STS":
            task = load_cxc(cxc, captions)
            encoder = load_model(model, device, pooling)
            computed = resolve_precision(precision, encoder.device)
            result, checksums = evaluate_cxc(encoder, task, precision=computed, **encoding), {"cxc": task.checksum}
        else:
            pairs = load_sits(cxc, captions)
            checksums = {"cxc": pairs.checksum}
            store = None if features is None else FeatureStore.open(features)
            heads = None if store is None else RetrievalHeads.load(Path(model) / HEADS_DIR, store)
            encoder = load_model(model, device, pooling)
            computed = resolve_precision(precision, encoder.device)
            if store is not None and heads is not None:
                result = caption_image_similarity(encoder, heads, store, pairs, seed, computed)
                checksums["features"] = store.checksum
            else:
                assert images is not None
                result = evaluate_sits(encoder, pairs, images, precision=computed, **encoding)
        click.echo(table(kind, result))
        if computed != "float32":
            click.echo(f"embeddings were computed in {computed}")
        if output is not None:
            record = {"task": kind, **result.to_dict(), "precision": computed}
            write_json(output, {**record, **provenance(encoder, model, checksums, seed)})
            click.echo(f"details: {output}")


def table(kind: str, result: CxCResult) -> str:
    """Spearman x 100: over all pairs, by the way in which they were drawn, and the bootstrap."""
    rows = [("all pairs", result.pairs, _number(result.spearman))]
    rows += [(name, subset["pairs"], _number(subset["spearman"])) for name, subset in result.subsets.items()]
    bootstrap = f"{_number(result.bootstrap_mean)} ± {_number(result.bootstrap_std).strip()}"
    lines = [f"CxC {kind}  {'pairs':>13}  Spearman x 100"]
    lines += [f"{name:16} {pairs:7,}  {score}" for name, pairs, score in rows]
    return "\n".join([*lines, f"{'bootstrap':16} {result.queries // 2:7,}  {bootstrap} ({result.draws:,} draws)"])


def _number(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{value:6.2f}"
