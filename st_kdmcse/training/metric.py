"""What the best model of a run is chosen by, where it is not STS-B dev: NanoBEIR, or any evaluator of the library."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, TypeAlias

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import NanoBEIREvaluator, SentenceEvaluator
from sentence_transformers.sentence_transformer.evaluation.nano_beir import DATASET_NAME_TO_HUMAN_READABLE

NANOBEIR = "nanobeir"
NANOBEIR_DATA = "sentence-transformers/NanoBEIR-en"
"""Where NanoBEIR is on the hub."""

MetricOption: TypeAlias = "str | SentenceEvaluator | None"
"""``"nanobeir"``, ``"nanobeir:msmarco,nq"``, or an evaluator."""


@dataclass(frozen=True)
class Metric:
    """The evaluator that chooses the best model of a run; more is better.

    Attributes:
        name: as the options have it; of an evaluator, its class.
        evaluator: gives the score as its primary metric.
        checksum: SHA-256 of its data; None where they are not known.
    """

    name: str
    evaluator: SentenceEvaluator
    checksum: str | None

    def score(self, model: SentenceTransformer) -> float:
        """The score of a model."""
        found: Any = self.evaluator(model)
        return float(found[self.evaluator.primary_metric] if isinstance(found, dict) else found)


def check_metric(metric: MetricOption) -> None:
    """Refuse what names no metric.

    Args:
        metric: of the options.

    Raises:
        ValueError: if it is a text that names no metric or an unknown task, or an evaluator by which less is better.
    """
    if isinstance(metric, str):
        _tasks(metric)
    elif metric is not None and not getattr(metric, "greater_is_better", True):
        raise ValueError(f"`metric`: less is better by {type(metric).__name__}; the best model has the highest score")


def metric_name(metric: MetricOption) -> str | None:
    """The name of a metric for records; None for STS-B dev."""
    return metric if metric is None or isinstance(metric, str) else type(metric).__name__


def load_metric(metric: MetricOption, nanobeir_data: str | None) -> Metric | None:
    """Load what a metric needs.

    Args:
        metric: of the options; None is STS-B dev.
        nanobeir_data: NanoBEIR's hub name or a folder of its layout; None is :data:`NANOBEIR_DATA`.

    Raises:
        ValueError: if the data are not those of NanoBEIR, or cannot be loaded.
    """
    if metric is None:
        return None
    if not isinstance(metric, str):
        checksum = _nanobeir_checksum(metric) if isinstance(metric, NanoBEIREvaluator) else None
        return Metric(type(metric).__name__, metric, checksum)
    source = nanobeir_data or NANOBEIR_DATA
    tasks = _tasks(metric)
    try:
        evaluator = NanoBEIREvaluator(tasks, dataset_id=source)
    except ValueError as error:  # the library's, whatever went wrong
        reason = f"{error} {error.__cause__ or ''}".strip()
        raise ValueError(
            f"NanoBEIR cannot be loaded from {source} ({reason}): give a copy of the data set with its README.md, or "
            "its name on the hub, as `nanobeir_data`"
        ) from error
    return Metric(metric, evaluator, _nanobeir_checksum(evaluator))


def _tasks(metric: str) -> list[str]:
    kind, _, names = metric.partition(":")
    tasks = [name.strip() for name in names.split(",")] if names else list(DATASET_NAME_TO_HUMAN_READABLE)
    unknown = [name for name in tasks if name.lower() not in DATASET_NAME_TO_HUMAN_READABLE]
    if kind != NANOBEIR or metric.endswith(":"):
        raise ValueError(
            f"`metric` is {metric!r}, expected {NANOBEIR}, {NANOBEIR}:msmarco or {NANOBEIR}:msmarco,nq; leave it out "
            "for STS-B dev"
        )
    if unknown:
        raise ValueError(
            f"`metric`: NanoBEIR has no task {', '.join(unknown)}: choose from "
            f"{', '.join(DATASET_NAME_TO_HUMAN_READABLE)}"
        )
    return tasks


def _nanobeir_checksum(evaluator: NanoBEIREvaluator) -> str:
    digest = hashlib.sha256()
    for each in evaluator.evaluators:
        relevant = {query: sorted(each.relevant_docs[query]) for query in each.queries_ids}
        content = [each.name, each.queries_ids, each.queries, each.corpus_ids, each.corpus, relevant]
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()
