"""The grounding experiment: arms compared at their last step, paired by seed, on a measure that is fixed beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import stats

from st_kdmcse.data import STS_TASKS, STSTask, load_cxc, load_sts_tasks
from st_kdmcse.data.cxc import CXC
from st_kdmcse.experiments.arms import Arm, Contrast
from st_kdmcse.experiments.runs import Run, score_model, score_runs
from st_kdmcse.experiments.statistics import PairedDifference, holm, paired_difference
from st_kdmcse.files import write_folder
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.student import build_student

PRIMARY = "mean of the tasks"
"""The measure that the tests are about: the mean over the tasks of Spearman's correlation x 100."""

Part = Literal["captions", "general"]

PARTS = get_args(Part)

_SICK, _STS_B = "SICK-R", "STS-B"
_CAPTION_TASKS = {_SICK, CXC}
_CAPTION_SUBSETS = {("STS12", "MSRvid"), ("STS14", "images"), ("STS15", "images")}
_CAPTION_GENRE = "main-captions"


@dataclass(frozen=True)
class ArmScores:
    """An arm over its seeds.

    Attributes:
        name: of the arm.
        arm: what was trained.
        runs: the finished runs, in the order of the seeds.
        scores: by measure (:data:`PRIMARY`, :data:`PARTS` and the tasks), of each run, Spearman x 100 of the last step.
    """

    name: str
    arm: Arm
    runs: list[Run]
    scores: dict[str, list[float]]

    @property
    def seeds(self) -> list[int]:
        """The seed of each run."""
        return [run.seed for run in self.runs]

    def of_seeds(self, measure: str, seeds: Sequence[int]) -> list[float]:
        """The scores of some seeds."""
        return [self.scores[measure][self.seeds.index(seed)] for seed in seeds]

    @property
    def seconds(self) -> list[float]:
        """Training time of each run in seconds a step; of a resumed run, only the last part counts."""
        return [float(run.summary["train_seconds"]) / run.summary["steps"] for run in self.runs]


@dataclass(frozen=True)
class Outcome:
    """A contrast with its outcome.

    Attributes:
        contrast: what was expected.
        differences: by measure, over the seeds that both arms have.
        p_holm: p value for :data:`PRIMARY`, corrected for the number of contrasts.
    """

    contrast: Contrast
    differences: dict[str, PairedDifference]
    p_holm: float | None

    @property
    def reading(self) -> str:
        """The outcome in words."""
        primary = self.differences[PRIMARY]
        if self.p_holm is None:
            return "not tested"
        if self.p_holm > 0.05:
            return "no difference shown"
        if primary.mean < 0:
            return "the other way round"
        return "shown" if primary.mean >= self.contrast.expected else "shown, less than expected"


@dataclass(frozen=True)
class Evidence:
    """Everything that the report shows.

    Attributes:
        tasks: what was scored.
        before: scores of the student before training, by measure.
        arms: those with finished runs.
        tested: the contrasts of which both arms have a seed in common.
        options: likewise, those of one option at a time.
        left_out: why runs are left out.
    """

    tasks: list[STSTask]
    before: dict[str, float]
    arms: list[ArmScores]
    tested: list[Outcome]
    options: list[Outcome]
    left_out: list[str]

    @property
    def measures(self) -> list[str]:
        """The columns of the tables."""
        return list(self.before)


def evidence_tasks(
    data_dir: str | Path, cxc: str | Path | None = None, coco_captions: Sequence[str | Path] = ()
) -> list[STSTask]:
    """The tasks at hand: the STS tasks of a folder, and CxC.

    Args:
        data_dir: what :func:`~st_kdmcse.data.load_sts_tasks` reads, of which all test sets are taken that are there.
            Without the test set of SICK-R, its train and trial sets are the task.
        cxc: ``sts_val.csv`` or ``sts_test.csv`` of CxC.
        coco_captions: the annotations of MS-COCO that hold its captions.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: if data are absent or malformed.
    """
    tasks = {task.name: task for task in load_sts_tasks(data_dir)}
    if _SICK not in tasks:
        splits = [load_sts_tasks(data_dir, [_SICK], split) for split in ("train", "dev")]
        tasks[_SICK] = STSTask(_SICK, tuple(subset for (task,) in splits for subset in task.subsets))
    if cxc is not None:
        tasks[CXC] = load_cxc(cxc, coco_captions)
    return [tasks[name] for name in (*STS_TASKS, CXC) if name in tasks]


def gather_evidence(
    runs: Mapping[str, Sequence[Run]],
    arms: Mapping[str, Arm],
    contrasts: Sequence[Contrast],
    tasks: Sequence[STSTask],
    student: TrainingOptions,
    cache: Path,
    *,
    options: Sequence[Contrast] = (),
    left_out: Sequence[str] = (),
    show_progress_bar: bool | None = None,
) -> Evidence:
    """Score the last step of finished runs in float32, and test the contrasts.

    Args:
        runs: finished runs by arm; an arm may have none.
        arms: by name.
        contrasts: the family of tests; those of which an arm has no run are left out.
        tasks: from :func:`evidence_tasks`.
        student: any of the runs, for the student before training.
        cache: folder for that student and its scores; those of a run are kept in its folder.
        options: a second family of tests, corrected by itself.
        left_out: sentences about runs that are not here, for the report.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Raises:
        ValueError: if there are no runs, or a model gives all pairs of a task the same similarity.
        FileNotFoundError: if a run has no model.
    """
    every = [run for name in runs for run in runs[name]]
    if not every:
        raise ValueError("no run has finished, so there is nothing to report")
    write_folder(cache / "student", lambda folder: _save_student(student, folder))
    before = score_model(cache / "student", tasks, cache / "student.json").similarities
    found = score_runs(every, tasks, show_progress_bar)
    scored = []
    for name in arms:
        members = sorted(runs.get(name, ()), key=lambda run: run.seed)
        each = [measures(tasks, found[run.folder, "last"].similarities, str(run.folder)) for run in members]
        if each:
            scored.append(ArmScores(name, arms[name], members, {key: [one[key] for one in each] for key in each[0]}))
    by_name = {arm.name: arm for arm in scored}
    return Evidence(
        list(tasks),
        measures(tasks, before, "the student before training"),
        scored,
        _test(contrasts, by_name),
        _test(options, by_name),
        list(left_out),
    )


def measures(
    tasks: Sequence[STSTask], similarities: Mapping[str, npt.NDArray[np.float32]], model: str
) -> dict[str, float]:
    """Spearman x 100 by measure: :data:`PRIMARY`, :data:`PARTS`, and each task.

    A part is the mean over the tasks that have pairs of that kind, each with the correlation over those pairs alone.

    Args:
        tasks: n tasks.
        similarities: (pairs,) by task.
        model: what the error names.

    Raises:
        ValueError: if a correlation is undefined.
    """
    whole: dict[str, float] = {}
    parts: dict[Part, list[float]] = {part: [] for part in PARTS}
    for task in tasks:
        gold, cosines, in_caption = np.array(task.scores), similarities[task.name], caption_pairs(task)
        whole[task.name] = _spearman(gold, cosines, f"{model}, {task.name}")
        for part, mask in (("captions", in_caption), ("general", None if in_caption is None else ~in_caption)):
            if mask is not None and mask.any():
                score = whole[task.name] if mask.all() else _spearman(gold[mask], cosines[mask], f"{model}, {part}")
                parts[part].append(score)  # type: ignore[index]
    means = {name: float(np.mean(scores)) for name, scores in parts.items() if scores}
    return {PRIMARY: float(np.mean(list(whole.values()))), **means, **whole}


def caption_pairs(task: STSTask) -> npt.NDArray[np.bool_] | None:
    """(pairs,) whether each pair consists of captions of images or videos; None where the source does not tell."""
    if task.name in _CAPTION_TASKS:
        return np.ones(len(task), dtype=bool)
    found: list[bool] = []
    for subset in task.subsets:
        if task.name == _STS_B:
            found += [genre == _CAPTION_GENRE for genre in subset.genres]
        elif len(task.subsets) > 1:
            found += [(task.name, subset.name) in _CAPTION_SUBSETS] * len(subset)
    return np.array(found, dtype=bool) if len(found) == len(task) else None


def _save_student(options: TrainingOptions, folder: Path) -> None:
    student = build_student(options.model, options.max_seq_length, options.pooling)
    student.save_pretrained(str(folder), create_model_card=False)


def _spearman(gold: npt.NDArray[np.float64], cosines: npt.NDArray[np.float32], where: str) -> float:
    if np.ptp(cosines) == 0 or np.ptp(gold) == 0:
        raise ValueError(f"{where}: all pairs have one score or one similarity, so there is no correlation")
    return 100 * float(stats.spearmanr(gold, cosines).statistic)


def _test(contrasts: Sequence[Contrast], arms: Mapping[str, ArmScores]) -> list[Outcome]:
    tested = []
    for contrast in contrasts:
        first, second = arms.get(contrast.first), arms.get(contrast.second)
        if first is None or second is None:
            continue
        seeds = sorted({*first.seeds} & {*second.seeds})
        if seeds:
            differences = {
                name: paired_difference(first.of_seeds(name, seeds), second.of_seeds(name, seeds))
                for name in first.scores
            }
            tested.append((contrast, differences))
    corrected = holm([differences[PRIMARY].p for _, differences in tested])
    return [Outcome(*each, p) for each, p in zip(tested, corrected, strict=True)]
