"""Dropout that needs few random numbers: PyTorch's draws them one by one on a CPU, which takes a sixth of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_LEVELS = 2**16
_MASKS_A_NUMBER = 4  # 16 bits each


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability p, to the nearest of 65,536 levels, and scale the others to keep the mean.

    Four masks are cut from each 64-bit random number of PyTorch's generator.

    Args:
        x: any shape, on a CPU.
        p: in [0, 1).

    Returns:
        The shape and type of ``x``.

    Raises:
        ValueError: if p is out of range.

    Example:
        >>> dropout(torch.ones(2, 3), 0.0)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p}")
    dropped = round(p * _LEVELS)
    numbers = torch.empty(-(-x.numel() // _MASKS_A_NUMBER), dtype=torch.int64).random_(-(2**63), None)
    levels = numbers.view(torch.int16)[: x.numel()].view(x.shape)
    kept = levels >= dropped - _LEVELS // 2
    return x * kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))


class FastDropout(nn.Dropout):
    """``nn.Dropout`` computed by :func:`dropout` on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """The input with some elements zeroed; in evaluation the input itself."""
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        return dropout(x, self.p)


@contextmanager
def fast_dropout(model: nn.Module) -> Iterator[None]:
    """Let the dropout modules of a model compute by :func:`dropout` inside of the block.

    Args:
        model: any model. Its subclasses of ``nn.Dropout`` stay as they are.
    """
    modules = [module for module in model.modules() if type(module) is nn.Dropout and module.p < 1]
    for module in modules:
        module.__class__ = FastDropout
    try:
        yield
    finally:
        for module in modules:
            module.__class__ = nn.Dropout
