"""Methods compared over seeds and over sentence pairs: the numbers of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from st_kdmcse.data.sts import STS_TASKS, STSTask
from st_kdmcse.experiments.runs import Checkpoint, Group, Run, Scores, differing_settings, group_runs, score_runs
from st_kdmcse.experiments.statistics import (
    Array,
    Summary,
    bootstrap_difference,
    bootstrap_scores,
    holm,
    summarize,
    t_test,
)

SIGNIFICANCE = 0.05
"""Corrected p values up to this count as a difference."""

AVERAGE = "Avg."
PRESENT = "mean of the tasks present"

_SETTINGS_OF_METHODS = ("method", "recipe")


class MethodScores(NamedTuple):
    """A method in the tables. Scores are Spearman x 100, None if a run has no such score.

    Attributes:
        group: the runs.
        best: by task, :data:`PRESENT` and :data:`AVERAGE`, for the best checkpoint on STS-B dev.
        last: the same for the last checkpoint.
        dev: on STS-B dev by checkpoint.
        each: by checkpoint, the scores of each run, as in ``best`` and ``last``.
        compared: what the tests compare: of each run, the mean of the tasks present; without STS tasks, STS-B test.
        seconds: training time.
    """

    group: Group
    best: dict[str, Summary | None]
    last: dict[str, Summary | None]
    dev: dict[Checkpoint, Summary | None]
    each: dict[Checkpoint, list[dict[str, float | None]]]
    compared: list[float] | None
    seconds: Summary


@dataclass(frozen=True)
class Pair:
    """Two methods compared.

    Attributes:
        first: label of a method.
        second: label of another one.
        difference: mean score of the first minus that of the second.
        t_test: p value of the t-test over seeds; None if no test is possible.
        t_test_holm: the same, corrected for the number of pairs.
        welch: p value of Welch's t-test, not corrected.
        low: lower end of the 95 % interval of the paired bootstrap over sentence pairs.
        high: upper end.
        bootstrap: its p value.
        bootstrap_holm: the same, corrected for the number of pairs.
    """

    first: str
    second: str
    difference: float
    t_test: float | None
    t_test_holm: float | None
    welch: float | None
    low: float | None
    high: float | None
    bootstrap: float | None
    bootstrap_holm: float | None

    @property
    def over_seeds(self) -> str:
        """What the t-test says, in words."""
        return self._reading(self.t_test_holm)

    @property
    def over_pairs(self) -> str:
        """What the bootstrap says, in words."""
        return self._reading(self.bootstrap_holm)

    def _reading(self, p: float | None) -> str:
        if p is None:
            return "not tested"
        if p > SIGNIFICANCE or self.difference == 0:
            return "no difference shown"
        return f"{self.first if self.difference > 0 else self.second} higher"


@dataclass(frozen=True)
class Comparison:
    """Everything that a report shows.

    Attributes:
        rows: a method each.
        pairs: every two methods.
        tasks: the STS tasks that were scored, with pairs and checksum; empty where the scores are the training's own.
        replicates: of the bootstrap; 0 without one.
        seed: of the bootstrap.
        warnings: why runs may not be comparable.
        left_out: why runs were left out.
    """

    rows: list[MethodScores]
    pairs: list[Pair]
    tasks: dict[str, dict[str, Any]]
    replicates: int
    seed: int
    warnings: list[str]
    left_out: list[str]

    def to_frame(self) -> pd.DataFrame:
        """A row for each run and checkpoint.

        The columns are method, seed, checkpoint ("best" or "last"), folder, the Spearman x 100 of each task, both kinds
        of mean (:data:`PRESENT` and :data:`AVERAGE`), and train_seconds. A score that was not measured is missing.
        """
        frame: pd.DataFrame = pd.DataFrame(
            {
                "method": row.group.label,
                "seed": run.seed,
                "checkpoint": checkpoint,
                "folder": str(run.folder),
                **scores,
                "train_seconds": run.summary["train_seconds"],
            }
            for row in self.rows
            for checkpoint, each in row.each.items()
            for run, scores in zip(row.group.runs, each, strict=True)
        )
        return frame

    @property
    def runs(self) -> list[Run]:
        """All runs, method by method."""
        return [run for row in self.rows for run in row.group.runs]


def compare_runs(
    runs: Sequence[Run],
    tasks: Sequence[STSTask] = (),
    *,
    replicates: int = 1000,
    seed: int = 0,
    left_out: Sequence[str] = (),
    show_progress_bar: bool | None = None,
) -> Comparison:
    """Compare methods by finished training runs.

    Args:
        runs: from :func:`~st_kdmcse.experiments.runs.find_runs`.
        tasks: STS tasks to score the models on; without them, the scores on STS-B from the training are compared.
        replicates: resamples of the paired bootstrap over the pairs of ``tasks``; 0 does without it.
        seed: of the resamples.
        left_out: sentences about runs that are not here, for the report.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Raises:
        ValueError: if there are no runs, or without tasks no run with a score.
        FileNotFoundError: if a run has no model.
    """
    if not runs:
        raise ValueError("there are no runs to compare")
    if replicates < 0:
        raise ValueError(f"the number of bootstrap replicates must not be negative, got {replicates}")
    if not tasks and all(run.test_score is None for run in runs):
        raise ValueError("the runs were trained without evaluation: give a SentEval folder as `data_dir`")
    groups = group_runs(runs)
    scores = score_runs(runs, tasks, show_progress_bar) if tasks else {}
    rows = [_row(group, scores) for group in groups]
    resampled = _resampled(runs, tasks, scores, replicates, seed, show_progress_bar) if tasks and replicates else None
    return Comparison(
        rows=rows,
        pairs=_pairs(rows, resampled),
        tasks={task.name: {"pairs": len(task), "sha256": task.checksum} for task in tasks},
        replicates=replicates if tasks else 0,
        seed=seed,
        warnings=list(_warnings(groups)),
        left_out=list(left_out),
    )


def _row(group: Group, scores: Mapping[tuple[Path, Checkpoint], Scores]) -> MethodScores:
    each: dict[Checkpoint, list[dict[str, float | None]]] = {
        "best": [_task_scores(run, "best", scores) for run in group.runs],
        "last": [_task_scores(run, "last", scores) for run in group.runs],
    }
    best, last = ({name: _summary([run[name] for run in found]) for name in found[0]} for found in each.values())
    values = [run[PRESENT] for run in each["best"]]
    return MethodScores(
        group=group,
        best=best,
        last=last,
        dev={
            "best": _summary([run.dev_score("best") for run in group.runs]),
            "last": _summary([run.dev_score("last") for run in group.runs]),
        },
        each=each,
        compared=None if None in values else [value for value in values if value is not None],
        seconds=summarize([float(run.summary["train_seconds"]) for run in group.runs]),
    )


def _task_scores(
    run: Run, checkpoint: Checkpoint, scores: Mapping[tuple[Path, Checkpoint], Scores]
) -> dict[str, float | None]:
    """Scores of a model by task, with both kinds of mean."""
    found: dict[str, float | None] = dict.fromkeys(STS_TASKS)
    if scores:
        present = scores[run.folder, checkpoint].spearman
    else:
        present = {"STS-B": run.test_score if checkpoint == "best" else None}
    found.update(present)
    mean = (
        None if None in present.values() else float(np.mean([value for value in present.values() if value is not None]))
    )
    seven = [found[name] for name in STS_TASKS]
    average = None if None in seven else float(np.mean([value for value in seven if value is not None]))
    return {**found, PRESENT: mean, AVERAGE: average}


def _summary(values: Sequence[float | None]) -> Summary | None:
    known = [value for value in values if value is not None]
    return summarize(known) if len(known) == len(values) else None


def _resampled(
    runs: Sequence[Run],
    tasks: Sequence[STSTask],
    scores: Mapping[tuple[Path, Checkpoint], Scores],
    replicates: int,
    seed: int,
    show_progress_bar: bool | None,
) -> dict[Path, Array]:
    """The bootstrapped scores of the best model of each run."""
    predictions = [np.stack([scores[run.folder, "best"].similarities[task.name] for run in runs]) for task in tasks]
    found = bootstrap_scores(predictions, [task.scores for task in tasks], replicates, seed, show_progress_bar)
    return {run.folder: each for run, each in zip(runs, found, strict=True)}


def _pairs(rows: Sequence[MethodScores], resampled: Mapping[Path, Array] | None) -> list[Pair]:
    tested = [(first, second) for first, second in combinations(rows, 2) if first.compared and second.compared]
    plain = [t_test(first.compared or [], second.compared or []) for first, second in tested]
    welch = [t_test(first.compared or [], second.compared or [], welch=True) for first, second in tested]
    intervals = [
        bootstrap_difference(_stacked(first, resampled), _stacked(second, resampled)) if resampled else None
        for first, second in tested
    ]
    p_values = [interval.p if interval else None for interval in intervals]
    corrected = holm(plain), holm(p_values)
    return [
        Pair(
            first=first.group.label,
            second=second.group.label,
            difference=float(np.mean(first.compared or []) - np.mean(second.compared or [])),
            t_test=plain[number],
            t_test_holm=corrected[0][number],
            welch=welch[number],
            low=interval.low if interval else None,
            high=interval.high if interval else None,
            bootstrap=p_values[number],
            bootstrap_holm=corrected[1][number],
        )
        for number, ((first, second), interval) in enumerate(zip(tested, intervals, strict=True))
    ]


def _stacked(row: MethodScores, resampled: Mapping[Path, Array]) -> Array:
    return np.stack([resampled[run.folder] for run in row.group.runs])


def _warnings(groups: Sequence[Group]) -> Iterator[str]:
    runs = [group.runs[0] for group in groups]
    config = {name for run in runs for name in run.summary["options"]["config"]}
    serious: list[str] = []
    other: list[str] = []
    for name in differing_settings(runs):
        if name not in _SETTINGS_OF_METHODS and name not in config:
            values = dict.fromkeys(str(run.setting(name)) for run in runs)
            kind = serious if name == "model" or name.endswith(" data") else other
            kind.append(f"{name.replace('_', ' ')} ({', '.join(values)})")
    if serious:
        yield f"The runs are not comparable: they differ in {', '.join(serious)}; the settings below say which."
    if other:
        yield f"Compare the runs with care: they differ in {', '.join(other)}; the settings below say which."
    for group in groups:
        repeated = sorted({seed for seed in group.seeds if group.seeds.count(seed) > 1})
        if repeated:
            yield (
                f"{group.label}: seed {', '.join(map(str, repeated))} occurs more than once, so the runs are not "
                "independent and the t-test is too sure."
            )
    if len({tuple(group.seeds) for group in groups}) > 1:
        yield "The methods were not trained with the same seeds; the runs are listed below."
