"""Make a raw student by masked language modelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import COUNT, NUMBER, SEED, friendly_errors, quiet_libraries
from st_kdmcse.demo.run import minilm_folder
from st_kdmcse.training.mlm import MaskingOptions, make_raw_student

_PATH = click.Path(path_type=Path)


@command(context_settings={"show_default": True})
@click.option("--model", help="Encoder: hub name or folder.  [all-MiniLM-L6-v2, of the extra demo]")
@click.option(
    "--text", type=_PATH, required=True, help="Sentences: one a line (plain or .gz), or a column of a .parquet."
)
@click.option("--text-column", help="The column of a table.  [the only one of text]")
@click.option("--output-dir", type=_PATH, default=Path("raw-minilm"))
@click.option("--max-steps", type=COUNT, default=MaskingOptions.max_steps)
@click.option("--batch-size", type=COUNT, default=MaskingOptions.batch_size, help="Sentences a step.")
@click.option("--lr", type=NUMBER, default=MaskingOptions.lr, help="Peak learning rate.")
@click.option("--max-seq-length", type=COUNT, default=MaskingOptions.max_seq_length)
@click.option("--masked", type=NUMBER, default=MaskingOptions.masked, help="Share of the tokens that are predicted.")
@click.option("--seed", type=SEED, default=MaskingOptions.seed)
@click.option("--save-steps", type=COUNT, default=MaskingOptions.save_steps, help="Steps between checkpoints.")
@click.option("--bf16/--no-bf16", default=None, help="Compute in bfloat16.  [where that is faster]")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --output-dir.")
def main(model: str | None, **arguments: Any) -> None:
    """Make a raw student: train an encoder on masked language modelling, and pool [CLS].

    \b
    python training/make_raw_student.py --text wiki1m_for_simcse.txt --output-dir raw-minilm

    An encoder that was tuned for similarity leaves a text loss little to do. This one starts before that, so that
    methods can be told apart. The head that predicts tokens is drawn at random, and is not saved.
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors("stopped; the same command with --resume goes on from there"):
        summary = make_raw_student(MaskingOptions(model=model or minilm_folder(), **arguments))
        losses = [entry["loss"] for entry in summary["losses"]]
        if losses:
            click.echo(f"loss {losses[0]:.3f} at the beginning, {losses[-1]:.3f} at the end")
        click.echo(f"{summary['steps']} steps in {summary['train_seconds']:.0f} s; model: {arguments['output_dir']}")
