"""Finished training runs: found in folders, grouped by what they share, and scored on the STS tasks once."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from st_kdmcse.config import KDMCSEConfig, Recipe
from st_kdmcse.data import sha256_file
from st_kdmcse.data.sts import STSTask
from st_kdmcse.encoding import load_model
from st_kdmcse.evaluation.sts import evaluate_sts
from st_kdmcse.files import LOCK, atomic_file, progress_bar, write_json
from st_kdmcse.provenance import provenance
from st_kdmcse.training.methods import METHODS
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run_folder import CHECKPOINTS_NAME, LAST_NAME, RUN_NAME, SCORES_NAME, SUMMARY_NAME

logger = logging.getLogger(__name__)

Checkpoint = Literal["best", "last"]

_MODULES = "modules.json"
_WEIGHTS = "model.safetensors"
_NOT_LOADED = {SUMMARY_NAME, RUN_NAME, LOCK, "README.md"}
_DEFAULTS: Mapping[str, KDMCSEConfig] = {recipe: getattr(KDMCSEConfig, recipe)() for recipe in get_args(Recipe)}
_SHARED_OPTIONS = (
    "model",
    "recipe",
    "text_column",
    "max_seq_length",
    "deduplicate",
    "pair_every",
    "captions_per_image",
    "captions_per_image_in_batch",
    "matryoshka_dims",
    "permute_images",
    "head_learning_rate",
    "head_init",
    "eval_steps",
    "gather_across_devices",
    "gradient_accumulation_steps",
    "lora",
)
_USUAL = {option.name: option.default for option in fields(TrainingOptions)}  # of options that older summaries lack
_ONLY_POOLING = "cls"  # of runs before there was a choice
_MEASURED = ("batch_size", "learning_rate", "processes", "steps", "bf16")


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        folder: where it is.
        summary: the content of its ``training_summary.json``.
        label: what the user calls it; None for the method's name.
    """

    folder: Path
    summary: Mapping[str, Any]
    label: str | None = None

    @property
    def name(self) -> str:
        """The user's label, or the method."""
        return self.label or str(self.summary["method"])

    @property
    def seed(self) -> int:
        """The seed."""
        return int(self.summary["seed"])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, but the seed: options, and the data by checksum."""
        options = self.summary["options"]
        usual = _DEFAULTS[self.summary["recipe"]]
        return {
            "method": self.summary["method"],
            **{name: options.get(name, _USUAL[name]) for name in _SHARED_OPTIONS},
            "pooling": self.summary.get("pooling", options.get("pooling", _ONLY_POOLING)),
            **{name: self.summary[name] for name in _MEASURED},
            **{name: value for name, value in options["config"].items() if value != getattr(usual, name)},
            **{f"{name} data": checksum[:12] for name, checksum in sorted(self.summary["data_sha256"].items())},
        }

    def setting(self, name: str) -> Any:
        """A setting, or what the method or the recipe says about it; None if the method has no such option."""
        recipe, method = _DEFAULTS[self.summary["recipe"]], METHODS[self.summary["method"]]
        usual = getattr(recipe, name, None) if name in method.reads else method.fixed.get(name)
        return self.settings.get(name, usual)

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Step and Spearman x 100 on STS-B dev; step 0 is before training."""
        before = self.summary["sts_dev_before"]
        points = [] if before is None else [(0, before)]
        points += [(point["step"], point["spearman"]) for point in self.summary["sts_dev_curve"]]
        return [(int(step), 100 * float(score)) for step, score in points]

    def dev_score(self, checkpoint: Checkpoint) -> float | None:
        """Spearman x 100 on STS-B dev of the best or the last checkpoint, rounded to 2 decimals."""
        point = self.summary[f"sts_dev_{checkpoint}"]
        return None if point is None else round(100 * float(point["spearman"]), 2)

    @property
    def test_score(self) -> float | None:
        """Spearman x 100 on STS-B test of the best checkpoint, rounded to 2 decimals."""
        score = self.summary["sts_test_of_best"]
        return None if score is None else round(100 * float(score), 2)


class Group(NamedTuple):
    """Runs that differ in nothing but the seed.

    Attributes:
        label: method or the user's label, and the settings in which it differs from others of this name.
        runs: in the order of the seeds.
    """

    label: str
    runs: list[Run]

    @property
    def seeds(self) -> list[int]:
        """The seed of each run."""
        return [run.seed for run in self.runs]


class FoundRuns(NamedTuple):
    """What :func:`find_runs` found.

    Attributes:
        runs: the finished runs.
        left_out: why others were left out, a sentence each.
    """

    runs: list[Run]
    left_out: list[str]


class Scores(NamedTuple):
    """STS scores of a model.

    Attributes:
        spearman: Spearman x 100 by task, rounded to 2 decimals; None where undefined.
        similarities: (pairs,) float32 cosines by task.
    """

    spearman: dict[str, float | None]
    similarities: dict[str, npt.NDArray[np.float32]]


def find_runs(places: Sequence[str | Path]) -> FoundRuns:
    """Find the finished runs in folders.

    Args:
        places: run folders, or folders above them at any depth; ``LABEL=FOLDER`` gives their runs a name.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if a folder holds no finished run, a run is given two names, or a ``training_summary.json`` is
            damaged.
    """
    runs: dict[Path, Run] = {}
    left_out = []
    for place in places:
        label, folder = _labelled(place)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        finished = 0
        for path in _run_folders(folder):
            if not (path / SUMMARY_NAME).is_file():
                left_out.append(f"{path} is not finished: it has no {SUMMARY_NAME}")
                continue
            run = runs.setdefault(path.resolve(), read_run(path, label))
            if run.label != label:
                names = " and ".join(f"as {name}" if name else "without a label" for name in (run.label, label))
                raise ValueError(f"{path} is named twice, {names}: a run has one label")
            finished += 1
        if not finished:
            unfinished = f" ({'; '.join(left_out)})" if left_out else ""
            raise ValueError(
                f"{folder} holds no finished run{unfinished}: name the folder that a training script wrote, with "
                f"{SUMMARY_NAME} in it, or one above it"
            )
    return FoundRuns(list(runs.values()), left_out)


def read_run(folder: Path, label: str | None = None) -> Run:
    """Read a finished run.

    Args:
        folder: the ``output_dir`` of a training.
        label: what to call it.

    Raises:
        FileNotFoundError: if the run is not finished.
        ValueError: if its summary is damaged, or holds scores that are not numbers; names the file.
    """
    path = folder / SUMMARY_NAME
    if not path.is_file():
        raise FileNotFoundError(f"the run in {folder} is not finished: it has no {SUMMARY_NAME}")
    try:
        run = Run(folder, json.loads(path.read_text(encoding="utf-8")), label)
        scores = [score for _, score in run.curve] + [run.dev_score("best"), run.dev_score("last"), run.test_score]
        _ = (
            METHODS[run.summary["method"]],
            run.settings,
            run.seed,
            float(run.summary["train_seconds"]),
            run.summary["versions"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): restore it, or leave the run out"
        ) from error
    if not all(math.isfinite(score) for score in scores if score is not None):
        raise ValueError(f"{path}: a score is not a number, the training has diverged: leave the run out")
    return run


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs by everything but the seed, in the order in which they come.

    A group is called after the method, or by the user's label; where several share that name, the settings in which
    they differ follow.

    Args:
        runs: finished runs.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.name, run.settings], sort_keys=True), []).append(run)
    found = []
    for members in groups.values():
        same_name = [other[0] for other in groups.values() if other[0].name == members[0].name]
        details = [_shown(name, members[0].setting(name)) for name in differing_settings(same_name)]
        label = f"{members[0].name} ({', '.join(details)})" if details else members[0].name
        found.append(Group(label, sorted(members, key=lambda run: run.seed)))
    return found


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({json.dumps(run.setting(name)) for run in runs}) > 1]


def score_runs(
    runs: Sequence[Run], tasks: Sequence[STSTask], show_progress_bar: bool | None = None
) -> dict[tuple[Path, Checkpoint], Scores]:
    """Score the best and the last model of each run on the STS tasks.

    What was scored before is read from the run folder (``evaluation/sts-best.json`` and the cosines in ``.npz``), as
    long as model and data are the same.

    Args:
        runs: finished runs.
        tasks: what :func:`~st_kdmcse.data.load_sts_tasks` returns.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Returns:
        Scores by run folder and checkpoint. A run that was trained without evaluation has only its last model, which
        stands for both.

    Raises:
        FileNotFoundError: if a run has no model; names its folder.
        ValueError: if an embedding is not finite.
    """
    found: dict[tuple[Path, Checkpoint], Scores] = {}
    checkpoints: tuple[Checkpoint, ...] = ("best", "last")
    with progress_bar(len(checkpoints) * len(runs), "STS tasks", "model", show_progress_bar) as progress:
        for run in runs:
            checksum = {}
            for checkpoint in checkpoints:
                model = _model_folder(run, checkpoint)
                checksum[checkpoint] = model_checksum(model)
                if checkpoint == "last" and checksum["last"] == checksum["best"]:
                    found[run.folder, "last"] = found[run.folder, "best"]
                else:
                    cache = run.folder / SCORES_NAME / f"sts-{checkpoint}.json"
                    found[run.folder, checkpoint] = score_model(model, tasks, cache, checksum[checkpoint])
                progress.update()
    return found


def _labelled(place: str | Path) -> tuple[str | None, Path]:
    label, separator, folder = str(place).partition("=")
    if not separator or Path(place).exists():
        return None, Path(place)
    if not label or not folder:
        raise ValueError(f"{place}: give LABEL=FOLDER, with a label before the equals sign and a folder behind it")
    return label, Path(folder)


def _run_folders(folder: Path) -> Iterator[Path]:
    """Folders of runs, finished or not; what a run holds is not searched."""
    if (folder / SUMMARY_NAME).is_file() or (folder / RUN_NAME).is_file():
        yield folder
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in (LAST_NAME, CHECKPOINTS_NAME) and not path.is_symlink():
            yield from _run_folders(path)


def _shown(name: str, value: Any) -> str:
    return f"{name.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"


def _model_folder(run: Run, checkpoint: Checkpoint) -> Path:
    last = run.folder / LAST_NAME
    folder = last if checkpoint == "last" and last.is_dir() else run.folder
    for name in (_MODULES, _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no model: {name} is missing; restore it, or leave the run out")
    return folder


def model_checksum(folder: Path) -> str:
    """SHA-256 over the names and contents of all files that loading the model may read."""
    try:
        places = [module["path"] for module in json.loads((folder / _MODULES).read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _MODULES} is damaged: restore it, or leave the run out") from error
    found = {path for path in folder.iterdir() if path.name not in _NOT_LOADED and path.suffix != ".tmp"}
    found |= {path for place in places if place for path in (folder / place).rglob("*")}
    files = {path.relative_to(folder).as_posix(): sha256_file(path) for path in found if path.is_file()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def score_model(folder: Path, tasks: Sequence[STSTask], cache: Path, checksum: str | None = None) -> Scores:
    """Score a saved model on tasks, once.

    Args:
        folder: of the model.
        tasks: what :func:`~st_kdmcse.data.load_sts_tasks` returns.
        cache: JSON file that holds the scores if model and data are those of then; else they are computed and put
            there, the cosines in a ``.npz`` beside it.
        checksum: what :func:`model_checksum` says, where that is known.
    """
    checksum = checksum or model_checksum(folder)
    checksums = {task.name: task.checksum for task in tasks}
    known = _cached(cache, checksum, checksums)
    if known is not None:
        return known
    model = load_model(str(folder))
    result = evaluate_sts(model, tasks, show_progress_bar=False)
    spearman = {name: result.spearman[name] for name in checksums}
    with atomic_file(cache.with_suffix(".npz"), "wb") as file:
        np.savez(file, **result.similarities)  # type: ignore[arg-type, unused-ignore]
    record = {"spearman": result.spearman, "details": result.details, "model_sha256": checksum}
    write_json(cache, {**record, **provenance(model, folder.name, checksums)})
    return Scores(spearman, result.similarities)


def _cached(cache: Path, checksum: str, checksums: Mapping[str, str]) -> Scores | None:
    try:
        record = json.loads(cache.read_text(encoding="utf-8"))
        if record.get("model_sha256") != checksum or not checksums.items() <= record["data_sha256"].items():
            return None
        with np.load(cache.with_suffix(".npz")) as arrays:
            similarities = {name: arrays[name] for name in checksums}
        return Scores({name: record["spearman"][name] for name in checksums}, similarities)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile):
        logger.warning("%s or the .npz beside it cannot be read; both are made again", cache)
        return None
