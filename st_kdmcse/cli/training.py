"""Command-line options of the training scripts, made from the option classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from st_kdmcse.cli.commands import command as make_command
from st_kdmcse.cli.commands import repeated_run
from st_kdmcse.cli.common import COUNT, NUMBER, SEED, ListType, friendly_errors, quiet_libraries
from st_kdmcse.cli.extraction import extraction_options
from st_kdmcse.config import KDMCSEConfig, Recipe, Threshold, Weight
from st_kdmcse.extraction import ExtractionOptions
from st_kdmcse.training.head_init import HeadInit
from st_kdmcse.training.hub import PushError
from st_kdmcse.training.methods import METHODS
from st_kdmcse.training.metric import NANOBEIR_DATA
from st_kdmcse.training.options import COMPILE_MODES, TrainingOptions
from st_kdmcse.training.presets import PRESETS, DatasetPreset
from st_kdmcse.training.run import train
from st_kdmcse.training.run_folder import ChangedError
from st_kdmcse.training.student import PoolingMode

Command = Callable[..., Any]

_EXTRACTION = "extraction_"
_FEATURES = ("features", "extraction_captions")
_SOURCE_OF = {
    "text": ("text", "text_column"),
    "features": _FEATURES,
    "excluded images": ("exclude_images",),
    "evaluation sets": ("exclude_overlap",),
    **dict.fromkeys(("sts-dev", "sts-test"), ("eval_data",)),
    "metric": ("metric", "nanobeir_data"),
    **dict.fromkeys(("weights", "configuration", "tokenizer", "modules"), ("model", "pooling")),
}
"""The parameters that what a run is made of comes from, by its name in the record."""
_TITLES = {
    "flickr": "Wikipedia and Flickr30k (29,783 training images)",
    "coco": "Wikipedia and MS-COCO (82,783 training images of 2014)",
    "cc12m": "Wikipedia and a million pairs of CC12M (Appendix B; --subset-seed draws another subset)",
}
_EXAMPLES = {
    "flickr": "--captions results_20130124.token --images flickr30k-images --split train.txt",
    "coco": "--captions annotations/captions_train2014.json --images train2014",
    "cc12m": "--captions 'cc12m/{00000..01242}.tar'",
}


class _NumberOr(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number, or one of some words."""

    def __init__(self, *words: str) -> None:
        self._words = words
        self.name = "|".join(("number", *words))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self._words:
            return value
        try:
            number = float(value)
        except ValueError:
            words = " nor ".join(f"'{word}'" for word in self._words)
            self.fail(f"{value!r} is neither a number nor {words}", param, ctx)
        return NUMBER.convert(number, param, ctx)


_TYPES = {Threshold: _NumberOr("none", "auto"), Weight: _NumberOr("auto")}


def training_command(dataset: str) -> click.Command:
    """The command of a data set's training script.

    Args:
        dataset: a name of :data:`~st_kdmcse.training.presets.PRESETS`.
    """
    return _training_command(dataset, f"python training/train_{dataset}.py", f"on {_TITLES[dataset]}")


def _training_command(dataset: str, call: str, on: str) -> click.Command:
    preset = PRESETS[dataset]
    text = f"""Train a sentence encoder with knowledge from CLIP, {on}.

    \b
    {call} --text wiki1m_for_simcse.txt {_EXAMPLES[dataset]}
    {call} --text wiki1m_for_simcse.txt --features {dataset}-features

    The first form begins with the features of a CLIP model: it writes them to OUTPUT_DIR/features, or to --features.
    """

    def run(**arguments: Any) -> None:
        run_training(arguments, PRESETS[arguments.pop("preset", dataset)])

    function = config_options(run)
    function = extraction_options(function, in_training=True, **preset.extraction)
    function = training_options(function, preset.output_dir)
    return make_command(help=text)(function)


def _with_preset(train: click.Command) -> click.Command:
    text = "What the paper does on that data set; other options go first."
    preset = click.Option(
        ["--preset"], type=click.Choice(list(PRESETS)), default="flickr", show_default=True, help=text
    )
    train.params.insert(0, preset)
    return train


def config_options(command: Command) -> Command:
    """Give a command an option for the fields of :class:`KDMCSEConfig`; its value is None if it is not given.

    Fields for experiments have none. ``--threshold`` sets both thresholds; the command sees those two only.
    """
    types = get_type_hints(KDMCSEConfig)
    for option in reversed(fields(KDMCSEConfig)):
        if option.metadata["hidden"]:
            continue
        flag = "--" + option.name.replace("_", "-")
        kind: Any = types[option.name]
        if kind is bool:
            flag, kind = f"{flag}/--no-{flag[2:]}", None
        elif kind in _TYPES:
            kind = _TYPES[kind]
        elif kind in (int, float):
            kind = COUNT if kind is int else NUMBER
        elif get_origin(kind) is Literal:
            kind = click.Choice(get_args(kind))
        text = f"{_sentence(option.metadata['help'])}  [{_by_recipe(option.name)}]"
        command = click.option(flag, option.name, type=kind, default=None, help=text)(command)
    return _threshold_option(command)


def given_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the config that a command was given.

    Args:
        arguments: values of :func:`config_options` by name, and others.
    """
    types = get_type_hints(KDMCSEConfig)
    given = {name: value for name, value in arguments.items() if name in types and value is not None}
    return {name: None if value == "none" and types[name] == Threshold else value for name, value in given.items()}


def _threshold_option(command: Command) -> Command:
    """Give a command ``--threshold``, and its value as that of the thresholds which are not given."""

    @wraps(command)
    def with_both(threshold: float | str | None, **arguments: Any) -> Any:
        context = click.get_current_context()
        for name in ("image_threshold", "text_threshold"):
            if threshold is not None and arguments[name] is None:
                arguments[name] = threshold
                context.set_parameter_source(name, context.get_parameter_source("threshold") or ParameterSource.DEFAULT)
        return command(**arguments)

    text = "Threshold of both branches; --image-threshold and --text-threshold override it."
    return click.option("--threshold", type=_TYPES[Threshold], default=None, help=text)(with_both)


def training_options(command: Command, output_dir: Path) -> Command:
    """Give a command the options of :class:`TrainingOptions`, those of the config and of extraction aside."""
    default = TrainingOptions(features=Path())
    path = click.Path(path_type=Path)
    for option in reversed(
        [
            click.option("--model", default=default.model, show_default=True, help="Encoder: hub name or folder."),
            click.option(
                "--text",
                type=path,
                help="Sentences: one a line, or a column of a .csv, .tsv, .jsonl, .json or .parquet.",
            ),
            click.option("--text-column", help="The column of a table.  [the only one of text]"),
            click.option("--deduplicate", is_flag=True, help="Leave out sentences of --text that came before."),
            click.option(
                "--features", type=path, help="Feature store, or JSON file of the KDMCSE authors; --captions makes it."
            ),
            click.option(
                "--exclude-images",
                type=path,
                help="Images of --features to leave out: an id a line, or a .csv with a column image.",
            ),
            click.option(
                "--exclude-overlap",
                type=path,
                metavar="SENTEVAL_DIR",
                help="Leave out images with a caption that stands in the STS tasks of a SentEval directory.",
            ),
            click.option(
                "--recipe",
                type=click.Choice(get_args(Recipe)),
                default="paper",
                show_default=True,
                help="Choices of the paper, of its released code, or with lists and soft positives beyond both.",
            ),
            click.option("--method", type=click.Choice(list(METHODS)), default="kdmcse", show_default=True),
            click.option(
                "--eval-data",
                default=default.eval_data,
                show_default=True,
                help="STS-B in any language: a SentEval directory, or a dataset's folder, hub name or NAME:CONFIG.",
            ),
            click.option(
                "--metric",
                help="What chooses the best model: nanobeir, or some of its tasks: nanobeir:msmarco,nq.  [STS-B dev]",
            ),
            click.option("--nanobeir-data", help=f"NanoBEIR: a dataset's hub name or folder.  [{NANOBEIR_DATA}]"),
            click.option("--output-dir", type=path, default=output_dir, show_default=True),
            click.option(
                "--export",
                type=path,
                is_flag=False,
                flag_value="text-image",
                metavar="[FOLDER]",
                help="Make a model of sentences and images in the end, in OUTPUT_DIR/text-image or OUTPUT_DIR/FOLDER.",
            ),
            click.option("--export-teacher", help="Teacher of --export, if the features name none; as in export."),
            click.option("--export-images", type=path, help="Images of --export, to see that it is that teacher."),
            click.option("--epochs", type=COUNT, default=default.epochs, show_default=True),
            click.option("--max-steps", type=COUNT, help="Steps, instead of epochs."),
            click.option("--batch-size", type=COUNT, help="Sentences a batch and device.  [BERT: 64; RoBERTa: 128]"),
            click.option(
                "--mini-batch-size",
                type=COUNT,
                help="Sentences in a forward pass: caches gradients, for a --batch-size beyond memory.  [off]",
            ),
            click.option(
                "--matryoshka-dims",
                type=ListType(int),
                help="Sizes that embeddings can be cut to, such as 384,256,128, the whole one among them.  [off]",
            ),
            click.option(
                "--gradient-accumulation-steps",
                type=COUNT,
                default=default.gradient_accumulation_steps,
                show_default=True,
                help="Batches a step; each has its own negatives alone.",
            ),
            click.option("--gradient-checkpointing", is_flag=True, help="Save memory: compute activations twice."),
            click.option(
                "--lora", type=COUNT, metavar="R", help="Train updates of rank R of the attention alone (peft).  [off]"
            ),
            click.option("--lr", type=NUMBER, help="Peak learning rate.  [BERT: 3e-5; RoBERTa: 1e-5]"),
            click.option(
                "--head-lr", "head_learning_rate", type=NUMBER, help="Peak learning rate of the heads.  [that of --lr]"
            ),
            click.option(
                "--head-init",
                type=click.Choice(get_args(HeadInit)),
                default=default.head_init,
                show_default=True,
                help="Initial heads; ridge aligns them with the untrained student.",
            ),
            click.option(
                "--pooling",
                type=click.Choice(get_args(PoolingMode)),
                default=default.pooling,
                show_default=True,
                help="Sentence embedding; auto is the model's own, and [CLS] of a plain encoder.",
            ),
            click.option("--max-seq-length", type=COUNT, default=default.max_seq_length, show_default=True),
            click.option("--pair-every", type=COUNT, help="Steps from one pair batch to the next.  [|text| / |pairs|]"),
            click.option("--captions-per-image", type=COUNT, help="Captions drawn of each image; MCSE takes 1.  [all]"),
            click.option(
                "--captions-per-image-in-batch", type=COUNT, help="Captions of an image that a pair batch draws.  [any]"
            ),
            click.option("--seed", type=SEED, default=default.seed, show_default=True),
            click.option(
                "--eval-steps",
                type=COUNT,
                default=default.eval_steps,
                show_default=True,
                help="Steps between evaluations on STS-B dev; 0 for none.",
            ),
            click.option(
                "--save-steps",
                type=COUNT,
                default=default.save_steps,
                show_default=True,
                help="Steps between checkpoints for --resume; there is one every ten minutes as well.",
            ),
            click.option("--gather-across-devices", is_flag=True, help="Negatives from the batches of all devices."),
            click.option(
                "--compile",
                type=click.Choice(COMPILE_MODES),
                is_flag=False,
                flag_value="default",
                help="Compile the student, for long runs on a GPU; reduce-overhead is CUDA graphs.  [off]",
            ),
            click.option("--unpad/--no-unpad", default=None, help="Do not compute padding.  [on a CPU]"),
            click.option("--bf16/--no-bf16", default=None, help="Compute in bfloat16.  [where that is faster]"),
            click.option(
                "--workers", type=COUNT, default=default.workers, show_default=True, help="Tokenizing processes."
            ),
            click.option(
                "--report-to",
                default=default.report_to,
                show_default=True,
                help="Trackers of curves: tensorboard, wandb, trackio, ..., separated by commas.",
            ),
            click.option("--run-name", help="What trackers call the run.  [--output-dir]"),
            click.option(
                "--push-to-hub", metavar="REPO", help="Repository of the Hugging Face hub for model, card and heads."
            ),
            click.option("--private", is_flag=True, help="Make that a private repository."),
            click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --output-dir."),
        ]
    ):
        command = option(command)
    return command


def run_training(arguments: dict[str, Any], preset: DatasetPreset) -> None:
    """Train with parsed options, report, and exit: 2 for bad input, 130 after Ctrl-C.

    Args:
        arguments: values of :func:`training_options`, :func:`config_options` and :func:`extraction_options` by name.
        preset: gives what the user does not.
    """
    quiet_libraries()
    context = click.get_current_context()
    usual = {"output_dir": preset.output_dir}
    usual |= {f"{_EXTRACTION}{name}": value for name, value in preset.extraction.items()}
    for name, value in usual.items():
        if context.get_parameter_source(name) is ParameterSource.DEFAULT:
            arguments[name] = value
    names = {option.name for option in fields(KDMCSEConfig)}
    config = {name: value for name, value in preset.config.items() if name in METHODS[arguments["method"]].reads}
    extraction = {
        name.removeprefix(_EXTRACTION): value for name, value in arguments.items() if name.startswith(_EXTRACTION)
    }
    with friendly_errors("stopped; the same command (with --resume, once training had begun) goes on from there"):
        options = TrainingOptions(
            config=config | given_config(arguments),
            extraction=_extraction(extraction, preset.teachers[arguments["recipe"]]),
            **{
                name: value
                for name, value in arguments.items()
                if name not in names and not name.startswith(_EXTRACTION)
            },
        )
        try:
            summary = train(options, repeats=_repeated())
        except ChangedError as error:
            flags = " and ".join(f"`{name}`" for name in dict.fromkeys(_SOURCE_OF[name][0] for name in error.names))
            raise ValueError(
                f"{error}. Restore it, or name {flags} on the command line too, to train on it as it is"
            ) from error
        except PushError as error:
            click.echo(report(error.summary, options.output_dir))
            raise
    if summary:
        click.echo(report(summary, options.output_dir))


def _repeated() -> dict[str, str]:
    """SHA-256 of data and student of the run that ``--config`` repeats, but for those named on the command line."""
    record = repeated_run() or {}
    context = click.get_current_context()
    named = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    checksums = {**record.get("data_sha256", {}), **record.get("student_sha256", {})}
    return {name: each for name, each in checksums.items() if not named & set(_SOURCE_OF.get(name, ()))}


def _extraction(given: dict[str, Any], teacher: str) -> ExtractionOptions | None:
    if given["captions"] is not None:
        given["teacher"] = given["teacher"] or teacher
        return ExtractionOptions(**given)
    context = click.get_current_context()
    unused = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name is not None
        and parameter.name.startswith(_EXTRACTION)
        and context.get_parameter_source(parameter.name) is not ParameterSource.DEFAULT
    ]
    if unused:
        raise ValueError(f"{', '.join(unused)}: give --captions too, from which features are extracted")
    return None


def report(summary: Mapping[str, Any], output_dir: Path) -> str:
    """What a user wants to know at the end of a run, and what to do next."""
    lines = [f"{summary['method']} ({summary['recipe']}): {summary['steps']} steps in {summary['train_seconds']:.0f} s"]
    if excluded := summary["excluded"]:
        lines.append(f"left out: {excluded['images']:,} images with {excluded['captions']:,} captions")
    if summary["sts_dev_best"]:
        before, best, last = summary["sts_dev_before"], summary["sts_dev_best"], summary["sts_dev_last"]
        lines += [
            f"STS-B dev, Spearman x 100: {100 * before:.2f} before, {100 * best['spearman']:.2f} best "
            f"(step {best['step']}), {100 * last['spearman']:.2f} last",
            f"STS-B test of the best:    {100 * summary['sts_test_of_best']:.2f}",
        ]
        for scores in summary["sts_by_size"]:
            dev, test = 100 * scores["dev"], 100 * scores["test"]
            lines.append(f"  cut to {scores['size']} dimensions: {dev:.2f} dev, {test:.2f} test")
        if metric := summary["metric"]:
            of_best = next(point["score"] for point in metric["curve"] if point["step"] == best["step"])
            lines.append(
                f"{metric['name']}, which chose: {metric['before']:.4f} before, {of_best:.4f} best, "
                f"{metric['curve'][-1]['score']:.4f} last"
            )
        lines.append(f"best model: {output_dir}, last model: {output_dir / 'last'}")
    else:
        lines.append(f"model: {output_dir} (of the last step: there was no evaluation)")
    if export := summary["options"]["export"]:
        lines.append(f"model of sentences and images: {output_dir / export}")
    lines += [
        f"details: {output_dir / 'training_summary.json'}",
        "",
        "Use it:",
        "    from sentence_transformers import SentenceTransformer",
        f'    SentenceTransformer("{output_dir}").encode(["A dog runs on the beach."])',
    ]
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _by_recipe(name: str) -> str:
    """The default of an option in each recipe; "grounded" only where it is not the paper's."""
    values = {recipe: getattr(getattr(KDMCSEConfig, recipe)(), name) for recipe in get_args(Recipe)}
    if values["grounded"] == values["paper"]:
        del values["grounded"]
    return "; ".join(f"{recipe}: {value}" for recipe, value in values.items())


train_command = _with_preset(_training_command("flickr", "st-kdmcse train", "on sentences and captioned images"))
"""``st-kdmcse train``, for all data sets."""
