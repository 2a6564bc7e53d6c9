"""What happens beside the steps of a run: signals, the last step, checkpoints by time, and keeping the best model."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from st_kdmcse.files import read_json, write_folder
from st_kdmcse.training.checkpoints import SCORE, STATE_NAME, best_step, checkpoints_in, record_files, writing
from st_kdmcse.training.trainer import KDMCSETrainer

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_CHECKPOINTS = 600


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal; the message names the checkpoint to resume from."""


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, finish the step, write a checkpoint and stop; a second Ctrl-C stops at once.

    Attributes:
        requested: whether a signal came.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle both signals inside of the block."""
        previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping after this step; a checkpoint will be written (Ctrl-C again to stop at once)")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after this step if a signal came."""
        if args.world_size > 1:  # processes may get the signal at different steps, and must stop at the same
            flag = torch.tensor(int(self.requested), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.requested = bool(flag.item())
        if self.requested:
            control.should_save = True
            control.should_training_stop = True


class EvaluateAtEnd(TrainerCallback):
    """Score and save the last step too, whatever the intervals: the last model is reported beside the best one."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for both at the last step."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = True


class SaveByTime(TrainerCallback):
    """Write a checkpoint every ten minutes of slow steps; one process only, for several would disagree on the time."""

    def __init__(self) -> None:
        self._saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint when the last one is old."""
        if args.world_size == 1 and time.monotonic() - self._saved > _SECONDS_BETWEEN_CHECKPOINTS:
            control.should_save = True

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Count the time from here."""
        self._saved = time.monotonic()


class KeepBest(TrainerCallback):
    """Keep student and heads of the best score, in a folder beside the checkpoints.

    Args:
        checkpoints: the folder of the checkpoints.
        trainer: saves student and heads.

    Attributes:
        path: the folder, ``best-STEP``; None before the first evaluation.
    """

    def __init__(self, checkpoints: Path, trainer: KDMCSETrainer) -> None:
        self._checkpoints, self._trainer = checkpoints, trainer
        self.path: Path | None = None
        self._score = -math.inf

    @property
    def step(self) -> int | None:
        """The step of the best score; None before the first evaluation."""
        return None if self.path is None else int(self.path.name.removeprefix("best-"))

    def restore(self, state: TrainerState) -> None:
        """Find what was kept up to the checkpoint of this state; later steps are computed again."""
        best = best_step(state.log_history)
        self.path = None if best is None else self._checkpoints / f"best-{best}"
        scores = (entry[SCORE] for entry in state.log_history if SCORE in entry and entry["step"] == best)
        self._score = next(scores, -math.inf)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Go on with what was kept before."""
        self.restore(state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **kwargs: Any,
    ) -> None:
        """Save the model if its score is a new best."""
        if SCORE not in metrics or not metrics[SCORE] > self._score or not state.is_world_process_zero:
            return
        path = self._checkpoints / f"best-{state.global_step}"
        with writing(path):
            write_folder(path, self._save)
        self.path, self._score = path, metrics[SCORE]

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Delete earlier bests that no checkpoint needs any more."""
        if self.path is None:
            return
        states = (read_json(path / STATE_NAME, "delete its folder") for path in checkpoints_in(self._checkpoints))
        kept = {self.path.name, *(f"best-{best_step(state['log_history'])}" for state in states)}
        for path in self._checkpoints.glob("best-*"):
            if path.name not in kept and path.name[len("best-") :].isdecimal():
                shutil.rmtree(path, ignore_errors=True)

    def _save(self, folder: Path) -> None:
        self._trainer.save_weights(folder)
        record_files(folder)
