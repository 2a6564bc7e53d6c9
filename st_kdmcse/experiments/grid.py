"""Grids of training runs: methods or margins times seeds, resumed after an interruption, none done twice."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from st_kdmcse.data import import_released_json, sha256_file
from st_kdmcse.experiments.arms import Arm
from st_kdmcse.experiments.workers import train_side_by_side
from st_kdmcse.files import byte_progress, write_json
from st_kdmcse.training.callbacks import Interrupted, StopOnSignal
from st_kdmcse.training.inputs import check_inputs, data_checksums
from st_kdmcse.training.methods import METHODS
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run import changes_since_start, train
from st_kdmcse.training.run_folder import CHECKPOINTS_NAME, RUN_NAME, SUMMARY_NAME

logger = logging.getLogger(__name__)

_FEATURES = "features"
_SOURCE = "features-source.json"


@dataclass(frozen=True)
class GridResult:
    """What became of the runs of a grid.

    Attributes:
        finished: folders of the finished runs, in the order of the grid.
        failed: folders of the others, with the error.
    """

    finished: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)


def method_grid(
    root: Path, methods: Sequence[str], seeds: Sequence[int], config: Mapping[str, Any] | None = None, **options: Any
) -> list[TrainingOptions]:
    """Runs of several methods over seeds, as in Tables 3 and 5 of the paper.

    Args:
        root: the runs go to ``root/METHOD/seed-SEED``.
        methods: names of :data:`~st_kdmcse.training.methods.METHODS`.
        seeds: a run each.
        config: options of :class:`~st_kdmcse.KDMCSEConfig`; a method gets those that it reads.
        options: further options of :class:`~st_kdmcse.training.options.TrainingOptions`, the same for all. SimCSE
            gets the captions as well, so that all methods see the same sentences.

    Returns:
        The runs, method by method.

    Raises:
        ValueError: for options out of range, a method or seed that is named twice, or an option that no method reads.
    """
    config = config or {}
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"there is no method {method!r}: choose from {', '.join(METHODS)}")
    unread = [name for name in config if not any(name in METHODS[method].reads for method in methods)]
    if unread:
        raise ValueError(f"none of the methods {', '.join(methods)} has the option {', '.join(sorted(unread))}")
    return _checked(
        TrainingOptions(
            method=method,
            seed=seed,
            output_dir=Path(root) / method / f"seed-{seed}",
            config={name: value for name, value in config.items() if name in METHODS[method].reads},
            **options,
        )
        for method in methods
        for seed in seeds
    )


def arm_grid(root: Path, arms: Mapping[str, Arm], seeds: Sequence[int], **options: Any) -> list[TrainingOptions]:
    """Runs of the arms of an experiment over seeds, with the same order of the data in all arms of a seed.

    Args:
        root: the runs go to ``root/ARM/seed-SEED``.
        arms: by name.
        seeds: a run each.
        options: further options of :class:`~st_kdmcse.training.options.TrainingOptions`; those of an arm come first.

    Returns:
        The runs, seed by seed, so that an unfinished experiment has whole seeds.

    Raises:
        ValueError: for options out of range, or a seed that is named twice.
    """
    return _checked(
        TrainingOptions(
            **{
                **options,
                **arm.options,
                "method": arm.method,
                "config": arm.config,
                "seed": seed,
                "output_dir": Path(root) / name / f"seed-{seed}",
            }
        )
        for seed in seeds
        for name, arm in arms.items()
    )


def margin_grid(
    root: Path, margins: Sequence[float], seeds: Sequence[int], config: Mapping[str, Any] | None = None, **options: Any
) -> list[TrainingOptions]:
    """Runs of KDMCSE with several margins over seeds, as in Figure 7 of the paper.

    Args:
        root: the runs go to ``root/margin-MARGIN/seed-SEED``.
        margins: m of Eq. 12 in radians, in [0, pi].
        seeds: a run each.
        config: further options of :class:`~st_kdmcse.KDMCSEConfig`.
        options: further options of :class:`~st_kdmcse.training.options.TrainingOptions`, the same for all.

    Returns:
        The runs, margin by margin.

    Raises:
        ValueError: for options out of range, or a margin or seed that is named twice.
    """
    return _checked(
        TrainingOptions(
            method="kdmcse",
            seed=seed,
            output_dir=Path(root) / f"margin-{margin:g}" / f"seed-{seed}",
            config={**(config or {}), "margin": margin},
            **options,
        )
        for margin in margins
        for seed in seeds
    )


def shared_features(root: Path, features: Path | None) -> Path | None:
    """The feature store of a grid; a JSON file of the KDMCSE authors' format is converted once, for all its runs.

    Args:
        root: the folder of the grid; the converted features go to ``root/features``, the checksum of the file beside
            them.
        features: a feature store, such a file, or None.

    Raises:
        ValueError, FileNotFoundError: if there is no such store or file, it is malformed, or ``root/features`` was
            converted from another one.
    """
    if features is None or features.is_dir():
        return features
    if not features.exists():
        raise FileNotFoundError(f"`features` {features} does not exist")
    made, record = Path(root) / _FEATURES, Path(root) / _SOURCE
    with byte_progress(features.stat().st_size, f"Checksum of {features.name}") as progress:
        source = {"name": features.name, "sha256": sha256_file(features, progress.update)}
    if made.exists():
        earlier = _read_source(record)
        if earlier["sha256"] != source["sha256"]:
            raise ValueError(
                f"`features` {features} (SHA-256 {source['sha256'][:12]}) is not the file that {made} was converted "
                f"from, {earlier['name']} (SHA-256 {earlier['sha256'][:12]}): give that one, or choose another folder "
                "for the grid"
            )
        return made
    write_json(record, source)  # before the features, so that there are none of unknown origin
    import_released_json(features, made)
    return made


def run_grid(runs: Sequence[TrainingOptions], keep_checkpoints: bool = False, jobs: int = 1) -> GridResult:
    """Train the runs that are not finished, one after the other or several at a time.

    A finished run is left as it is, an interrupted one goes on from its newest checkpoint. A run that fails is recorded
    in a file beside its folder (``seed-0.failed.json``) and is tried again the next time; the others go on.

    Args:
        runs: from :func:`method_grid`, :func:`arm_grid` or :func:`margin_grid`.
        keep_checkpoints: keep the states of the trainer of finished runs, which are several times the size of a model.
        jobs: runs at a time. More than one share the threads of this process, and sums are rounded by their number.

    Returns:
        Which are finished and which failed.

    Raises:
        ValueError: if a run was started with other options or data; names the run and what differs, before anything is
            trained.
        ValueError, FileNotFoundError, ConnectionError: for a model or data that would stop every run.
        Interrupted: after Ctrl-C or SIGTERM, when a checkpoint has been written. The same call goes on from there.
    """
    checksums: dict[tuple[Any, ...], dict[str, str]] = {}
    for options in runs:
        if not (options.output_dir / RUN_NAME).is_file():
            continue
        data = (
            *(options.text, options.features, options.exclude_images, options.exclude_overlap),
            *(options.eval_data, options.eval_steps > 0),
        )
        if data not in checksums:
            checksums[data] = data_checksums(options)
        changes = changes_since_start(options, checksums[data])
        if changes:
            raise ValueError(
                f"the run in {options.output_dir} was started with other options or data: {'; '.join(changes)}. "
                "Give those again, choose another folder for the grid, or remove that run to train it again"
            )
    left = [options for options in runs if not _is_finished(options)]
    if not left:
        logger.info("all %d runs were finished before", len(runs))
    else:
        check_inputs(left[0])  # what would stop every run stops the grid
    failed: dict[Path, str] = {}
    started, trained = time.perf_counter(), 0

    def drop_checkpoints(options: TrainingOptions) -> None:
        if not keep_checkpoints:
            shutil.rmtree(options.output_dir / CHECKPOINTS_NAME, ignore_errors=True)

    def announce(options: TrainingOptions) -> None:
        done = len(runs) - len(left) + trained
        _announce(options, runs.index(options) + 1, len(runs), done, trained, time.perf_counter() - started)

    for options in runs:
        if options not in left:
            drop_checkpoints(options)
    outcomes = _one_by_one(left, announce) if jobs == 1 else train_side_by_side(left, train_or_go_on, announce, jobs)
    for options, error in outcomes:
        if error is not None:
            failed[options.output_dir] = error
            continue
        trained += 1
        drop_checkpoints(options)
    return GridResult([options.output_dir for options in runs if options.output_dir not in failed], failed)


def train_or_go_on(options: TrainingOptions, callbacks: Sequence[TrainerCallback] = ()) -> str | None:
    """Train, or go on with a run that was interrupted.

    Args:
        options: the run.
        callbacks: of the trainer, beside those of any run.

    Returns:
        The error, if the run failed; it is recorded in a file beside the folder.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, when a checkpoint has been written.
    """
    record = options.output_dir.with_name(f"{options.output_dir.name}.failed.json")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # the summary states the run's own
    stop = StopOnSignal()
    try:
        train(replace(options, resume=(options.output_dir / RUN_NAME).is_file()), stop, callbacks=callbacks)
    except Interrupted as interruption:
        raise Interrupted(f"stopped in {options.output_dir}; the same command goes on from there") from interruption
    except Exception as error:  # noqa: BLE001 - whatever befalls a run, the others go on
        message = f"{type(error).__name__}: {error}"
        content = {"error": message, "traceback": traceback.format_exc().splitlines()}
        write_json(record, {**content, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")})
        logger.error("the run in %s failed and is left out: %s (details: %s)", options.output_dir, message, record)
        return message
    finally:
        gc.collect()  # a trainer and its model refer to each other
    record.unlink(missing_ok=True)
    if stop.requested:
        raise Interrupted(f"stopped; {options.output_dir} is finished, and the same command goes on with the next run")
    return None


def _checked(options: Any) -> list[TrainingOptions]:
    runs = list(options)
    if not runs:
        raise ValueError("there is no run in the grid: name at least one method (or margin) and one seed")
    folders = [run.output_dir for run in runs]
    twice = sorted({str(folder) for folder in folders if folders.count(folder) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: named twice in the grid")
    return runs


def _read_source(record: Path) -> dict[str, str]:
    try:
        source = json.loads(record.read_text(encoding="utf-8"))
        return {name: str(source[name]) for name in ("name", "sha256")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{record} is missing or damaged, so nobody knows which file {record.with_name(_FEATURES)} was converted "
            "from: remove that folder to convert the file again"
        ) from error


def _is_finished(options: TrainingOptions) -> bool:
    return (options.output_dir / SUMMARY_NAME).is_file()


def _one_by_one(
    runs: Sequence[TrainingOptions], announce: Callable[[TrainingOptions], None]
) -> Iterator[tuple[TrainingOptions, str | None]]:
    for options in runs:
        announce(options)
        yield options, train_or_go_on(options)


def _announce(options: TrainingOptions, number: int, total: int, done: int, trained: int, seconds: float) -> None:
    left = f", about {seconds / trained * (total - done) / 60:.0f} min left" if trained else ""
    verb = "go on with" if (options.output_dir / RUN_NAME).is_file() else "train"
    logger.info("run %d of %d: %s %s (%d finished%s)", number, total, verb, options.output_dir, done, left)
