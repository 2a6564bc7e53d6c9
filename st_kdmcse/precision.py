"""The precision to compute in: bfloat16 on devices that are faster at it, found by a short measurement on a CPU."""

from __future__ import annotations

import logging
import time
from functools import cache
from typing import Literal, get_args

import torch

logger = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16"]
"""What a user asks for; "auto" is bfloat16 where :func:`bfloat16_is_faster`, else float32."""

PRECISIONS = get_args(Precision)

_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
_SIZE = 512  # of the matrices that are multiplied: 0.3 GFLOP
_REPETITIONS = 8
_MARGIN = 1.5  # times as fast as float32: less is lost again in the conversion of weights


@cache
def bfloat16_is_faster(device_type: str) -> bool:
    """Whether a type of device multiplies matrices of bfloat16 faster than those of float32.

    A GPU is asked for its instructions. On a CPU that may have them, both are measured once in a process, for some
    milliseconds: AVX512-BF16, AMX and newer Arm processors are 3 to 7 times as fast; others emulate bfloat16, 10 times
    slower.

    Args:
        device_type: such as "cpu" or "cuda".
    """
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or _lacks_instructions():
        return False
    ratio = _seconds(torch.float32) / _seconds(torch.bfloat16)
    faster = ratio >= _MARGIN
    logger.info(
        "this CPU multiplies in bfloat16 %.1f times as fast as in float32: %s is the default",
        ratio,
        "bfloat16" if faster else "float32",
    )
    return faster


def resolve_precision(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """The precision that is meant.

    Args:
        precision: "auto", or what is asked for.
        device: to compute on.

    Raises:
        ValueError: for an unknown precision, or bfloat16 on a device that is slower at it.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if precision == "bfloat16" and not bfloat16_is_faster(device.type):
        raise ValueError(f"{no_bfloat16(device.type)}: set `precision` to float32 or auto")
    if precision == "auto":
        return "bfloat16" if bfloat16_is_faster(device.type) else "float32"
    return precision


def no_bfloat16(device_type: str) -> str:
    """Why bfloat16 is not for a type of device, for an error message."""
    name = {"cpu": "this CPU", "cuda": "this GPU"}.get(device_type, f"the device {device_type}")
    return f"{name} has no instructions for bfloat16, or is not faster with them"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A context in which matrix products are computed in a precision; weights and results stay as they are.

    Args:
        precision: "float32", "bfloat16" or "float16".
        device: to compute on.
    """
    half = precision != "float32"
    return torch.autocast(device.type, getattr(torch, precision) if half else None, enabled=half)


def _lacks_instructions() -> bool:
    """Whether PyTorch, where it can tell, knows that the CPU emulates bfloat16."""
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch
        return False
    found = torch.cpu.get_capabilities()
    return found.get("architecture") == "x86_64" and not any(found.get(name) for name in _INSTRUCTIONS)


def _seconds(dtype: torch.dtype) -> float:
    """The least time of some matrix products: interruptions only add to it."""
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)
    times = []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - started)
    return min(times)
