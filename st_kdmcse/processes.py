"""The processes of a distributed run."""

from __future__ import annotations

import atexit
from pathlib import Path

import torch
from accelerate import PartialState

_MEMORY = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")


def cpu_only() -> bool:
    """Whether the processes run on a CPU: accelerate must be told, to distribute over it."""
    return not (torch.cuda.is_available() or torch.backends.mps.is_available())


def device_type() -> str:
    """The type of the device that models run on by default: "cuda", "mps" or "cpu"."""
    return "cpu" if cpu_only() else "cuda" if torch.cuda.is_available() else "mps"


def processes() -> PartialState:
    """This process among those that ``torchrun`` started: its number, its device, and a barrier."""
    state = PartialState(cpu=cpu_only())
    if state.backend == "gloo":
        atexit.register(state.destroy_process_group)  # its threads must not outlive the interpreter
    return state


def check_seed(seed: int) -> None:
    """Refuse a seed that NumPy does not take.

    Raises:
        ValueError: if it is not from 0 to 2^32 - 1.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be from 0 to {2**32 - 1}, got {seed}")


def memory_mib(entry: str = "VmHWM") -> float:
    """Resident memory of this process in MiB; Linux only.

    Args:
        entry: "VmHWM" for the peak, "VmRSS" for now.
    """
    # Not getrusage: its peak begins with the size of the process that started this one.
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 2**10


def peak_memory_mib() -> int | None:
    """Peak of the resident memory of this process in MiB; None on a system that does not tell (all but Linux)."""
    return round(memory_mib()) if _STATUS.is_file() else None


def free_memory() -> int | None:
    """Bytes of memory that are free or can be freed, on this machine; None on a system that does not tell."""
    if not _MEMORY.is_file():
        return None
    lines = _MEMORY.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)
