"""Plain training and fast training of the same student, from the same seed, on the same data: losses and scores.

The plain runs compute padding, tokenize by step, and read features from the store. Without dropout the curves are to be
the same up to rounding; with dropout, whose numbers are drawn for fewer tokens, the scores are to be no further apart
than those of other seeds. On a GPU the fast runs are in bfloat16 autocast, too.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from tqdm import tqdm
from training_run import in_a_process, make_student, minilm
from transformers import set_seed

from st_kdmcse import FeatureStore, KDMCSELoss, KDMCSETrainer, build_student, read_sentences
from st_kdmcse.data import load_sts_benchmark
from st_kdmcse.evaluation.similarity import sts_evaluator
from st_kdmcse.files import check_output_file, write_json
from st_kdmcse.provenance import provenance
from st_kdmcse.training.callbacks import METRIC

PLAIN, FAST, BF16 = "plain", "fast", "fast, bf16"


@click.command()
@click.option("--model", help="Hub name or folder of the student.  [all-MiniLM-L6-v2]")
@click.option("--layers", type=int, help="Take a BERT of random weights instead, of so many layers.")
@click.option("--hidden", default=128, show_default=True, help="Its width.")
@click.option("--text", required=True, help="Sentences, one a line.")
@click.option("--features", required=True, help="Feature store of the pairs.")
@click.option("--eval-data", required=True, help="SentEval directory with STS-B.")
@click.option("--steps", default=200, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--pair-every", default=4, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs with dropout.")
@click.option("--first-seed", default=0, show_default=True, help="Seed of the first of them.")
@click.option("--bf16/--no-bf16", default=torch.cuda.is_available(), help="Whether to run bfloat16.  [on a GPU]")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the result.")
def main(seeds: int, first_seed: int, bf16: bool, output: Path | None, **settings: Any) -> None:
    """Compare the losses of all steps and the scores on STS-B dev."""
    check_output_file(output)
    kinds = [PLAIN, FAST] + [BF16] * bf16
    with_dropout = range(first_seed, first_seed + seeds)
    runs = [(kind, 0.0, 0) for kind in kinds] + [(kind, 0.1, seed) for seed in with_dropout for kind in kinds]
    found: dict[tuple[str, float, int], dict[str, Any]] = {}
    for run in tqdm(runs, desc="Runs"):
        found[run] = in_a_process(curve, *run, settings)
        tqdm.write(f"{run}: last loss {found[run]['losses'][-1]:.5f}, scores {found[run]['scores']}")
    named = {name: Path(value).name if isinstance(value, str) else value for name, value in settings.items()}
    result = {
        "settings": named,
        "without_dropout": {kind: differences(found[PLAIN, 0.0, 0], found[kind, 0.0, 0]) for kind in kinds[1:]},
        "with_dropout": {kind: over_seeds([found[kind, 0.1, seed] for seed in with_dropout]) for kind in kinds},
        **provenance(),
    }
    click.echo(json.dumps(result, indent=2))
    if output:
        write_json(output, result)


def curve(kind: str, dropout: float, seed: int, settings: dict[str, Any], started: float) -> dict[str, Any]:
    """One run: the loss of each step, and the scores after each half."""
    set_seed(seed)
    model = student(settings)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    dev = load_sts_benchmark(settings["eval_data"], "dev")
    store = FeatureStore.open(settings["features"])
    loss = KDMCSELoss(model, features=store)
    loss.keep_features_on_device = kind != PLAIN
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=3e-5,
            bf16=kind == BF16,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            eval_strategy="steps",
            eval_steps=max(1, settings["steps"] // 2),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = KDMCSETrainer(
            model,
            arguments,
            DatasetDict(text=read_sentences(settings["text"]), pairs=store.dataset()),
            loss=loss,
            evaluator=sts_evaluator(dev, "sts-dev"),
            pair_every=settings["pair_every"],
            pretokenize=kind != PLAIN,
            unpad=False if kind == PLAIN else None,
            token_cache=folder,
        )
        losses: list[torch.Tensor] = []  # those of the logs are rounded
        loss.register_forward_hook(lambda _, __, terms: losses.append(terms.total.detach()))
        trainer.train()
    history = trainer.state.log_history
    return {
        "losses": torch.stack(losses).tolist(),
        "scores": [100 * entry[METRIC] for entry in history if METRIC in entry],
    }


def student(settings: dict[str, Any]) -> SentenceTransformer:
    """The student of a run; one of random weights where layers are given."""
    if not settings["layers"]:
        return build_student(settings["model"] or minilm(), 32)
    return make_student("bert", minilm(), settings["layers"], settings["hidden"])


def differences(plain: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far two runs are apart: the largest difference of a loss, absolute and relative, and those of the scores."""
    pairs = np.array([plain["losses"], other["losses"]])
    apart = np.abs(pairs[0] - pairs[1])
    return {
        "loss_first_and_last": [round(float(pairs[0, step]), 5) for step in (0, -1)],
        "largest_difference_of_losses": float(apart.max()),
        "largest_relative_difference": float((apart / pairs[0]).max()),
        "differences_of_scores": np.subtract(plain["scores"], other["scores"]).tolist(),
    }


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The last score and the mean loss of the second half, by seed, with mean and standard deviation."""
    values = {
        "score": [run["scores"][-1] for run in runs],
        "loss_of_second_half": [statistics.mean(run["losses"][len(run["losses"]) // 2 :]) for run in runs],
    }
    return {
        name: {"seeds": each, "mean": statistics.mean(each), "sd": statistics.stdev(each) if len(each) > 1 else None}
        for name, each in values.items()
    }


if __name__ == "__main__":
    main()
