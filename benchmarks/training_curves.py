"""Plain training and training at all defaults of the same student, from the same seeds, on the same data.

Three arms: plain float32 (padding is computed, sentences are tokenized by step, features are read from the store), all
defaults, and all defaults in float32. Without dropout the losses are to be the same up to rounding. With dropout, whose
numbers are drawn for fewer tokens, the scores of the last step are compared seed by seed. What is compared was fixed
before the runs: Spearman x 100 on STS-B dev and test, measured in float32 for all arms.

Finished runs are kept beside the output, and the same command goes on after an interruption.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from datasets import DatasetDict
from scipy import stats
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from tqdm import tqdm
from training_run import in_a_process, make_student, minilm
from transformers import set_seed

from st_kdmcse import FeatureStore, KDMCSELoss, KDMCSETrainer, build_student, read_sentences
from st_kdmcse.data import load_sts_benchmark
from st_kdmcse.evaluation.similarity import spearman, sts_evaluator
from st_kdmcse.files import check_output_file, read_json, write_json
from st_kdmcse.precision import bfloat16_is_faster
from st_kdmcse.processes import cpu_only, device_type
from st_kdmcse.provenance import provenance

PLAIN, DEFAULTS, IN_FLOAT32 = "plain float32", "all defaults", "all defaults in float32"
ARMS = (PLAIN, IN_FLOAT32, DEFAULTS)
MEASURES = ("sts_dev", "sts_test")


@click.command()
@click.option("--model", help="Hub name or folder of the student.  [all-MiniLM-L6-v2]")
@click.option("--layers", type=int, help="Take a BERT of random weights instead, of so many layers.")
@click.option("--hidden", default=128, show_default=True, help="Its width.")
@click.option("--text", required=True, help="Sentences, one a line.")
@click.option("--features", required=True, help="Feature store of the pairs.")
@click.option("--eval-data", required=True, help="SentEval directory with STS-B.")
@click.option("--steps", default=150, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--pair-every", default=4, show_default=True)
@click.option("--lr", default=3e-5, show_default=True)
@click.option("--seeds", type=click.IntRange(2), default=24, show_default=True, help="Runs with dropout of each arm.")
@click.option("--first-seed", default=1000, show_default=True, help="Seed of the first of them.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at the same time.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="JSON file for the result.")
def main(seeds: int, first_seed: int, jobs: int, output: Path, **settings: Any) -> None:
    """Compare losses and scores of three arms, seed by seed."""
    check_output_file(output)
    runs = [(arm, 0.0, first_seed) for arm in ARMS]
    runs += [(arm, 0.1, seed) for seed in range(first_seed, first_seed + seeds) for arm in ARMS]
    named = {name: Path(value).name if isinstance(value, str) else value for name, value in settings.items()}
    kept = output.with_suffix(".partial.json")
    done: dict[str, Any] = {"settings": named, "runs": {}}
    if kept.is_file():
        done = read_json(kept, "remove it")
        if done["settings"] != named:
            raise click.ClickException(f"{kept} holds runs with other settings: remove it, or choose another output")
    left = [run for run in runs if _name(*run) not in done["runs"]]
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), initial=len(runs) - len(left), desc="Runs") as bar:
        pending = {pool.submit(in_a_process, curve, *run, settings, jobs): run for run in left}
        try:
            for future in as_completed(pending):
                done["runs"][_name(*pending[future])] = found = future.result()
                write_json(kept, done)
                bar.update()
                tqdm.write(f"{_name(*pending[future])}: dev {found['sts_dev']:.2f}, test {found['sts_test']:.2f}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found = done["runs"]
    with_dropout = {arm: [found[_name(arm, 0.1, first_seed + each)] for each in range(seeds)] for arm in ARMS}
    result = {
        "settings": {**named, "seeds": seeds, "first_seed": first_seed},
        "measured": "Spearman x 100 of the last step, in float32",
        "without_dropout": {
            arm: differences(found[_name(PLAIN, 0.0, first_seed)], found[_name(arm, 0.0, first_seed)])
            for arm in (IN_FLOAT32, DEFAULTS)
        },
        "with_dropout": {arm: over_seeds(with_dropout[arm]) for arm in ARMS},
        "paired_differences": {
            f"{one} - {other}": {name: paired(with_dropout[one], with_dropout[other], name) for name in MEASURES}
            for one, other in ((DEFAULTS, PLAIN), (IN_FLOAT32, PLAIN), (DEFAULTS, IN_FLOAT32))
        },
        **provenance(),
    }
    click.echo(json.dumps({name: value for name, value in result.items() if name != "with_dropout"}, indent=2))
    write_json(output, result)
    kept.unlink(missing_ok=True)


def _name(arm: str, dropout: float, seed: int) -> str:
    return f"{arm}, dropout {dropout}, seed {seed}"


def curve(
    arm: str, dropout: float, seed: int, settings: dict[str, Any], jobs: int, started: float
) -> dict[str, float | list[float]]:
    """One run: the loss of each step, and the scores of the last one."""
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    set_seed(seed)
    model = student(settings)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    store = FeatureStore.open(settings["features"])
    loss = KDMCSELoss(model, features=store)
    loss.keep_features_on_device = arm != PLAIN
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=settings["lr"],
            bf16=arm == DEFAULTS and bfloat16_is_faster(device_type()),
            use_cpu=cpu_only(),
            seed=seed,
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = KDMCSETrainer(
            model,
            arguments,
            DatasetDict(text=read_sentences(settings["text"]), pairs=store.dataset()),
            loss=loss,
            pair_every=settings["pair_every"],
            pretokenize=arm != PLAIN,
            unpad=False if arm == PLAIN else None,
        )
        losses: list[torch.Tensor] = []  # those of the logs are rounded
        loss.register_forward_hook(lambda _, __, terms: losses.append(terms.total.detach()))
        trainer.train()
    splits = {f"sts_{name}": load_sts_benchmark(settings["eval_data"], name) for name in ("dev", "test")}
    scores = {name: 100 * spearman(sts_evaluator(pairs, name), model) for name, pairs in splits.items()}
    return {"losses": torch.stack(losses).tolist(), **scores}


def student(settings: dict[str, Any]) -> SentenceTransformer:
    """The student of a run; one of random weights where layers are given."""
    if not settings["layers"]:
        return build_student(settings["model"] or minilm(), 32, "cls")
    return make_student("bert", minilm(), settings["layers"], settings["hidden"])


def differences(plain: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far two runs are apart: the largest difference of a loss, absolute and relative, and those of the scores."""
    pairs = np.array([plain["losses"], other["losses"]])
    apart = np.abs(pairs[0] - pairs[1])
    return {
        "loss_first_and_last": [round(float(pairs[0, step]), 5) for step in (0, -1)],
        "largest_difference_of_losses": float(apart.max()),
        "largest_relative_difference": float((apart / pairs[0]).max()),
        "differences_of_scores": {name: other[name] - plain[name] for name in MEASURES},
    }


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores by seed, with mean and standard deviation."""
    values = {name: [round(run[name], 4) for run in runs] for name in MEASURES}
    return {
        name: {"mean": statistics.mean(each), "sd": statistics.stdev(each), "seeds": each}
        for name, each in values.items()
    }


def paired(ones: list[dict[str, Any]], others: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The mean difference of two arms over the seeds, with its 95 % confidence interval (Student's t)."""
    apart = np.array([one[name] - other[name] for one, other in zip(ones, others, strict=True)])
    interval = stats.ttest_1samp(apart, 0).confidence_interval(0.95)
    return {
        "mean": round(float(apart.mean()), 3),
        "confidence_interval_95": [round(float(each), 3) for each in interval],
        "sd": round(float(apart.std(ddof=1)), 3),
        "seeds": len(apart),
    }


if __name__ == "__main__":
    main()
