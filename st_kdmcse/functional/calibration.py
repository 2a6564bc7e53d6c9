"""What a teacher's scores are like, and scores by that measure."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from st_kdmcse.functional.cosines import ZERO_LENGTH, widen


class ScoreStatistics(NamedTuple):
    """What a teacher's scores are like over pairs of different images: one row for each of B kinds of score.

    Attributes:
        mean: (B,).
        std: (B,), >= 0.
        quantiles: (B, Q) ascending, at Q even steps from the smallest score to the largest.
        correlation: (B, B) of the kinds over the same pairs, 1 on the diagonal; 0 where a score does not vary.
        same_image_mean: scalar, of the scores of two captions of one image; 0 if there are none.
        same_image_std: scalar, >= 0.
    """

    mean: Tensor
    std: Tensor
    quantiles: Tensor
    correlation: Tensor
    same_image_mean: Tensor
    same_image_std: Tensor

    def to(self, device: torch.device) -> ScoreStatistics:
        """The same on a device."""
        return ScoreStatistics(*(each.to(device) for each in self))


def score_statistics(scores: Tensor, same_image_scores: Tensor, steps: int = 1001) -> ScoreStatistics:
    """The statistics of sampled scores.

    Args:
        scores: (B, P), P >= 1 pairs of different images.
        same_image_scores: (S,) of pairs of captions of one image; it may be empty.
        steps: Q, the number of quantiles, >= 2.

    Raises:
        ValueError: if there is no pair, or there are fewer than two steps.
    """
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"expected (kinds, pairs) of scores with a pair at least, got shape {tuple(scores.shape)}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    scores, same = widen(scores.detach()), widen(same_image_scores.detach())
    mean, std = scores.mean(dim=1), scores.std(dim=1, correction=0)
    standard = standardize(scores, mean[:, None], std[:, None])
    correlation = (standard @ standard.T / scores.shape[1]).clamp(-1, 1).fill_diagonal_(1.0)
    levels = torch.linspace(0, 1, steps, dtype=scores.dtype, device=scores.device)
    quantiles = torch.quantile(scores, levels, dim=1).T.contiguous()
    nothing = scores.new_zeros(())
    of_same = (same.mean(), same.std(correction=0)) if len(same) else (nothing, nothing)
    return ScoreStatistics(mean, std, quantiles, correlation, *of_same)


def standardize(scores: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Scores in units of their standard deviation, ``(scores - mean) / std``; 0 where they do not vary.

    Args:
        scores: any shape.
        mean: broadcast to it.
        std: broadcast to it, >= 0.
    """
    std = torch.as_tensor(std, dtype=scores.dtype, device=scores.device)
    varies = ~(std <= ZERO_LENGTH[scores.dtype])
    return torch.where(varies, (scores - mean) / torch.where(varies, std, 1.0), 0.0)


def empirical_distribution(scores: Tensor, quantiles: Tensor) -> Tensor:
    """The share of a sample that lies below each score, interpolated between quantiles: F of quantile calibration.

    Args:
        scores: any shape.
        quantiles: (Q,) ascending, at even steps from the smallest to the largest of the sample, Q >= 2.

    Returns:
        The shape of ``scores``, in [0, 1], ascending with the score; 0 up to the smallest of the sample, 1 from the
        largest on. No gradient.

    Example:
        >>> empirical_distribution(torch.tensor([-1.0, 0.1, 0.3, 2.0]), torch.tensor([0.0, 0.2, 0.4]))
        tensor([0.0000, 0.2500, 0.7500, 1.0000])
    """
    scores = widen(scores.detach())
    quantiles = quantiles.to(scores.dtype)
    last = len(quantiles) - 1
    above = torch.searchsorted(quantiles, scores.contiguous())
    inside = (above > 0) & (above <= last)
    step = above.clamp(1, last)
    low, high = quantiles[step - 1], quantiles[step]
    between = torch.where(inside, (scores - low) / torch.where(inside, high - low, 1.0), 0.0)
    found = torch.where(inside, (step - 1 + between) / last, (above > last).to(scores.dtype))
    return torch.where(scores.isnan(), scores, found)


def fuse(scores: Tensor, weights: Tensor, statistics: ScoreStatistics) -> Tensor:
    r"""One score of several kinds: their weighted sum in standard units, again of standard deviation 1.

    .. math:: Z = \sum_b w_b \frac{A^b - \mu_b}{s_b} \Big/ \sqrt{w^\top R w}

    Args:
        scores: (B, N, M), the :math:`A^b`.
        weights: (B,), each >= 0.
        statistics: of the B kinds.

    Returns:
        (N, M); 0 where the kinds cancel out.
    """
    scores, weights = widen(scores.detach()), weights.to(scores)
    mean, std, correlation = (each.to(scores) for each in (statistics.mean, statistics.std, statistics.correlation))
    standard = standardize(scores, mean[:, None, None], std[:, None, None])
    # Rounding apart, a variance of 0 belongs to a sum of 0.
    variance = (weights @ correlation @ weights).clamp_min(1e-6 * weights.square().sum())
    return torch.einsum("b,bnm->nm", weights, standard) / variance.sqrt()
