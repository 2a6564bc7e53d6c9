"""Alignment and uniformity: how near positive pairs are, and how evenly embeddings cover the sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from st_kdmcse.functional.cosines import unit, widen

# Elements of the similarity block that `uniformity` holds at a time (16 MiB in float32).
_UNIFORMITY_BLOCK = 2**22


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """The mean squared distance of positive pairs on the unit sphere (Eq. 15; Wang and Isola, ICML 2020).

    Args:
        x: (N, d), normalised here.
        y: (N, d), the partner of each row.

    Returns:
        A scalar in [0, 4]; smaller is better.

    Raises:
        ValueError: if the shapes differ or there is no row.
    """
    if x.shape != y.shape or x.ndim != 2 or len(x) == 0:
        raise ValueError(f"expected two non-empty matrices of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    return (unit(widen(x)) - unit(widen(y))).square().sum(dim=1).mean()


def uniformity(x: Tensor, t: float = 2) -> Tensor:
    r"""How evenly the rows cover the unit sphere (Eq. 16; Wang and Isola, ICML 2020).

    .. math:: \log \frac{2}{N (N - 1)} \sum_{i < j} e^{-t \|x_i - x_j\|^2}

    The pairs are taken in blocks, in the backward pass too, so that memory grows with N and not with its square.

    Args:
        x: (N, d), normalised here.
        t: the :math:`t` > 0 that scales the distances.

    Returns:
        A scalar in [-4 t, 0]; smaller is better. A single row gives 0, the value of rows that all coincide.

    Raises:
        ValueError: if ``x`` is not a matrix, has no row, or t is not positive.
    """
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"expected a non-empty matrix, got shape {tuple(x.shape)}")
    if not t > 0:
        raise ValueError(f"t must be positive, got {t}")
    x = unit(widen(x))
    count = len(x)
    if count == 1:
        return x.sum() * 0

    def block(x: Tensor, start: int, stop: int) -> Tensor:
        with torch.autocast(device_type=x.device.type, enabled=False):
            squared_distance = (2 - 2 * x[start:stop] @ x[start:].T).clamp_min(0)
        later = torch.ones_like(squared_distance, dtype=torch.bool).triu(1)
        return (-t * squared_distance).masked_fill(~later, -math.inf).flatten().logsumexp(0)

    rows = max(2, _UNIFORMITY_BLOCK // count)
    # The last row has no later partner: a block of it alone would be empty.
    starts = range(0, count - 1, rows)
    blocks = [checkpoint(block, x, start, min(start + rows, count), use_reentrant=False) for start in starts]
    return torch.stack(blocks).logsumexp(0) - math.log(count * (count - 1) / 2)
