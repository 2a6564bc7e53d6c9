"""Tuning: trials of a search space, each a training run of its own, and the winner trained again."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from st_kdmcse.config import KDMCSEConfig
from st_kdmcse.experiments.document import Block, DataTable, Heading, Paragraph, to_markdown
from st_kdmcse.experiments.grid import run_grid, train_or_go_on
from st_kdmcse.experiments.runs import read_run
from st_kdmcse.files import atomic_file, locked
from st_kdmcse.provenance import claim
from st_kdmcse.training.checkpoints import METRIC
from st_kdmcse.training.inputs import check_inputs, data_checksums
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run_folder import EVENTS_NAME, RUN_NAME, SUMMARY_NAME
from st_kdmcse.upstream import trial_again

try:
    import optuna
    from optuna.trial import TrialState
except ImportError as error:
    raise ImportError('tuning needs optuna: pip install "st-kdmcse[tune]"') from error

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

logger = logging.getLogger(__name__)

TUNABLE = frozenset(
    {option.name for option in fields(KDMCSEConfig) if not option.metadata["hidden"]}
    | {"threshold", "lr", "head_learning_rate", "head_init", "batch_size", "pair_every", "max_seq_length"}
    | {"captions_per_image", "captions_per_image_in_batch"}
)
"""The options that a search space may have: those of :class:`~st_kdmcse.KDMCSEConfig`, "threshold" for both thresholds,
and those of a training that keep scores of the same step comparable."""

REPORT_NAME = "report.md"

_SETTINGS, _STORAGE = "tune.json", "study.db"
_PRUNED_AT, _ERROR = "pruned_at", "error"
_THRESHOLDS = ("image_threshold", "text_threshold")
_TRIALS_BEFORE_PRUNING = 5


@dataclass(frozen=True)
class Range:
    """Numbers to choose from.

    Args:
        low: the smallest; whole numbers are drawn if it and ``high`` are whole.
        high: the largest.
        log: draw on a logarithmic scale.
        step: distance of the numbers from one to the next; None is any.

    Raises:
        ValueError: for an empty range, or a logarithmic one with a step or from 0 on.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"`low` must be below `high`, got {self.low} and {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("`log` needs a positive `low`, and no `step`")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"`step` must be positive, got {self.step}")

    def suggest(self, trial: Trial, name: str) -> float:
        """The number of a trial."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, step=int(self.step or 1), log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)


SearchSpace = Mapping[str, Sequence[Any] | Range]
"""Values, or a range of numbers, by names of :data:`TUNABLE`."""


@dataclass(frozen=True)
class Tuned:
    """What came of a study.

    Attributes:
        winner: the folder of the winner, trained again.
        report: the trials and the winner's scores, in Markdown.
        failed: the error of each trial that failed, by its folder.
    """

    winner: Path
    report: str
    failed: dict[Path, str]


class Report(TrainerCallback):
    """Tells a trial the scores of its run on STS-B dev, and ends the run where it is worse than the median of others.

    Args:
        trial: of a study.
        prune: whether to end it.
    """

    def __init__(self, trial: Trial, prune: bool) -> None:
        self._trial, self._prune = trial, prune
        self._known = set(trial.study.trials[trial.number].intermediate_values)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **kwargs: Any,
    ) -> None:
        """Report the score; a run that is resumed has reported some of them before."""
        if METRIC not in metrics:
            return
        if state.global_step not in self._known:
            self._trial.report(metrics[METRIC], state.global_step)
        if self._prune and state.global_step < state.max_steps and self._trial.should_prune():
            self._trial.set_user_attr(_PRUNED_AT, state.global_step)
            control.should_training_stop = control.should_save = True


def tune(
    root: Path,
    space: SearchSpace,
    trials: int,
    config: Mapping[str, Any] | None = None,
    prune: bool = True,
    **options: Any,
) -> Tuned:
    """Search for the options with the best score on STS-B dev, and train with those again.

    optuna's sampler TPE proposes the options of each trial; a trial is a run of its own in ``root/trials``, of the seed
    that all share: student, heads and data begin as in any other run. The study is kept in ``root/study.db``. The same
    call goes on with it after an interruption, in the trial that was interrupted, and with more ``trials`` it goes
    further. Of a trial that is over, the records are kept, and the winner is trained again in ``root/winner-NUMBER``.

    Args:
        root: folder of the study.
        space: what to choose from.
        trials: how many to make, with those that were made before.
        config: options of :class:`~st_kdmcse.KDMCSEConfig` that all trials share.
        prune: end a trial after a score below the median of the earlier trials at that step, from the sixth trial on.
        options: further options of :class:`~st_kdmcse.training.options.TrainingOptions` that all trials share.

    Raises:
        ValueError: for an impossible space or options, if the folder holds another study, or if all trials failed.
        FileNotFoundError, ConnectionError: for a model or data that would stop every trial.
        Interrupted: after Ctrl-C or SIGTERM, when a checkpoint has been written. The same call goes on from there.
    """
    _check_space(space)
    if trials < 1:
        raise ValueError(f"`trials` must be at least 1, got {trials}")
    shared = {**options, "config": dict(config or {})}
    for values in _corners(space):
        base = _options(root / "trials", values, shared)
    if not base.eval_steps:
        raise ValueError("`eval_steps` must be above 0: trials are compared by their scores on STS-B dev")
    if base.metric is not None:
        raise ValueError("`metric`: trials are compared by their scores on STS-B dev; leave it out")
    check_inputs(base)
    with locked(root):
        claim(root / _SETTINGS, _settings(space, shared, base), "give those again, or choose another folder")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            study_name="tune",
            storage=f"sqlite:///{root / _STORAGE}",
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_TRIALS_BEFORE_PRUNING),
            load_if_exists=True,
        )
        failed = _run_trials(study, root, space, trials, shared, prune)
        done = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
        if not done:
            raise ValueError(f"no trial was trained to its end: {'; '.join(failed.values()) or 'all were pruned'}")
        winner = study.best_trial
        run = _options(root / f"winner-{winner.number + 1:03d}", _parameters(winner, space), shared)
        logger.info("train the winner again, trial %d: %s", winner.number + 1, _shown(winner.params))
        result = run_grid([run])
        if result.failed:
            raise ValueError(f"the winner could not be trained again: {result.failed[run.output_dir]}")
        report = to_markdown(list(_report(study, space, run.output_dir, failed)))
        with atomic_file(root / REPORT_NAME) as file:
            file.write(report)
    return Tuned(run.output_dir, report, failed)


def _check_space(space: SearchSpace) -> None:
    if not space:
        raise ValueError("`search_space` is empty: name options with values to choose from")
    for name, values in space.items():
        if name not in TUNABLE:
            raise ValueError(f"`search_space`: {name} cannot be tuned; choose from {', '.join(sorted(TUNABLE))}")
        if not isinstance(values, Range) and not len(values):
            raise ValueError(f"`search_space`: {name} has no values to choose from")
    if "threshold" in space and set(_THRESHOLDS) & set(space):
        raise ValueError("`search_space` has threshold, which stands for both thresholds, and one of them")


def _corners(space: SearchSpace) -> Iterator[dict[str, Any]]:
    """Each value, or the ends of each range, once, with the first ones of the others: what is out of range shows."""
    values = {name: [v.low, v.high] if isinstance(v, Range) else list(v) for name, v in space.items()}
    first = {name: found[0] for name, found in values.items()}
    for name, found in values.items():
        for value in reversed(found):
            yield {**first, name: value}


def _options(folder: Path, values: Mapping[str, Any], shared: Mapping[str, Any]) -> TrainingOptions:
    """The run of a trial."""
    given = dict(values)
    if "threshold" in given:
        given |= dict.fromkeys(_THRESHOLDS, given.pop("threshold"))
    names = {option.name for option in fields(KDMCSEConfig)}
    config = {**shared["config"], **{name: value for name, value in given.items() if name in names}}
    others = {name: value for name, value in given.items() if name not in names}
    return TrainingOptions(**{**shared, **others, "config": config, "output_dir": folder})


def _settings(space: SearchSpace, shared: Mapping[str, Any], base: TrainingOptions) -> dict[str, Any]:
    """What a study is begun with, for JSON."""
    chosen = {name: asdict(values) if is_dataclass(values) else list(values) for name, values in space.items()}
    options = {name: value for name, value in shared.items() if name != "report_to"}
    record = {"search_space": chosen, "options": options, "data_sha256": data_checksums(base)}
    plain: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return plain


def _run_trials(
    study: Study, root: Path, space: SearchSpace, trials: int, shared: Mapping[str, Any], prune: bool
) -> dict[Path, str]:
    """Make the trials that are missing; the errors of those that failed, now or before."""
    started, made = time.perf_counter(), 0
    while True:
        earlier = study.get_trials(deepcopy=False)
        interrupted = next((trial for trial in earlier if trial.state == TrialState.RUNNING), None)
        if interrupted is None and len(earlier) >= trials:
            break
        number = len(earlier) if interrupted is None else interrupted.number
        # A sampler for each trial: after an interruption it proposes what it would have proposed without.
        study.sampler = optuna.samplers.TPESampler(seed=shared.get("seed", TrainingOptions.seed) + number)
        trial = study.ask() if interrupted is None else trial_again(study, interrupted)
        values = {name: _suggested(trial, name, values) for name, values in space.items()}
        left = f", about {(time.perf_counter() - started) / made * (trials - number) / 60:.0f} min left" if made else ""
        logger.info("trial %d of %d: %s (%s%s)", number + 1, trials, _shown(values), _best_so_far(study), left)
        try:
            run = _options(_folder(root, number), values, shared)
        except ValueError as error:  # options that exclude each other
            trial.set_user_attr(_ERROR, str(error))
            study.tell(trial, state=TrialState.FAIL)
        else:
            _make(study, trial, run, prune)
        made += 1
    return {
        _folder(root, trial.number): trial.user_attrs[_ERROR]
        for trial in study.trials
        if trial.state == TrialState.FAIL
    }


def _make(study: Study, trial: Trial, options: TrainingOptions, prune: bool) -> None:
    folder = options.output_dir
    if not (folder / SUMMARY_NAME).is_file():
        error = train_or_go_on(options, [Report(trial, prune)])
        if error is not None:
            trial.set_user_attr(_ERROR, error)
            study.tell(trial, state=TrialState.FAIL)
            shutil.rmtree(folder, ignore_errors=True)
            return
    score = read_run(folder).summary["sts_dev_best"]["spearman"]
    for path in folder.iterdir():  # models of all trials would fill a disk
        if path.is_dir() and path.name != EVENTS_NAME:
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file() and path.name not in (RUN_NAME, SUMMARY_NAME):
            path.unlink()
    if _PRUNED_AT in trial.user_attrs:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, score)


def _suggested(trial: Trial, name: str, values: Sequence[Any] | Range) -> Any:
    return values.suggest(trial, name) if isinstance(values, Range) else trial.suggest_categorical(name, list(values))


def _parameters(trial: FrozenTrial, space: SearchSpace) -> dict[str, Any]:
    return {name: trial.params[name] for name in space}


def _folder(root: Path, number: int) -> Path:
    return root / "trials" / f"trial-{number + 1:03d}"


def _best_so_far(study: Study) -> str:
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    best = max(done, key=lambda trial: float(trial.value or 0), default=None)
    return (
        "none finished yet"
        if best is None
        else f"best dev score {100 * (best.value or 0):.2f}, trial {best.number + 1}"
    )


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {f'{value:.3g}' if isinstance(value, float) else value}" for name, value in values.items()
    )


def _report(study: Study, space: SearchSpace, winner: Path, failed: Mapping[Path, str]) -> Iterator[Block]:
    run = read_run(winner)
    best = study.best_trial
    yield Heading("Tuning", 1)
    yield Paragraph(
        f"The winner is trial {best.number + 1} ({_shown(best.params)}). Trained again in `{winner}`, it has an STS-B "
        f"test score of **{run.test_score:.2f}** (Spearman x 100). That is the result."
    )
    yield Paragraph(
        "The scores on STS-B dev below are no results: the winner is the trial for which they are highest, so they are "
        "higher than those of the same options on other sentences or with another seed. To see how much the seed does, "
        f"repeat it: `st-kdmcse train --config {winner / RUN_NAME} --seed 1 --output-dir ...`.",
        warning=True,
    )
    again = 100 * float(run.summary["sts_dev_best"]["spearman"])
    if abs(again - 100 * (best.value or 0)) > 0.005:
        yield Paragraph(
            f"Trained again, the winner scores {again:.2f} on STS-B dev, not {100 * (best.value or 0):.2f} as in its "
            "trial: the machine, its number of threads or a library is another one.",
            warning=True,
        )
    rows = []
    for trial in sorted(study.trials, key=_order):
        score = trial.value if trial.value is not None else max(trial.intermediate_values.values(), default=None)
        state = trial.state.name.lower()
        steps = max(trial.intermediate_values, default=None)
        parameters = [_shown({"": trial.params.get(name)}).strip() for name in space]
        shown = "" if score is None else f"{100 * score:.2f}"
        rows.append([str(trial.number + 1), *parameters, shown, "" if steps is None else str(steps), state])
    yield DataTable(["trial", *space, "best STS-B dev", "steps", ""], rows)
    if failed:
        yield Paragraph("Failed: " + "; ".join(f"`{folder.name}`: {error}" for folder, error in failed.items()))


def _order(trial: FrozenTrial) -> tuple[bool, float, int]:
    return (trial.state != TrialState.COMPLETE, -float(trial.value or 0), trial.number)
