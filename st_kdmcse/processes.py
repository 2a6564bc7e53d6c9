"""The processes of a distributed run."""

from __future__ import annotations

import torch
from accelerate import PartialState


def cpu_only() -> bool:
    """Whether to say that there is only a CPU: accelerate does not distribute over one otherwise."""
    return not (torch.cuda.is_available() or torch.backends.mps.is_available())


def processes() -> PartialState:
    """This process among those that ``torchrun`` started: its number, its device, and a barrier."""
    return PartialState(cpu=cpu_only())
