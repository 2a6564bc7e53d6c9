"""Checkpoints of a run: whole ones are known by a record of their files, and only those are gone on from."""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from st_kdmcse.files import read_json, sha256_file, write_json

logger = logging.getLogger(__name__)

METRIC = "eval_sts-dev_spearman_cosine"
"""The Spearman correlation on STS-B dev, as the trainer logs it."""

SCORE = "eval_sequential_score"
"""What the best model is chosen by: STS-B dev, or the metric of the options, which is evaluated after it."""

RECORD_NAME = "checksums.json"
"""The file of a checkpoint, written last, with the size and SHA-256 of all others."""

STATE_NAME = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def record_files(folder: Path) -> None:
    """Record the files of a folder that is whole now.

    Args:
        folder: a checkpoint or another folder of weights.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD_NAME
    }
    write_json(folder / RECORD_NAME, {"files": files})


def check_files(folder: Path) -> None:
    """Compare the files of a folder with its record.

    Args:
        folder: that :func:`record_files` was called for.

    Raises:
        FileNotFoundError: if the folder, its record or a file of it is missing; names it.
        ValueError: if a file is truncated or altered; names it.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so {folder.name} was not written to its end")
    files = read_json(path, "delete its folder").get("files")
    if not isinstance(files, dict) or not all(isinstance(known, dict) for known in files.values()):
        raise ValueError(f"{path} is damaged: it names no files")
    for name, known in files.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
        if file.stat().st_size != known.get("bytes"):
            raise ValueError(f"{file} has {file.stat().st_size:,} bytes, not {known.get('bytes'):,}")
    for name, known in files.items():
        if sha256_file(folder / name) != known.get("sha256"):
            raise ValueError(f"{folder / name} was altered or is damaged")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first; other folders have other names.

    Args:
        folder: of the checkpoints; it may be absent.
    """
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, with the best model up to it, or None.

    Each one that is passed over is warned of, with the file that is missing or damaged.

    Args:
        folder: of the checkpoints, and of the best model (``best-STEP``) where there is one.
    """
    checkpoints = checkpoints_in(folder)
    for checkpoint in checkpoints:
        try:
            check_files(checkpoint)
            best = best_step(read_json(checkpoint / STATE_NAME, "delete its folder")["log_history"])
            if best is not None:
                check_files(folder / f"best-{best}")
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be gone on from: %s", checkpoint, error)
            continue
        return checkpoint
    if checkpoints:
        logger.warning("none of the checkpoints in %s is whole: training begins again", folder)
    return None


def best_step(log_history: Sequence[Mapping[str, Any]]) -> int | None:
    """The step of the best :data:`SCORE`, the first one of equals; None without a score.

    Args:
        log_history: of a ``TrainerState``.
    """
    scored = [entry for entry in log_history if math.isfinite(entry.get(SCORE, math.nan))]
    return int(max(scored, key=lambda entry: float(entry[SCORE]))["step"]) if scored else None


class RecordCheckpoints(TrainerCallback):
    """Records the files of each checkpoint when all processes have written theirs."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the record."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            record_files(_saved(args, state))


class KeepTwoCheckpoints(TrainerCallback):
    """Keeps the newest checkpoint and the one before, as training goes; comes after :class:`RecordCheckpoints`.

    ``save_total_limit`` would delete the older one before the newer is recorded, and count folders of other names.
    """

    def __init__(self) -> None:
        self._newest: Path | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """The checkpoint that training goes on from is the first one to keep."""
        self._newest = _saved(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Delete all others."""
        kept = {self._newest, _saved(args, state)}
        self._newest = _saved(args, state)
        if state.is_world_process_zero:
            for checkpoint in checkpoints_in(Path(args.output_dir)):
                if checkpoint not in kept:
                    shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what could not be written, and how much room there was, in one error for all the ways to fail.

    Args:
        path: the file or folder that the block writes.

    Raises:
        OSError: if the block could not write.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _not_written(path, error) from error


@contextmanager
def removing_partial(folder: Path) -> Iterator[None]:
    """Train inside of the block; of a checkpoint that could not be written, nothing stays.

    Args:
        folder: of the checkpoints. What an earlier process left there unfinished is deleted first.

    Raises:
        OSError: if a checkpoint could not be written.
    """
    _remove_partial(folder)
    try:
        yield
    except Exception as error:
        partial = _partial(folder)
        if not partial:
            raise
        failed = _not_written(partial[0], error)
        _remove_partial(folder)
        raise failed from error


def _saved(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _partial(folder: Path) -> list[Path]:
    return [path for path in checkpoints_in(folder) if not (path / RECORD_NAME).is_file()]


def _remove_partial(folder: Path) -> None:
    for path in _partial(folder):
        shutil.rmtree(path, ignore_errors=True)


def _not_written(path: Path, error: Exception) -> OSError:
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(place).free / 2**20
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return OSError(f"{path} could not be written; {free:,.1f} MiB are free there: {reason}")
