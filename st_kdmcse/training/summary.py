"""The records that a run leaves: what it was started with, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainingArguments

from st_kdmcse.processes import peak_memory_mib
from st_kdmcse.provenance import device_name, versions
from st_kdmcse.training.checkpoints import METRIC, SCORE, best_step
from st_kdmcse.training.inputs import TrainingInputs
from st_kdmcse.training.metric import Metric, metric_name
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.student import pooling_of
from st_kdmcse.training.thresholds import BranchFilter
from st_kdmcse.training.trainer import KDMCSETrainer


@dataclass(frozen=True)
class BestScores:
    """Spearman correlations of the best model, from -1 to 1, in float32 whatever it was trained in.

    Attributes:
        dev: on STS-B dev, which chose it where there is no other metric.
        test: on STS-B test.
        by_size: both of embeddings that are cut to a size, by that size, the largest first.
        metric: of the metric that chose it, whatever its scale; None for STS-B dev.
    """

    dev: float
    test: float
    by_size: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    metric: float | None = None


def run_record(
    options: TrainingOptions, checksums: Mapping[str, str], arguments: SentenceTransformerTrainingArguments
) -> dict[str, Any]:
    """What a run is started with, for ``run.json``.

    Args:
        options: the run.
        checksums: SHA-256 of its data by name.
        arguments: those of the trainer.
    """
    plain = asdict(replace(options, metric=None, nanobeir_data=None))
    plain |= {"metric": metric_name(options.metric), "nanobeir_data": options.nanobeir_data}
    return {
        "options": json.loads(json.dumps(plain, default=str)),
        "processes": arguments.world_size,
        "bf16": arguments.bf16,
        "batch_size": arguments.per_device_train_batch_size,
        "learning_rate": arguments.learning_rate,
        "data_sha256": dict(checksums),
    }


def training_summary(
    options: TrainingOptions,
    trainer: KDMCSETrainer,
    run: Mapping[str, Any],
    inputs: TrainingInputs,
    scores: BestScores | None,
    filters: Sequence[BranchFilter],
    seconds: float,
) -> dict[str, Any]:
    """What came of a run, for ``training_summary.json``.

    Args:
        options: the run.
        trainer: after training.
        run: the record that the run was started with.
        inputs: its data.
        scores: of the best model; None without evaluation.
        filters: what the filter of each branch removes.
        seconds: training time of this process, without what came before a resumption.
    """
    history = trainer.state.log_history
    curve = [{"step": entry["step"], "spearman": entry[METRIC]} for entry in history if METRIC in entry]
    best = next((point for point in curve if point["step"] == best_step(history)), None)
    cuda = torch.cuda.is_available()
    precision = "bfloat16" if trainer.args.bf16 else "float32"
    return {
        "method": options.method,
        "recipe": options.recipe,
        "config": trainer.head_losses[0].get_config_dict(),
        "options": run["options"],
        "pooling": pooling_of(trainer.model),
        "batch_size": trainer.args.per_device_train_batch_size,
        "learning_rate": trainer.args.learning_rate,
        "head_learning_rate": options.head_learning_rate or trainer.args.learning_rate,
        "bf16": trainer.args.bf16,
        "bf16_until_step": run.get("bf16_until_step"),
        "precision": {"training": precision, "sts_dev_curve": precision, "scores_of_best": "float32"},
        "processes": trainer.args.world_size,
        "steps": trainer.state.global_step,
        "seed": options.seed,
        "data_sha256": inputs.checksums,
        "teacher": inputs.store.teacher if inputs.store else None,
        "excluded": inputs.left_out and {"images": inputs.left_out.images, "captions": len(inputs.left_out.rows)},
        "overlap": inputs.overlap,
        "filters": [asdict(branch) for branch in filters],
        "sts_dev_before": run.get("score_before"),
        "sts_dev_curve": curve,
        "sts_dev_best": best,
        "sts_dev_last": curve[-1] if curve else None,
        "sts_dev_of_best": scores and scores.dev,
        "sts_test_of_best": scores and scores.test,
        "sts_by_size": [
            {"size": size, "dev": dev, "test": test} for size, (dev, test) in (scores.by_size if scores else {}).items()
        ],
        "metric": inputs.metric and _of_metric(inputs.metric, history, run, scores),
        "losses": [entry for entry in history if "loss" in entry],
        "train_seconds": round(seconds, 1),
        "resumed": options.resume,
        "peak_memory_mib": {
            "device": round(torch.cuda.max_memory_allocated() / 2**20) if cuda else None,
            "process": peak_memory_mib(),
        },
        "device": device_name(),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _of_metric(
    metric: Metric, history: Sequence[Mapping[str, Any]], run: Mapping[str, Any], scores: BestScores | None
) -> dict[str, Any]:
    """Name and scores of the metric that chose the best model."""
    return {
        "name": metric.name,
        "primary_metric": metric.evaluator.primary_metric,
        "before": run.get("metric_before"),
        "curve": [{"step": entry["step"], "score": entry[SCORE]} for entry in history if SCORE in entry],
        "of_best": scores and scores.metric,
    }
