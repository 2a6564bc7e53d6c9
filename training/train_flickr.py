"""Train a sentence encoder on text and Flickr30k (wiki+flickr), or run the embedded demo with --demo."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from st_kdmcse.cli.common import friendly_errors, quiet_libraries
from st_kdmcse.cli.training import run_training, training_command
from st_kdmcse.training.presets import DatasetPreset


@click.option("--demo", is_flag=True, help="Train on the embedded scenes: no network, no data, a few minutes.")
@training_command("flickr")
def main(preset: DatasetPreset, arguments: dict[str, Any]) -> None:
    """Train, or run the demo."""
    if not arguments.pop("demo"):
        run_training(arguments, preset)
        return
    from st_kdmcse.demo.run import run_demo

    context = click.get_current_context()
    given = {name for name in arguments if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if given - {"output_dir", "seed"}:
        raise click.UsageError("--demo is a fixed run: of the other options it takes --output-dir and --seed only")
    quiet_libraries()
    with friendly_errors():
        run_demo(arguments["output_dir"] if "output_dir" in given else Path("kdmcse-demo"), arguments["seed"])


if __name__ == "__main__":
    main()
