"""SentEval's transfer tasks: logistic regression on frozen sentence embeddings.

The same as in SentEval (Conneau and Kiela, LREC 2018) with its scikit-learn classifier: the files and how they are
read, the order of the rows before they are dealt into folds (by number of tokens, then label), stratified shuffled
folds with seed 1111, features, the values of C that are tried, accuracies rounded to two decimals before C is chosen,
the smallest C among equals, and the mean over folds.

Different: scikit-learn's solver was liblinear when SentEval was written, which also regularises the intercept and
trains one classifier a class; here it is the L-BFGS solver, the default since, run to convergence. The numbers in the
papers of SimCSE, MCSE and KDMCSE come from SentEval with ``usepytorch``: a linear layer trained with Adam and early
stopping, L2 weights from 1e-5 to 1e-2. Compare models with each other by one of the two, not across them.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped, unused-ignore]

from st_kdmcse.data.transfer import TRANSFER_TASKS, LabelledSentences, TransferTask, load_transfer_task
from st_kdmcse.encoding import SentenceEmbeddings, encode_distinct
from st_kdmcse.files import progress_bar, write_json
from st_kdmcse.precision import Precision, resolve_precision
from st_kdmcse.provenance import differences, model_identity, provenance

logger = logging.getLogger(__name__)

AVERAGE = "Avg."
INNER_GRID = tuple(2.0**power for power in range(-2, 4))
"""C tried in nested cross-validation (MR, CR, SUBJ, MPQA) and with a development set (SST2)."""
TRAIN_TEST_GRID = tuple(2.0**power for power in range(-1, 6))
"""C tried in cross-validation on the training set (TREC, MRPC)."""

Features = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_TOLERANCE = 1e-6  # of the gradient of the mean loss, 100 times below the default: C is chosen among near-equals
_MAX_ITERATIONS = 10_000


@dataclass(frozen=True)
class TransferProtocol:
    """What may be chosen in SentEval's protocol; the defaults are those of the published tables.

    Args:
        folds: of each cross-validation, outer and inner.
        seed: of the shuffling before the rows are dealt into folds.

    Raises:
        ValueError: for fewer than 2 folds.
    """

    folds: int = 10
    seed: int = 1111

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, got {self.folds}")

    def splitter(self) -> StratifiedKFold:
        """Deals rows into the folds."""
        return StratifiedKFold(n_splits=self.folds, shuffle=True, random_state=self.seed)


@dataclass(frozen=True)
class TransferScore:
    """How a task went; everything x 100 and rounded to two decimals, as SentEval does.

    Attributes:
        accuracy: on the test part; with nested cross-validation, the mean over the outer folds.
        dev_accuracy: of the chosen C on the development part, likewise.
        c: the chosen C of each outer fold, or the one.
        fold_accuracy: test accuracy of each outer fold; empty where there is a test set.
        f1: of class 1 on the test set (MRPC alone).
    """

    accuracy: float
    dev_accuracy: float
    c: list[float]
    fold_accuracy: list[float]
    f1: float | None = None


def evaluate_transfer(
    model: SentenceTransformer,
    data_dir: str | Path,
    tasks: Sequence[str] = TRANSFER_TASKS,
    protocol: TransferProtocol | None = None,
    *,
    model_name: str | None = None,
    output: str | Path | None = None,
    jobs: int | None = None,
    batch_tokens: int | None = None,
    show_progress_bar: bool | None = None,
    precision: Precision = "float32",
) -> dict[str, Any]:
    """Score a model on transfer tasks.

    Args:
        model: any sentence-transformers model.
        data_dir: SentEval's folder.
        tasks: names of :data:`TRANSFER_TASKS`.
        protocol: folds and seed.
        model_name: hub name or folder of the model, for the record.
        output: JSON file, written after each task. Tasks that it holds already, of the same model, data and protocol,
            are not done again.
        jobs: classifiers trained at a time; all cores.
        batch_tokens: tokens encoded at a time.
        show_progress_bar: None shows them in a terminal, once they have taken two seconds.
        precision: that sentences are encoded in; "auto" is bfloat16 where that is faster.

    Returns:
        ``accuracy`` (x 100, two decimals, by task and "Avg."; None where a task is absent or was not asked for, and
        then for the average too), ``absent`` (tasks without files), ``protocol``, ``details`` by task, and the
        provenance.

    Raises:
        FileNotFoundError: if there is no such folder, none of the tasks' files, or some of a task's files only.
        ValueError: if a task is unknown, a file malformed, an embedding not finite, a class smaller than the number of
            folds, or ``output`` holds something else.
    """
    protocol = protocol or TransferProtocol()
    loaded = {name: load_transfer_task(data_dir, name) for name in tasks}
    absent = [name for name, task in loaded.items() if task is None]
    if len(absent) == len(loaded):
        raise FileNotFoundError(f"{data_dir} holds no files of {', '.join(loaded)}: give a SentEval folder")
    computed = resolve_precision(precision, model.device)
    described = {
        **asdict(protocol),
        "classifier": f"scikit-learn LogisticRegression, lbfgs, tolerance {_TOLERANCE}",
        "precision": computed,
    }
    details = _finished(output, model_identity(model), described)
    result: dict[str, Any] = {}
    for task in filter(None, loaded.values()):
        if details.get(task.name, {}).get("data_sha256") == task.sha256:
            logger.info("%s was done before", task.name)
        else:
            started = time.perf_counter()
            embeddings = _encode(model, task, batch_tokens, show_progress_bar, computed)
            score = score_task(task, embeddings, protocol, jobs=jobs, show_progress_bar=show_progress_bar)
            details[task.name] = {
                **{key: value for key, value in asdict(score).items() if value not in (None, [])},
                "rows": {split: len(rows) for split, rows in task.splits.items()},
                "distinct_sentences": len(embeddings),
                "seconds": round(time.perf_counter() - started, 1),
                "data_sha256": dict(task.sha256),
            }
        details = {name: details[name] for name in TRANSFER_TASKS if name in details}
        checksums = {file: digest for each in details.values() for file, digest in each["data_sha256"].items()}
        result = {
            "accuracy": _table_row(details),
            "absent": [name for name in absent if name not in details],
            "protocol": described,
            "details": details,
            **provenance(model, model_name, checksums, protocol.seed),
        }
        if output is not None:
            write_json(output, result)
    return result


def score_task(
    task: TransferTask,
    embeddings: Callable[[Sequence[str]], npt.NDArray[Any]],
    protocol: TransferProtocol | None = None,
    *,
    jobs: int | None = None,
    show_progress_bar: bool | None = None,
) -> TransferScore:
    """Score embeddings on one task, by the protocol that the task has in SentEval.

    Args:
        task: the task.
        embeddings: gives the (N, dimension) embeddings of N of its sentences.
        protocol: folds and seed.
        jobs: classifiers trained at a time; all cores.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Raises:
        ValueError: if a class has fewer rows than there are folds.
    """
    protocol = protocol or TransferProtocol()
    splits = {name: classifier_input(rows, embeddings) for name, rows in task.splits.items()}
    with _Fits(jobs, task.name, show_progress_bar) as fits:
        if "all" in splits:
            return _nested(*splits["all"], protocol, fits)
        if "dev" in splits:
            return _train_dev_test(splits["train"], splits["dev"], splits["test"], fits)
        return _train_test(splits["train"], splits["test"], protocol, fits, f1=task.name == "MRPC")


def classifier_input(
    rows: LabelledSentences, embeddings: Callable[[Sequence[str]], npt.NDArray[Any]]
) -> tuple[Features, Labels]:
    """What the classifier sees: the embedding of a sentence, or |u - v| and u * v of a pair side by side.

    The rows come in SentEval's order, on which the folds depend: by number of tokens, then by label.

    Args:
        rows: N sentences or pairs.
        embeddings: gives the (M, dimension) embeddings of M sentences.

    Returns:
        (N, dimension) features, for pairs (N, 2 dimension), and (N,) labels.
    """
    keys = [
        (*(len(text.split()) for text in row), label) for row, label in zip(rows.sentences, rows.labels, strict=True)
    ]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    columns = [embeddings(column) for column in zip(*(rows.sentences[row] for row in order), strict=True)]
    features = columns[0]
    if len(columns) == 2:
        first, second = columns
        features = np.concatenate([np.abs(first - second), first * second], axis=1)
    return features.astype(np.float64), np.array([rows.labels[row] for row in order])


def _nested(features: Features, labels: Labels, protocol: TransferProtocol, fits: _Fits) -> TransferScore:
    """Outer folds measure; within the training part of each, inner folds choose C."""
    outer = _folds(labels, protocol)
    inner = [
        (train[inner_train], train[inner_test])
        for train, _ in outer
        for inner_train, inner_test in _folds(labels[train], protocol)
    ]
    fits.expect(len(inner) * len(INNER_GRID) + len(outer))
    scores = fits.map(lambda rows: _accuracies(features, labels, *rows, INNER_GRID), inner, len(INNER_GRID))
    chosen = [_choose(part, INNER_GRID) for part in np.reshape(scores, (len(outer), len(inner) // len(outer), -1))]
    measured = fits.map(
        lambda item: _accuracies(features, labels, *item[0], (item[1][0],))[0],
        list(zip(outer, chosen, strict=True)),
    )
    tested = [_percent(accuracy) for accuracy in measured]
    return TransferScore(
        accuracy=round(float(np.mean(tested)), 2),
        dev_accuracy=round(float(np.mean([accuracy for _, accuracy in chosen])), 2),
        c=[c for c, _ in chosen],
        fold_accuracy=tested,
    )


def _train_test(
    train: tuple[Features, Labels],
    test: tuple[Features, Labels],
    protocol: TransferProtocol,
    fits: _Fits,
    f1: bool,
) -> TransferScore:
    """Folds of the training set choose C; a classifier of all of it is measured on the test set."""
    folds = _folds(train[1], protocol)
    fits.expect(len(folds) * len(TRAIN_TEST_GRID) + 1)
    scores = fits.map(lambda rows: _accuracies(*train, *rows, TRAIN_TEST_GRID), folds, len(TRAIN_TEST_GRID))
    return _measure(_choose(scores, TRAIN_TEST_GRID), train, test, fits, f1)


def _train_dev_test(
    train: tuple[Features, Labels], dev: tuple[Features, Labels], test: tuple[Features, Labels], fits: _Fits
) -> TransferScore:
    """The development set chooses C; the classifier of the training set is measured on the test set."""
    features, labels = np.concatenate([train[0], dev[0]]), np.concatenate([train[1], dev[1]])
    split = np.arange(len(train[1])), np.arange(len(train[1]), len(labels))
    fits.expect(len(INNER_GRID) + 1)
    scores = fits.map(lambda rows: _accuracies(features, labels, *rows, INNER_GRID), [split], len(INNER_GRID))
    return _measure(_choose(scores, INNER_GRID), train, test, fits, f1=False)


def _measure(
    chosen: tuple[float, float],
    train: tuple[Features, Labels],
    test: tuple[Features, Labels],
    fits: _Fits,
    f1: bool,
) -> TransferScore:
    c, dev_accuracy = chosen
    predicted = fits.map(lambda c: _classifier(c).fit(*train).predict(test[0]), [c])[0]
    return TransferScore(
        accuracy=_percent(np.mean(predicted == test[1])),
        dev_accuracy=dev_accuracy,
        c=[c],
        fold_accuracy=[],
        f1=_percent(f1_score(test[1], predicted)) if f1 else None,
    )


def _folds(labels: Labels, protocol: TransferProtocol) -> list[tuple[Rows, Rows]]:
    smallest = int(np.bincount(labels).min())
    if smallest < protocol.folds:
        raise ValueError(f"a class has {smallest} rows to be dealt into {protocol.folds} folds: take fewer folds")
    return list(protocol.splitter().split(np.zeros(len(labels)), labels))


def _accuracies(features: Features, labels: Labels, train: Rows, test: Rows, grid: Sequence[float]) -> list[float]:
    """Accuracy on some rows, from 0 to 1, of classifiers trained on others; each starts from the last one's weights."""
    classifier = _classifier(grid[0])
    seen, unseen = (features[train], labels[train]), (features[test], labels[test])
    return [float(classifier.set_params(C=c).fit(*seen).score(*unseen)) for c in grid]


def _classifier(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, tol=_TOLERANCE, max_iter=_MAX_ITERATIONS, warm_start=True)


def _choose(scores: npt.ArrayLike, grid: Sequence[float]) -> tuple[float, float]:
    """The C of the highest mean accuracy over (folds, C) scores, and that accuracy x 100."""
    means = [_percent(mean) for mean in np.mean(np.asarray(scores), axis=0)]
    best = int(np.argmax(means))
    return grid[best], means[best]


def _percent(share: float) -> float:
    return round(100 * float(share), 2)


class _Fits:
    """Threads that train classifiers, with a progress bar over all classifiers of a task.

    Matrix products keep to one thread each: more threads than that come from ``jobs``, and a result does not depend on
    their number.
    """

    def __init__(self, jobs: int | None, task: str, show_progress_bar: bool | None) -> None:
        self._pool = ThreadPoolExecutor(jobs or os.cpu_count() or 1)
        self._limits = threadpool_limits(1, user_api="blas")
        self._bar = progress_bar(None, f"{task}: classifiers", "fit", show_progress_bar)

    def __enter__(self) -> _Fits:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)  # after Ctrl-C only what runs already is finished
        self._limits.restore_original_limits()
        self._bar.close()

    def expect(self, total: int) -> None:
        """How many classifiers there will be."""
        self._bar.total = total

    def map(self, function: Callable[[_Item], _Result], items: Sequence[_Item], fits: int = 1) -> list[_Result]:
        """The results for all items in their order; ``fits`` classifiers are trained for each."""
        futures = [self._pool.submit(function, item) for item in items]
        for future in as_completed(futures):
            future.result()
            self._bar.update(fits)
        return [future.result() for future in futures]


def _encode(
    model: SentenceTransformer,
    task: TransferTask,
    batch_tokens: int | None,
    show_progress_bar: bool | None,
    precision: Precision,
) -> SentenceEmbeddings:
    rows = [
        (sentence, place)
        for split in task.splits.values()
        for row, place in zip(split.sentences, split.places, strict=True)
        for sentence in row
    ]
    return encode_distinct(
        model,
        [sentence for sentence, _ in rows],
        batch_tokens=batch_tokens,
        show_progress_bar=show_progress_bar,
        where=lambda number: rows[number][1],
        precision=precision,
    )


def _finished(output: str | Path | None, model: Mapping[str, Any], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Details of the tasks in a result file of the same model and protocol."""
    if output is None or not Path(output).exists():
        return {}
    remedy = "give another output file, or move that one away"
    now = {**model, **protocol}
    try:
        earlier = json.loads(Path(output).read_text(encoding="utf-8"))
        before = {**earlier["model"], **earlier["protocol"]}
        details = dict(earlier["details"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output} is not a result of transfer tasks: {remedy}") from error
    changed = differences(before, now, {"name"})
    if changed:
        raise ValueError(f"{output} holds results of another model or protocol ({'; '.join(changed)}): {remedy}")
    return details


def _table_row(details: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    row: dict[str, float | None] = {name: details.get(name, {}).get("accuracy") for name in TRANSFER_TASKS}
    found = [accuracy for accuracy in row.values() if accuracy is not None]
    row[AVERAGE] = round(sum(found) / len(found), 2) if len(found) == len(TRANSFER_TASKS) else None
    return row
