"""The processes of a distributed run."""

from __future__ import annotations

import atexit
from pathlib import Path

import torch
from accelerate import PartialState


def cpu_only() -> bool:
    """Whether to say that there is only a CPU: accelerate does not distribute over one otherwise."""
    return not (torch.cuda.is_available() or torch.backends.mps.is_available())


def processes() -> PartialState:
    """This process among those that ``torchrun`` started: its number, its device, and a barrier."""
    state = PartialState(cpu=cpu_only())
    if state.backend == "gloo":
        atexit.register(state.destroy_process_group)  # its threads must not outlive the interpreter
    return state


def memory_mib(entry: str = "VmHWM") -> float:
    """Resident memory of this process in MiB, at most so far (VmHWM) or now (VmRSS); Linux only."""
    # Not getrusage: its peak begins with the size of the process that started this one.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 2**10
