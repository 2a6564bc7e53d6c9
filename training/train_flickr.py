"""Train a sentence encoder on text and image-caption pairs (wiki+flickr), or run the embedded demo with --demo."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from st_kdmcse.cli import config_options, friendly_errors, quiet_libraries, run_training, training_options


@click.command(context_settings={"show_default": False, "max_content_width": 120})
@click.option("--demo", is_flag=True, help="Train on the embedded scenes: no network, no data, a few minutes.")
@training_options
@config_options
def main(demo: bool, **arguments: Any) -> None:
    """Train a sentence encoder with knowledge from CLIP.

    \b
    python training/train_flickr.py --text wiki1m_for_simcse.txt --features flickr30k-features
    python training/train_flickr.py --text wiki1m_for_simcse.txt --method simcse
    python training/train_flickr.py --demo
    """  # noqa: D301 - click reads the backspace character
    if demo:
        from st_kdmcse.demo.run import run_demo

        quiet_libraries()
        context = click.get_current_context()
        given = {name for name in arguments if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
        if given - {"output_dir", "seed"}:
            raise click.UsageError("--demo is a fixed run: of the other options it takes --output-dir and --seed only")
        with friendly_errors():
            run_demo(arguments["output_dir"] if "output_dir" in given else Path("kdmcse-demo"), arguments["seed"])
    else:
        run_training(arguments)


if __name__ == "__main__":
    main()
