"""Training runs side by side, a process each."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.utils import logging as transformers_logging

from st_kdmcse.precision import bfloat16_is_faster
from st_kdmcse.processes import device_type
from st_kdmcse.training.callbacks import Interrupted
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run_folder import RUN_NAME

Train = Callable[[TrainingOptions], "str | None"]
"""Trains a run; returns the error, if there is one, and raises :class:`Interrupted` after a signal."""

_Process = multiprocessing.process.BaseProcess


class _Worker(NamedTuple):
    options: TrainingOptions
    process: _Process
    result: Connection


def train_side_by_side(
    runs: Sequence[TrainingOptions], train: Train, announce: Callable[[TrainingOptions], None], jobs: int
) -> Iterator[tuple[TrainingOptions, str | None]]:
    """Train runs in processes of their own, which share the threads of this one.

    After Ctrl-C or SIGTERM each run writes a checkpoint and stops; after a second Ctrl-C they stop at once.

    Args:
        runs: the runs.
        train: a function of a module, which new processes can import.
        announce: called at the beginning of each run.
        jobs: runs at a time, >= 1.

    Yields:
        Each run when it is over, with its error or None.

    Raises:
        Interrupted: after a signal, when all runs have stopped.
    """
    left, working = list(runs), list[_Worker]()
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while left or working:
            while left and len(working) < jobs:
                announce(left[0])
                working.append(_start(left.pop(0), train, max(1, torch.get_num_threads() // jobs)))
            ready = wait([worker.process.sentinel for worker in working])
            for worker in [worker for worker in working if worker.process.sentinel in ready]:
                working.remove(worker)
                yield worker.options, _outcome(worker)
    except KeyboardInterrupt as interruption:
        _stop(working)
        raise Interrupted("stopped; the same command goes on from there") from interruption
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _start(options: TrainingOptions, train: Train, threads: int) -> _Worker:
    decided = options
    if options.bf16 is None and not (options.output_dir / RUN_NAME).is_file():
        # One measurement decides for all runs: those of busy processes might differ.
        decided = replace(options, bf16=bfloat16_is_faster(device_type()))
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(decided, train, threads, sender))
    process.start()
    sender.close()
    return _Worker(options, process, receiver)


def _work(options: TrainingOptions, train: Train, threads: int, sender: Connection) -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C reaches the first process alone, which passes it on once
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()  # several progress bars of steps would overwrite each other
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # where the trainer prints its logs then
        try:
            sender.send(train(options))
        except Interrupted:
            sender.send(None)


def _outcome(worker: _Worker) -> str | None:
    """The error of a run that is over. One that was killed from outside tells nothing itself."""
    worker.process.join()
    try:
        error: str | None = worker.result.recv()
    except EOFError:
        return f"its process ended with exit code {worker.process.exitcode}"
    return error


def _stop(working: Sequence[_Worker]) -> None:
    try:
        for worker in working:
            worker.process.terminate()
        for worker in working:
            worker.process.join()
    except KeyboardInterrupt:
        for worker in working:
            worker.process.kill()
        raise
