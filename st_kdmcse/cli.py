"""Command-line options of the training scripts, made from the option classes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

from st_kdmcse.config import KDMCSEConfig, Threshold
from st_kdmcse.training import METHODS, Interrupted, TrainingOptions, train

Command = Callable[..., Any]


class _ThresholdType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    name = "number|none|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ("none", "auto"):
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'none' nor 'auto'", param, ctx)


def config_options(command: Command) -> Command:
    """Give a command an option for every field of :class:`KDMCSEConfig`; one that is not given is None."""
    types = get_type_hints(KDMCSEConfig)
    for option in reversed([option for option in fields(KDMCSEConfig) if option.name != "teacher"]):
        flag = "--" + option.name.replace("_", "-")
        kind: Any = types[option.name]
        if kind is bool:
            flag, kind = f"{flag}/--no-{flag[2:]}", None
        elif kind == Threshold:
            kind = _ThresholdType()
        elif get_origin(kind) is Literal:
            kind = click.Choice(get_args(kind))
        text = f"{option.metadata['help']}  [paper: {option.default}; released: {_released(option.name)}]"
        command = click.option(flag, option.name, type=kind, default=None, help=text)(command)
    return command


def training_options(command: Command) -> Command:
    """Give a command the options of :class:`TrainingOptions`, those of the config aside."""
    default = TrainingOptions(features=Path())
    path = click.Path(path_type=Path)
    for option in reversed(
        [
            click.option("--model", default=default.model, show_default=True, help="Encoder: hub name or folder."),
            click.option("--text", type=path, help="Sentences, one a line (wiki1m_for_simcse.txt)."),
            click.option("--features", type=path, help="Feature store directory, or JSON file of the KDMCSE authors."),
            click.option("--recipe", type=click.Choice(["paper", "released"]), default="paper", show_default=True),
            click.option("--method", type=click.Choice(list(METHODS)), default="kdmcse", show_default=True),
            click.option(
                "--eval-data",
                default=default.eval_data,
                show_default=True,
                help="STS-B: a SentEval directory, or a dataset's hub name or folder.",
            ),
            click.option("--output-dir", type=path, default=default.output_dir, show_default=True),
            click.option("--epochs", type=int, default=default.epochs, show_default=True),
            click.option("--max-steps", type=int, help="Steps, instead of epochs."),
            click.option("--batch-size", type=int, help="Sentences a step and device.  [BERT: 64; RoBERTa: 128]"),
            click.option("--lr", type=float, help="Peak learning rate.  [BERT: 3e-5; RoBERTa: 1e-5]"),
            click.option("--max-seq-length", type=int, default=default.max_seq_length, show_default=True),
            click.option("--pair-every", type=int, help="Steps from one pair batch to the next.  [|text| / |pairs|]"),
            click.option("--captions-per-image", type=int, help="Captions drawn of each image; MCSE takes 1.  [all]"),
            click.option("--seed", type=int, default=default.seed, show_default=True),
            click.option(
                "--eval-steps",
                type=int,
                default=default.eval_steps,
                show_default=True,
                help="Steps between evaluations on STS-B dev, each with a checkpoint; 0 for none.",
            ),
            click.option("--gather-across-devices", is_flag=True, help="Negatives from the batches of all devices."),
            click.option("--bf16/--no-bf16", default=None, help="bfloat16 autocast.  [where a GPU has it]"),
            click.option(
                "--workers", type=int, default=default.workers, show_default=True, help="Tokenizing processes."
            ),
            click.option("--report-to", default=default.report_to, show_default=True, help="tensorboard, wandb, ..."),
            click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --output-dir."),
        ]
    ):
        command = option(command)
    return command


def run_training(arguments: dict[str, Any]) -> None:
    """Train with parsed options, report, and exit: 2 for bad input, 130 after Ctrl-C.

    Args:
        arguments: values of :func:`training_options` and :func:`config_options` by name.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    quiet_libraries()
    names = {option.name for option in fields(KDMCSEConfig)}
    config = {name: value for name, value in arguments.items() if name in names and value is not None}
    config = {name: None if value == "none" else value for name, value in config.items()}
    with friendly_errors():
        options = TrainingOptions(
            config=config, **{name: value for name, value in arguments.items() if name not in names}
        )
        summary = train(options)
    if summary:
        click.echo(report(summary, options.output_dir))


def quiet_libraries() -> None:
    """Leave the one progress bar that a user waits for: the trainer's."""
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


class friendly_errors:  # noqa: N801 - a context manager, named like one
    """Turn errors that the user can mend into one line and an exit status."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            click.echo(
                f"\n{error}"
                if isinstance(error, Interrupted)
                else "\nstopped; --resume goes on from the newest checkpoint, if there is one",
                err=True,
            )
            sys.exit(130)
        if isinstance(error, ValueError | OSError | ImportError):
            click.echo(f"error: {error}", err=True)
            sys.exit(2)


def report(summary: dict[str, Any], output_dir: Path) -> str:
    """What a user wants to know at the end of a run, and what to do next."""
    lines = [f"{summary['method']} ({summary['recipe']}): {summary['steps']} steps in {summary['train_seconds']:.0f} s"]
    if summary["sts_dev_best"]:
        before, best, last = summary["sts_dev_before"], summary["sts_dev_best"], summary["sts_dev_last"]
        lines += [
            f"STS-B dev, Spearman x 100: {100 * before:.2f} before, {100 * best['spearman']:.2f} best "
            f"(step {best['step']}), {100 * last['spearman']:.2f} last",
            f"STS-B test of the best:    {100 * summary['sts_test_of_best']:.2f}",
        ]
        lines.append(f"best model: {output_dir}, last model: {output_dir / 'last'}")
    else:
        lines.append(f"model: {output_dir} (of the last step: there was no evaluation)")
    lines += [
        f"details: {output_dir / 'training_summary.json'}",
        "",
        "Use it:",
        "    from sentence_transformers import SentenceTransformer",
        f'    SentenceTransformer("{output_dir}").encode(["A dog runs on the beach."])',
    ]
    return "\n".join(lines)


def _released(name: str) -> object:
    return getattr(KDMCSEConfig.released(), name)
