"""``st-kdmcse extract``, ``merge`` and ``inspect``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import SEED, Whole, cxc_options, friendly_errors, quiet_libraries
from st_kdmcse.data import FeatureStore
from st_kdmcse.data.inspection import inspect_store
from st_kdmcse.data.overlap import find_overlap, load_evaluation_texts, write_overlap
from st_kdmcse.data.readers import FORMATS
from st_kdmcse.extraction import ExtractionOptions, extract_dataset, merge
from st_kdmcse.extraction.merge import skipped_file
from st_kdmcse.files import check_output_file
from st_kdmcse.processes import processes

Command = Callable[..., Any]
Store = click.argument("store", type=click.Path(path_type=Path))

_IN_TRAINING = {"precision": "teacher-precision", "dtype": "feature-dtype", "batch_size": "teacher-batch-size"}
_NOT_IN_TRAINING = ("captions_per_image", "workers")


def extraction_options(command: Command, in_training: bool = False, **defaults: Any) -> Command:
    """Give a command the options of :class:`ExtractionOptions`.

    Args:
        command: the command.
        in_training: whether it is a training script, which has options like these for the student.
        defaults: values that differ from the class's.
    """
    known = {option.name: option.default for option in fields(ExtractionOptions)} | defaults
    choices: dict[str, dict[str, Any]] = {
        "captions": {"help": "Captions: file or folder in the publisher's format (.token, .csv, .json, .tsv, "
                     ".jsonl, .parquet, .tar shards), or a data set on the hub."},
        "images": {"type": click.Path(path_type=Path), "help": "Folder of the images, if --captions has none."},
        "captions_format": {"type": click.Choice(["auto", *FORMATS]), "help": "Format of --captions."},
        "split": {"help": "Part of the data set: a name (in a table's column split), or a file of image ids."},
        "image_column": {"help": "Column of the image in a table or hub data set."},
        "caption_column": {"help": "Column of the caption or captions there; several with commas."},
        "captions_per_image": {"type": Whole(1), "help": "Captions drawn of each image.  [all]"},
        "limit": {"type": Whole(1), "help": "Images drawn from the data set.  [all]"},
        "subset_seed": {"type": SEED, "help": "Seed of what is drawn from the data set."},
        "on_error": {"type": click.Choice(["raise", "skip"]), "help": "Stop at a bad row or image, or skip it."},
        "teacher": {"help": "open_clip model (ViT-B-32, config.json, hf-hub:..., a folder), "
                    "transformers:openai/clip-vit-base-patch32, or sentence-transformers:clip-ViT-B-32."},
        "pretrained": {"help": "Weights of an open_clip model: a tag or a file.  [openai]"},
        "text_teacher": {"help": "Another teacher for the captions, as sentence-transformers:all-mpnet-base-v2."},
        "precision": {"type": click.Choice(["auto", "float32", "bfloat16", "float16"]),
                      "help": "Precision of the teacher; auto is the fastest."},
        "dtype": {"type": click.Choice(["float16", "float32"]), "help": "Type of the stored features."},
        "batch_size": {"type": Whole(1), "help": "Images or captions in a forward pass of the teacher."},
        "workers": {"type": Whole(0), "help": "Processes that decode images.  [one a core, at most 8]"},
    }  # fmt: skip
    for name, settings in reversed(choices.items()):
        if in_training and name in _NOT_IN_TRAINING:
            continue
        flag = _IN_TRAINING.get(name, name) if in_training else name
        default = None if known[name] is MISSING else known[name]
        if in_training and name == "teacher":
            default, settings["help"] = None, f"{settings['help']}  [the recipe's: ViT-B-32 or ViT-L-14]"
        command = click.option(
            f"--{flag.replace('_', '-')}",
            f"extraction_{name}" if in_training else name,
            default=default,
            show_default=default is not None,
            required=name == "captions" and not in_training,
            **settings,
        )(command)
    return command


@command()
@Store
@extraction_options
@click.option("--shard", metavar="I/N", help="Do part I (from 0) of N, in as many processes or on as many machines.")
def extract(store: Path, shard: str | None, **options: Any) -> None:
    """Encode images and captions with a frozen teacher, and write the feature store STORE.

    Interrupted or killed, the same command goes on where it was. The N shards of a data set may run at the same time;
    `st-kdmcse merge STORE` joins them. torchrun does both.

    \b
    st-kdmcse extract flickr30k-features --captions results_20130124.token --images flickr30k-images --split train.txt
    st-kdmcse extract coco-features --captions annotations/captions_train2014.json --images train2014
    st-kdmcse extract cc12m-features --captions 'cc12m/{00000..01242}.tar' --limit 1000000 --on-error skip
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors("stopped; finished parts are kept, and the same command goes on from there"):
        report = extract_dataset(ExtractionOptions(**options), store, _shard(shard), show_progress_bar=True)
        if processes().is_main_process:
            click.echo(str(report))
            if report.store is not None:
                click.echo(f"look at it: st-kdmcse inspect {store}")


@command("merge")
@Store
def merge_command(store: Path) -> None:
    """Join the shards of an extraction into the feature store STORE."""
    quiet_libraries()
    with friendly_errors("stopped; nothing is lost: the same command starts again"):
        click.echo(str(merge(store)))
        if skipped_file(store).exists():
            click.echo(f"what was left out is listed in {skipped_file(store)}")


@command()
@Store
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the captions and scores that are drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="SENTEVAL_DIR",
    help="Name the captions that stand in the STS tasks of a SentEval directory.",
)
@cxc_options
@click.option("--out", type=click.Path(path_type=Path), help="CSV file of those captions, for train --exclude-images.")
def inspect(
    store: Path,
    seed: int,
    as_json: bool,
    against: Path | None,
    cxc: Path | None,
    coco_captions: tuple[Path, ...],
    out: Path | None,
) -> None:
    """Show what is in a feature store: teacher, counts, captions, norms, similarities, and whether it is intact.

    With --against it also shows which captions stand in evaluation sets, capitals, full stops and white space aside.

    \b
    st-kdmcse inspect flickr30k-features
    st-kdmcse inspect flickr30k-features --against SentEval/data/downstream --out overlap.csv
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors():
        if against is None and (out is not None or cxc is not None):
            raise ValueError("--out and --cxc go with --against")
        check_output_file(out)
        opened = FeatureStore.open(store)
        evaluated = None if against is None else load_evaluation_texts(against, cxc, coco_captions)
        report = inspect_store(opened, seed=seed)
        overlap = None if evaluated is None else find_overlap(opened, evaluated)
        if overlap is not None and out is not None:
            write_overlap(out, overlap)
        if as_json:
            found = report.to_dict() | ({} if overlap is None else {"overlap": overlap.to_dict()})
            click.echo(json.dumps(found, indent=2, ensure_ascii=False))
            return
        click.echo(str(report))
        if overlap is not None:
            click.echo(f"\n{overlap}")
            if out is not None:
                click.echo(f"listed in {out}; leave the images out with: st-kdmcse train --exclude-images {out}")


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard {text}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)
