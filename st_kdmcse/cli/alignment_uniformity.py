"""Alignment and uniformity of models on STS-B dev (Table 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import friendly_errors, pooling_option, quiet_libraries
from st_kdmcse.cli.named_models import named_models
from st_kdmcse.data import STSTask, load_sts_benchmark
from st_kdmcse.encoding import load_model
from st_kdmcse.evaluation.alignment_uniformity import alignment_uniformity, plot_alignment_uniformity, table
from st_kdmcse.evaluation.plots import check_plot, save_figure
from st_kdmcse.files import check_output_file, write_json
from st_kdmcse.provenance import model_identity, provenance


@command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--data-dir",
    required=True,
    help="STS-B: a SentEval directory, or a data set's hub name (mteb/stsbenchmark-sts) or folder.",
)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--plot", type=click.Path(path_type=Path), help="PNG, SVG or PDF file to write.")
@pooling_option
def main(
    models: tuple[str, ...],
    data_dir: str,
    output: Path | None,
    plot: Path | None,
    pooling: Literal["cls", "mean"] | None,
) -> None:
    """Measure alignment and uniformity of each MODEL on STS-B dev, over the whole set at once (Eq. 15, 16).

    A MODEL is a hub name or folder, or LABEL=PATH. The numbers are not on the scale of the paper's Table 2: MCSE's code
    averages over batches of pairs of similar length, where a batch without a positive pair counts as 0.
    """
    quiet_libraries()
    with friendly_errors():
        check_output_file(output)
        check_plot(plot)
        names = named_models(models)
        pairs = load_sts_benchmark(data_dir, "dev")
        loaded = {label: load_model(path, pooling=pooling) for label, path in names.items()}
        results = [alignment_uniformity(model, pairs, label) for label, model in loaded.items()]
        click.echo(table(results))
        if output is not None:
            checksum = STSTask("STS-B", (pairs,)).checksum
            identities = [model_identity(model, names[label]) for label, model in loaded.items()]
            records = [result.to_dict() | {"model": who} for result, who in zip(results, identities, strict=True)]
            write_json(output, {**provenance(data_sha256={pairs.name: checksum}), "models": records})
        if plot is not None:
            save_figure(plot_alignment_uniformity(results), plot)
