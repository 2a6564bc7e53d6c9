"""Semantic textual similarity as SentEval scores it, with every distinct sentence encoded once for all tasks."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from st_kdmcse.data.sts import STS_TASKS, STSPairs, STSTask
from st_kdmcse.encoding import encode_distinct, encode_distinct_each, load_model
from st_kdmcse.precision import Precision
from st_kdmcse.provenance import parameters_checksum

logger = logging.getLogger(__name__)

Similarities = npt.NDArray[np.float32]

AVERAGE = "Avg."
AS_SAVED = "as saved"
POOLINGS = ("cls", "mean", "pooler")
"""What :func:`evaluate_poolings` compares: [CLS], the mean over tokens, and BERT's own pooler over [CLS]."""


@dataclass(frozen=True)
class STSResult:
    """Scores of one model on some STS tasks.

    Attributes:
        spearman: Spearman x 100 by task in the "all" setting, rounded to 2 decimals, and the mean of all seven as
            "Avg."; None for a task that was absent or whose correlation is undefined, and for "Avg." if there is one.
            Tasks beside the seven follow.
        details: for each task that was there: pairs, checksum of the data, Pearson and Spearman (x 100) of all
            subsets as one ("all"), their mean over subsets, the mean weighted by pairs ("wmean"), and each subset's.
        similarities: the cosine of each pair by task, subset after subset.
    """

    spearman: dict[str, float | None]
    details: dict[str, Any]
    similarities: dict[str, Similarities]

    def to_frame(self) -> pd.DataFrame:
        """A row for each part: task, subset ("all" for the whole task), pairs, Pearson and Spearman x 100."""
        rows: list[dict[str, Any]] = []
        for task, details in self.details.items():
            whole = {kind: details[kind]["all"] for kind in ("pearson", "spearman")}
            parts = {"all": {"pairs": details["pairs"], **whole}, **details["subsets"]}
            rows += [{"task": task, "subset": name, **part} for name, part in parts.items()]
        frame: pd.DataFrame = pd.DataFrame(rows, columns=["task", "subset", "pairs", "pearson", "spearman"])
        return frame

    @property
    def absent(self) -> list[str]:
        """The tasks that were not scored."""
        return [name for name in STS_TASKS if name not in self.details]


def evaluate_sts(
    model: SentenceTransformer,
    tasks: Sequence[STSTask],
    *,
    batch_tokens: int | None = None,
    show_progress_bar: bool | None = None,
    precision: Precision = "float32",
) -> STSResult:
    """Score a model on STS tasks: cosine similarity against the gold scores.

    Per task this is SentEval's "all" setting (Conneau and Kiela, LREC 2018; Gao et al., EMNLP 2021): the pairs of all
    subsets together, one Spearman correlation.

    Args:
        model: any sentence-transformers model.
        tasks: what :func:`~st_kdmcse.data.load_sts_tasks` returns.
        batch_tokens: tokens encoded at a time; 2,048 on a CPU, 16,384 elsewhere.
        show_progress_bar: None shows one in a terminal, after two seconds.
        precision: of the model's matrix products; "auto" is bfloat16 where that is faster. Cosines and correlations are
            computed in float32 all the same.

    Raises:
        ValueError: if there is no task, the device has no such precision, or an embedding is not finite; names the file
            and the line of the sentence.
    """
    sentences, where = _sentences(tasks)
    embeddings = encode_distinct(
        model,
        sentences,
        batch_tokens=batch_tokens,
        show_progress_bar=show_progress_bar,
        where=where,
        precision=precision,
    )
    return score_embeddings(embeddings, tasks)


def evaluate_poolings(
    model: SentenceTransformer,
    tasks: Sequence[STSTask],
    poolings: Sequence[str] = POOLINGS,
    *,
    batch_tokens: int | None = None,
    show_progress_bar: bool | None = None,
    precision: Precision = "float32",
) -> dict[str, STSResult]:
    """What other poolings of the model's token embeddings would give, from one forward pass.

    Args:
        model: a model whose first module is a ``Transformer``.
        tasks: what :func:`~st_kdmcse.data.load_sts_tasks` returns.
        poolings: of :data:`POOLINGS`.
        batch_tokens: tokens encoded at a time.
        show_progress_bar: None shows one in a terminal, after two seconds.
        precision: as for :func:`evaluate_sts`.

    Returns:
        Results by pooling, and of the model with its own as "as saved".

    Raises:
        ValueError: for an unknown pooling, or one that the model does not have.
    """
    readers = {name: _pooling(model, name) for name in poolings}
    sentences, where = _sentences(tasks)

    def read(output: Mapping[str, Tensor]) -> dict[str, Tensor]:
        others = {name: reader(output) for name, reader in readers.items()}
        return {AS_SAVED: output["sentence_embedding"], **others}

    embeddings = encode_distinct_each(model, sentences, read, batch_tokens, show_progress_bar, where, precision)
    return {name: score_embeddings(each, tasks) for name, each in embeddings.items()}


def has_pooler(model: SentenceTransformer, name_or_path: str) -> bool:
    """Whether the encoder's checkpoint has a pooler, as BERT's has.

    Where it lacks one, as RoBERTa's does, transformers draws one at random at every loading, and its scores mean
    nothing.

    Args:
        model: a model.
        name_or_path: where it was loaded from.
    """
    pooler = _pooler(model)
    if not isinstance(pooler, nn.Module):
        return False
    again = _pooler(load_model(name_or_path, "cpu", "mean"))
    return again is not None and parameters_checksum(pooler) == parameters_checksum(again)


def score_embeddings(
    embeddings: Callable[[Sequence[str]], npt.NDArray[np.float32]], tasks: Sequence[STSTask]
) -> STSResult:
    """Score embeddings that are at hand.

    Args:
        embeddings: gives the (N, dimension) embeddings of N sentences, such as
            :class:`~st_kdmcse.encoding.SentenceEmbeddings`.
        tasks: what :func:`~st_kdmcse.data.load_sts_tasks` returns.
    """
    similarities = {task.name: cosines(embeddings(task.sentences1), embeddings(task.sentences2)) for task in tasks}
    details = {task.name: _task_details(task, similarities[task.name]) for task in tasks}
    found = {name: details[name]["spearman"]["all"] if name in details else None for name in STS_TASKS}
    spearman = {name: None if score is None else round(score, 2) for name, score in found.items()}
    scores = [score for score in spearman.values() if score is not None]
    # As in published tables, the mean of the rounded scores.
    spearman[AVERAGE] = round(sum(scores) / len(scores), 2) if len(scores) == len(STS_TASKS) else None
    for name, parts in details.items():
        if name not in spearman:
            spearman[name] = None if parts["spearman"]["all"] is None else round(parts["spearman"]["all"], 2)
    return STSResult(spearman, details, similarities)


def cosines(x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> Similarities:
    """The cosine of each row of (n, d) vectors with its partner; 0 for a zero vector."""
    tiny = np.finfo(np.float32).tiny
    lengths = np.maximum(np.linalg.norm(x, axis=1), tiny) * np.maximum(np.linalg.norm(y, axis=1), tiny)
    return np.asarray(np.einsum("nd,nd->n", x, y) / np.maximum(lengths, tiny), dtype=np.float32)


class STSEvaluator(SentenceEvaluator):
    """The STS tasks as an evaluator for training, alone or in a ``SequentialEvaluator``.

    The metrics are ``{name}_{task}_spearman_cosine`` and ``{name}_{task}_pearson_cosine``, from -1 to 1, and
    ``{name}_spearman_cosine``, the mean of the tasks' Spearman correlations, which is the primary metric.

    Args:
        tasks: what :func:`~st_kdmcse.data.load_sts_tasks` returns.
        name: first part of the metrics' names.
        batch_tokens: tokens encoded at a time; 2,048 on a CPU, 16,384 elsewhere.
        show_progress_bar: None shows one in a terminal, after two seconds.
        write_csv: whether to append each result to ``sts_evaluation_{name}_results.csv`` in the output folder.
        precision: as for :func:`evaluate_sts`.

    Raises:
        ValueError: if there is no task.

    Example:
        .. code-block:: python

            evaluator = STSEvaluator(load_sts_tasks("SentEval/data", ["STS12", "STS-B"]))
            evaluator(model)["sts_spearman_cosine"]
    """

    def __init__(
        self,
        tasks: Sequence[STSTask],
        name: str = "sts",
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = False,
        write_csv: bool = True,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("there are no STS tasks to evaluate on")
        self.tasks = list(tasks)
        self.name = name
        self.batch_tokens = batch_tokens
        self.show_progress_bar = show_progress_bar
        self.write_csv = write_csv
        self.precision: Precision = precision
        self.primary_metric = "spearman_cosine"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate a model.

        Args:
            model: any sentence-transformers model.
            output_path: folder for the CSV file.
            epoch: for the CSV file.
            steps: for the CSV file.

        Returns:
            The metrics; nan where a correlation is undefined, as for a model that has collapsed to one vector.
        """
        result = evaluate_sts(
            model,
            self.tasks,
            batch_tokens=self.batch_tokens,
            show_progress_bar=self.show_progress_bar,
            precision=self.precision,
        )
        metrics: dict[str, float] = {}
        for task in self.tasks:
            for kind in ("spearman", "pearson"):
                score = result.details[task.name][kind]["all"]
                metrics[f"{task.name}_{kind}_cosine"] = math.nan if score is None else score / 100
        metrics["spearman_cosine"] = float(np.mean([metrics[f"{task.name}_spearman_cosine"] for task in self.tasks]))
        if output_path is not None and self.write_csv:
            self._append(Path(output_path), {"epoch": epoch, "steps": steps, **metrics})
        logger.info(
            "%s: Spearman x 100 %s",
            self.name,
            ", ".join(f"{task.name} {100 * metrics[f'{task.name}_spearman_cosine']:.2f}" for task in self.tasks),
        )
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    @property
    def description(self) -> str:
        """What the model card calls it."""
        return "Semantic Textual Similarity"

    def _append(self, folder: Path, row: Mapping[str, float]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"sts_evaluation{f'_{self.name}' if self.name else ''}_results.csv"
        is_new = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def _sentences(tasks: Sequence[STSTask]) -> tuple[list[str], Callable[[int], str]]:
    """All sentences, and where each comes from."""
    if not tasks:
        raise ValueError("there are no STS tasks to evaluate on")
    sentences = [sentence for task in tasks for each in (task.sentences1, task.sentences2) for sentence in each]
    places = [place for task in tasks for place in 2 * (task.places or [task.name] * len(task))]
    return sentences, places.__getitem__


def _task_details(task: STSTask, similarities: Similarities) -> dict[str, Any]:
    ends = np.cumsum([len(subset) for subset in task.subsets])[:-1]
    subsets = {
        subset.name: {"pairs": len(subset), **_correlations(subset, part)}
        for subset, part in zip(task.subsets, np.split(similarities, ends), strict=True)
    }
    pairs = [len(subset) for subset in task.subsets]
    together = _correlations(STSPairs(task.sentences1, task.sentences2, task.scores, task.name), similarities)
    details: dict[str, Any] = {"pairs": len(task), "data_sha256": task.checksum}
    for kind, score in together.items():
        scores = np.array([subset[kind] for subset in subsets.values()], dtype=np.float64)  # nan for None
        defined = np.isfinite(scores).all()
        details[kind] = {
            "all": score,
            "mean": float(scores.mean()) if defined else None,
            "wmean": float(np.average(scores, weights=pairs)) if defined else None,
        }
    return {**details, "subsets": subsets}


def _correlations(pairs: STSPairs, similarities: Similarities) -> dict[str, float | None]:
    """Pearson and Spearman x 100; None where gold or similarity is the same for all pairs."""
    if np.ptp(pairs.scores) == 0 or np.ptp(similarities) == 0:
        logger.warning("%s: all pairs have one score or one similarity; no correlation", pairs.name)
        return {"pearson": None, "spearman": None}
    return {
        "pearson": 100 * float(stats.pearsonr(pairs.scores, similarities).statistic),
        "spearman": 100 * float(stats.spearmanr(pairs.scores, similarities).statistic),
    }


def _pooling(model: SentenceTransformer, name: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    if name not in POOLINGS:
        raise ValueError(f"unknown pooling {name!r}: choose from {', '.join(POOLINGS)}")
    if name != "pooler":
        module = Pooling(1, name)  # the dimension is for what follows a pooling
        return lambda output: module(dict(output))["sentence_embedding"]
    pooler = _pooler(model)
    if pooler is None:
        raise ValueError("the encoder has no pooler: leave it out of the poolings")
    return lambda output: pooler(output["token_embeddings"])


def _pooler(model: SentenceTransformer) -> nn.Module | None:
    return getattr(getattr(model[0], "auto_model", None), "pooler", None)
