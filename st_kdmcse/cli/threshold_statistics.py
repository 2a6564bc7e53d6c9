"""How well teacher features tell pairs from strangers, and which threshold to filter false negatives with."""

from __future__ import annotations

from pathlib import Path

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import COUNT, NUMBER, SEED, friendly_errors, quiet_libraries
from st_kdmcse.data import FeatureStore
from st_kdmcse.evaluation.plots import check_plot, save_figure
from st_kdmcse.evaluation.threshold_plots import plot_threshold_statistics
from st_kdmcse.evaluation.threshold_statistics import threshold_statistics
from st_kdmcse.files import check_output_file, write_json


@command(context_settings={"show_default": True})
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--sample-images", type=COUNT, default=2000, help="Images to draw; 0 takes all.")
@click.option(
    "--quantile", type=NUMBER, default=0.5, help="Quantile of the scores of true pairs that is proposed as threshold."
)
@click.option("--batch-size", type=COUNT, default=64, help="Sentences of a training batch.")
@click.option("--seed", type=SEED, default=0, help="Seed of the images drawn.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--plot", type=click.Path(path_type=Path), help="PNG, SVG or PDF file to write (Figures 5 and 6).")
def main(
    store: Path,
    sample_images: int,
    quantile: float,
    batch_size: int,
    seed: int,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Show the scores of the feature store STORE, the ranks of the true captions, and a threshold for each branch.

    The thresholds proposed at the default quantile are those of `--threshold auto` in training. Two thousand images
    of Flickr30k take about a minute on two CPU cores, all of them fifteen times as long.
    """
    quiet_libraries()
    with friendly_errors():
        check_output_file(output)
        check_plot(plot)
        statistics = threshold_statistics(FeatureStore.open(store), sample_images, quantile, batch_size, seed)
        click.echo(str(statistics))
        if output is not None:
            write_json(output, statistics.to_dict())
        if plot is not None:
            save_figure(plot_threshold_statistics(statistics), plot)
