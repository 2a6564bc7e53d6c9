"""The grounding experiment: train its arms over seeds, and test the differences that it is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import ListType, Whole, cxc_options, friendly_errors, quiet_libraries
from st_kdmcse.cli.grid import finish, grid_options
from st_kdmcse.experiments.arms import ARMS, CONTRASTS, MAIN_ARMS, OPTIONS
from st_kdmcse.experiments.evidence import evidence_tasks, gather_evidence
from st_kdmcse.experiments.evidence_report import write_evidence
from st_kdmcse.experiments.grid import arm_grid, run_grid, shared_features
from st_kdmcse.experiments.runs import read_run

_SET_BY_THE_ARMS = {"recipe", "head_learning_rate", "head_init"}
_NOT_HERE = {
    "epochs",
    "max_steps",
    "pair_every",
    "eval_data",
    "eval_steps",
    "save_steps",
    "bootstrap",
    "bootstrap_seed",
}


@command()
@cxc_options
@click.option("--max-steps", type=Whole(1), default=150, show_default=True, help="Steps of each run.")
@click.option(
    "--pair-every", type=Whole(2), default=2, show_default=True, help="Steps from one pair batch to the next."
)
@click.option("--arms", type=ListType(), help=f"Arms to train, of {', '.join(ARMS)}.  [{','.join(MAIN_ARMS)}]")
@grid_options(config=False, without=_SET_BY_THE_ARMS | _NOT_HERE)
def main(
    root: Path,
    arms: list[str] | None,
    seeds: list[int],
    jobs: int,
    keep_checkpoints: bool,
    data_dir: str | None,
    cxc: Path | None,
    coco_captions: tuple[Path, ...],
    output: Path | None,
    **arguments: Any,
) -> None:
    """Train the arms of the grounding experiment in ROOT/ARM/seed-N, score their last step, and test the differences.

    \b
    python evaluation/grounding_evidence.py evidence --model raw-minilm --text wiki_sentences.txt \\
        --features flickr8k_features --exclude-images flickr8k_features/overlap.csv \\
        --data-dir senteval --cxc cxc/sts_val.csv --coco-captions coco/annotations/captions_val2017.json

    All arms of a seed see the same sentences and captions in the same order. A finished run is never repeated and an
    interrupted one goes on where it was: give the same command again, with more --arms or --seeds if you like.
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    output = output or root / "report"
    with friendly_errors("stopped; the same command goes on from there"):
        unknown = [name for name in arms or () if name not in ARMS]
        if unknown:
            raise ValueError(f"there is no arm {', '.join(unknown)}: choose from {', '.join(ARMS)}")
        if data_dir is None:
            raise click.UsageError("--data-dir is missing: give a SentEval folder")
        tasks = evidence_tasks(data_dir, cxc, coco_captions)
        chosen = {name: ARMS[name] for name in arms or MAIN_ARMS}
        arguments["features"] = shared_features(root, arguments["features"])
        grid = arm_grid(root, chosen, seeds, eval_steps=0, **arguments)
        result = run_grid(grid, keep_checkpoints, jobs)
        finished = {
            name: [read_run(folder) for folder in result.finished if folder.parent.name == name] for name in chosen
        }
        evidence = gather_evidence(
            finished,
            chosen,
            CONTRASTS,
            tasks,
            grid[0],
            root / "before",
            options=OPTIONS,
            left_out=[f"{folder} failed: {error}" for folder, error in result.failed.items()],
        )
        finish(result, write_evidence(evidence, output), [output / "report.md", output / "report.json"])
