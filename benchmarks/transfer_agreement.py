"""The transfer tasks beside a second implementation of SentEval's protocol, on the same embeddings.

The second one shares the files, the embeddings and scikit-learn's folds, and nothing else: it puts the rows in order,
makes the features, trains the classifiers and chooses C without it. Its logistic regression minimises the same
objective (C times the sum of the losses, plus half the squared norm of the weights without the intercept) with
PyTorch's L-BFGS over all rows, in float64, from zero, all inner folds at once.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from st_kdmcse.cli.common import friendly_errors, quiet_libraries
from st_kdmcse.data.transfer import TRANSFER_TASKS, LabelledSentences, TransferTask, load_transfer_task
from st_kdmcse.encoding import SentenceEmbeddings, encode_distinct, load_model
from st_kdmcse.evaluation.transfer import TransferProtocol, score_task
from st_kdmcse.files import write_json
from st_kdmcse.provenance import parameters_checksum, provenance

SMALL_C = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
LARGE_C = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


@click.command(context_settings={"max_content_width": 120})
@click.option("--model", required=True, help="Model: hub name or folder.")
@click.option("--data-dir", required=True, help="SentEval directory.")
@click.option("--tasks", default=",".join(TRANSFER_TASKS), show_default=True, help="Separated by commas.")
@click.option("--folds", default=10, show_default=True, help="Of each cross-validation, on both sides.")
@click.option("--embeddings", type=click.Path(path_type=Path), help="Folder to keep embeddings in for another run.")
@click.option("--device", help="Such as cpu or cuda:1, for the embeddings.  [a GPU if there is one]")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON file for the result, written after each task. Tasks in it are kept: another run adds to them.",
)
def main(
    model: str, data_dir: str, tasks: str, folds: int, embeddings: Path | None, device: str | None, output: Path | None
) -> None:
    """Compare accuracies task by task."""
    quiet_libraries()
    with friendly_errors("stopped"):
        encoder = load_model(model, device)
        earlier = json.loads(output.read_text(encoding="utf-8")) if output and output.exists() else {}
        if earlier and earlier["model"]["parameters_sha256"] != parameters_checksum(encoder):
            raise ValueError(f"{output} holds results of another model: give another --output")
        results: dict[str, Any] = earlier.get("tasks", {})
        checksums: dict[str, str] = earlier.get("data_sha256", {})
        for name in tasks.split(","):
            if name in results:
                continue
            task = load_transfer_task(data_dir, name)
            if task is None:
                raise FileNotFoundError(f"{data_dir} holds no files of {name}")
            checksums.update(task.sha256)
            results[name] = compare(task, embed(encoder, task, embeddings), folds)
            click.echo(
                f"{name:5} st_kdmcse {results[name]['accuracy']['st_kdmcse']:.2f}   second implementation "
                f"{results[name]['accuracy']['second implementation']:.2f}"
            )
            if output:
                write_json(
                    output,
                    {**report(results), **provenance(encoder, "/".join(Path(model).parts[-2:]), checksums, seed=1111)},
                )


def report(results: dict[str, Any]) -> dict[str, Any]:
    """The result so far."""
    return {
        "what": "accuracy x 100 on the same embeddings; second implementation: full-batch L-BFGS in PyTorch, float64; "
        "folds: of each cross-validation (SentEval: 10, 5 is a shorter run)",
        "largest_difference": max(each["difference"] for each in results.values()),
        "tasks": results,
    }


def compare(task: TransferTask, embeddings: SentenceEmbeddings, folds: int) -> dict[str, Any]:
    """Both implementations on one task."""
    started = time.perf_counter()
    ours = asdict(score_task(task, embeddings, TransferProtocol(folds=folds)))
    between = time.perf_counter()
    second = second_implementation(task, embeddings, folds)
    seconds = between - started, time.perf_counter() - between
    names = "st_kdmcse", "second implementation"
    return {
        "folds": None if "dev" in task.splits else folds,
        "difference": round(abs(ours["accuracy"] - second["accuracy"]), 2),
        **{
            key: dict(zip(names, (ours[key], second[key]), strict=True))
            for key in ("accuracy", "dev_accuracy", "f1", "c")
            if ours[key] is not None
        },
        "seconds": dict(zip(names, (round(each, 1) for each in seconds), strict=True)),
    }


def embed(model: SentenceTransformer, task: TransferTask, folder: Path | None) -> SentenceEmbeddings:
    """Embeddings of a task's distinct sentences, from the folder if they are there."""
    sentences = list(dict.fromkeys(text for rows in task.splits.values() for row in rows.sentences for text in row))
    if folder is None:
        return encode_distinct(model, sentences)
    data = "-".join(digest[:8] for digest in task.sha256.values())
    path = folder / f"{task.name}-{parameters_checksum(model)[:16]}-{data}.npy"
    if path.is_file():
        return SentenceEmbeddings(sentences, np.load(path))
    found = encode_distinct(model, sentences)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(path, found.matrix)
    return found


def second_implementation(task: TransferTask, embeddings: SentenceEmbeddings, folds: int = 10) -> dict[str, Any]:
    """Accuracy, accuracy on the development part (both x 100), C and F1 of one task."""
    data = {split: features_of(rows, embeddings) for split, rows in task.splits.items()}
    if "all" in data:
        return nested_folds(*data["all"], folds, task.name)
    (x, y), (test_x, test_y) = data["train"], data["test"]
    if "dev" in data:
        grid = SMALL_C
        x, y = torch.cat([x, data["dev"][0]]), torch.cat([y, data["dev"][1]])
        seen = torch.zeros(1, len(y), dtype=torch.bool)
        seen[0, : len(data["train"][1])] = True
    else:
        grid, seen = LARGE_C, masks(y, folds)
    held_out = [accuracy_outside(x, y, seen, c) for c in tqdm(grid, desc=f"{task.name}: C", leave=False)]
    dev = max(held_out)
    c = grid[held_out.index(dev)]
    rows = seen if "dev" in data else torch.ones(1, len(y), dtype=torch.bool)
    predicted = predict(train(x, y, rows, c), test_x)[0]
    return {
        "accuracy": percent((predicted == test_y).double().mean()),
        "dev_accuracy": dev,
        "c": [c],
        "f1": f1_of_class_1(predicted, test_y),
    }


def nested_folds(x: Tensor, y: Tensor, folds: int, name: str) -> dict[str, Any]:
    """Outer folds for the accuracy, inner ones for C."""
    tested, developed, chosen = [], [], []
    for seen in tqdm(masks(y, folds), desc=f"{name}: outer folds", leave=False):
        inner = masks(y[seen], folds)
        held_out = [accuracy_outside(x[seen], y[seen], inner, c) for c in SMALL_C]
        developed.append(max(held_out))
        chosen.append(SMALL_C[held_out.index(max(held_out))])
        tested.append(accuracy_outside(x, y, seen[None], chosen[-1]))
    return {"accuracy": round(sum(tested) / folds, 2), "dev_accuracy": round(sum(developed) / folds, 2), "c": chosen}


def features_of(rows: LabelledSentences, embeddings: SentenceEmbeddings) -> tuple[Tensor, Tensor]:
    """(N, F) features and (N,) labels, short sentences first."""
    table = sorted(
        zip(rows.sentences, rows.labels, strict=True),
        key=lambda row: ([len(sentence.split()) for sentence in row[0]], row[1]),
    )
    x = torch.from_numpy(embeddings([sentences[0] for sentences, _ in table]))
    if len(table[0][0]) == 2:
        other = torch.from_numpy(embeddings([sentences[1] for sentences, _ in table]))
        x = torch.hstack([(x - other).abs(), x * other])
    return x.double(), torch.tensor([label for _, label in table])


def masks(y: Tensor, folds: int) -> Tensor:
    """(folds, N): which rows each fold trains on."""
    seen = torch.zeros(folds, len(y), dtype=torch.bool)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=1111)
    for fold, (rows, _) in enumerate(splitter.split(np.zeros(len(y)), y.numpy())):
        seen[fold, torch.from_numpy(rows)] = True
    return seen


def train(x: Tensor, y: Tensor, seen: Tensor, c: float) -> Tensor:
    """(P, K, F + 1) weights, intercept last, of P classifiers; classifier p learns from the rows that seen[p] marks.

    Two classes have one logit, K = 1; more have one each.
    """
    classes = int(y.max()) + 1
    weights = torch.zeros(len(seen), classes if classes > 2 else 1, x.shape[1] + 1, dtype=x.dtype, requires_grad=True)
    share = seen.to(x.dtype) / seen.sum(dim=1, keepdim=True)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=2000,
        max_eval=4000,
        history_size=100,
        tolerance_grad=1e-6,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = (share * losses(logits(weights, x), y)).sum()
        penalty = (weights[..., :-1].square().sum(dim=(1, 2)) / (2 * c * seen.sum(dim=1))).sum()
        total = loss + penalty
        total.backward()
        return total

    optimizer.step(objective)
    return weights.detach()


def logits(weights: Tensor, x: Tensor) -> Tensor:
    """(P, K, N) scores."""
    problems, classes, _ = weights.shape
    return (weights[..., :-1].flatten(0, 1) @ x.T).view(problems, classes, len(x)) + weights[..., -1:]


def losses(scores: Tensor, y: Tensor) -> Tensor:
    """(P, N): minus the log likelihood of each row."""
    if scores.shape[1] == 1:
        return functional.softplus((1 - 2 * y) * scores[:, 0])
    return scores.logsumexp(dim=1) - scores.gather(1, y.expand(len(scores), 1, -1))[:, 0]


def predict(weights: Tensor, x: Tensor) -> Tensor:
    """(P, N) classes."""
    scores = logits(weights, x)
    return (scores[:, 0] > 0).long() if scores.shape[1] == 1 else scores.argmax(dim=1)


def accuracy_outside(x: Tensor, y: Tensor, seen: Tensor, c: float) -> float:
    """Mean accuracy x 100 on the rows that each classifier has not seen."""
    right = (predict(train(x, y, seen, c), x) == y) & ~seen
    return percent((right.sum(dim=1) / (~seen).sum(dim=1)).double().mean())


def f1_of_class_1(predicted: Tensor, y: Tensor) -> float:
    """Twice the hits, over predictions plus gold, x 100."""
    hits = ((predicted == 1) & (y == 1)).sum()
    return percent(2 * hits / ((predicted == 1).sum() + (y == 1).sum()))


def percent(share: Tensor) -> float:
    """A share as a percentage with two decimals."""
    return round(100 * float(share), 2)


if __name__ == "__main__":
    main()
