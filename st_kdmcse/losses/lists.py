"""The terms that compare lists, of some anchors with all candidates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from st_kdmcse import functional
from st_kdmcse.config import KDMCSEConfig
from st_kdmcse.losses.base import AnchorTensors

VIEWS = ("first", "second")
"""The names of the two views of a sentence, of the anchors and of the candidates."""

ListScores = Callable[[AnchorTensors], tuple[Tensor, Tensor | None]]
"""The (N, M) scores of some anchors with all candidates, and which pairs are in the lists; None for all."""


def distillation_term(
    config: KDMCSEConfig,
    scores: ListScores,
    others: AnchorTensors,
    noise: Tensor | None,
    rows: AnchorTensors,
    offset: int,
) -> tuple[Tensor, ...]:
    """List distillation, the mean of both directions between the views.

    Args:
        config: the options.
        scores: of the teacher.
        others: both views of all candidates.
        noise: (M,) in [0, 1), which shuffles groups together with "noise" of the rows; None does not shuffle.
        rows: both views of some anchors, what ``scores`` reads, and with ``noise`` also "noise", (N,) >= 100.
        offset: the candidate of anchor 0.
    """
    teacher, keep = scores(rows)
    if noise is not None:
        # A matrix of random numbers for the whole batch would not fit where batches are cached.
        of_pairs = torch.outer(rows["noise"], noise).frac()
        teacher = functional.shuffle_groups(teacher, of_pairs, config.list_temperature, keep, positive_offset=offset)
    directions = [
        functional.list_distillation(
            rows[view],
            others[other],
            teacher,
            config.list_student_temperature,
            config.list_temperature,
            keep,
            loss=config.list_loss,
            length=config.list_length,
            positive_offset=offset,
        )
        for view, other in zip(VIEWS, reversed(VIEWS), strict=True)
    ]
    return (torch.stack(directions).mean(),)


def consistency_term(
    config: KDMCSEConfig, others: AnchorTensors, rows: AnchorTensors, offset: int
) -> tuple[Tensor, ...]:
    """How far the lists of two views diverge.

    Args:
        config: the options.
        others: both views of all candidates.
        rows: both views of some anchors.
        offset: the candidate of anchor 0.
    """
    views = (rows["first"], rows["second"], others["first"], others["second"])
    return (functional.list_consistency(*views, config.list_student_temperature, positive_offset=offset),)
