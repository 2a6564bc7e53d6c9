"""Losses of lists: how alike the other sentences are to each one, by a teacher or by another view."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from st_kdmcse.functional.cosines import (
    LARGEST_SCORE,
    check_keep,
    check_pairwise,
    check_temperature,
    cosine_similarity_matrix,
    logits_of,
    positive_mask,
    widen,
)

ListLoss = Literal["listnet", "listmle"]
"""How a student's list is compared with the teacher's: as distributions, or by the teacher's order."""

# How far below all others the logits outside of a list lie: their exponential is 0 in float64 too, and, unlike an
# infinite one, they have products and gradients.
_OUTSIDE = 1000.0


def list_distillation(
    anchors: Tensor,
    candidates: Tensor,
    teacher_scores: Tensor,
    temperature: float = 0.05,
    teacher_temperature: float = 0.5,
    keep: Tensor | None = None,
    *,
    loss: ListLoss = "listnet",
    length: int = 16,
    positive_offset: int = 0,
) -> Tensor:
    r"""Teach each anchor how alike the teacher finds the other candidates, as a list (RankCSE, Liu et al., ACL 2023).

    ListNet compares distributions, with :math:`Z` the teacher's scores and :math:`p_{ij}` the softmax of the student's
    cosines over the temperature :math:`\tau_s`:

    .. math:: -\frac{1}{N} \sum_i \sum_j q_{ij} \log p_{ij}, \quad q_{ij} = \mathrm{softmax}_j(Z_{ij} / \tau_t)

    ListMLE asks for the teacher's order :math:`\pi` of the first K, with :math:`s_{ij} = \cos \theta_{ij} / \tau_s`:

    .. math:: -\frac{1}{N K} \sum_i \sum_{k \le K} \big[s_{i \pi(k)} - \log \sum_{l \ge k} e^{s_{i \pi(l)}}\big]

    The positive of an anchor is no part of its list.

    Args:
        anchors: (N, d).
        candidates: (M, d).
        teacher_scores: (N, M), of any scale that fits ``teacher_temperature``; no gradient flows into them.
        temperature: the student's, > 0.
        teacher_temperature: > 0, in the units of ``teacher_scores``; ListMLE does without.
        keep: (N, M) boolean; a candidate marked False is no part of the list.
        loss: "listnet" or "listmle".
        length: K of ListMLE, >= 1; a shorter list is divided by its own length.
        positive_offset: the candidate of anchor 0.

    Returns:
        A scalar, the mean over the anchors; 0 where a list is empty.

    Raises:
        ValueError: for shapes or types that do not fit, or an option out of range.
    """
    check_temperature(teacher_temperature)
    logits, listed = _list_logits(anchors, candidates, temperature, keep, positive_offset)
    check_pairwise("teacher_scores", teacher_scores, logits)
    scores = _bounded(teacher_scores).to(logits.dtype)
    if loss == "listnet":
        target = _within(scores / teacher_temperature, listed).softmax(dim=1).masked_fill(~listed, 0.0)
        return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    if loss != "listmle" or length < 1:
        raise ValueError(f'loss must be "listnet" or "listmle" with a length >= 1, got {loss!r} and {length}')
    order = scores.masked_fill(~listed, -math.inf).argsort(dim=1, descending=True, stable=True)
    ranked = logits.gather(1, order)
    # Of each rank, the sum over it and those behind it.
    remaining = ranked.flip(1).logcumsumexp(dim=1).flip(1)
    lengths = listed.sum(dim=1, keepdim=True).clamp(max=length)
    counted = torch.arange(ranked.shape[1], device=ranked.device) < lengths
    terms = (remaining - ranked).masked_fill(~counted, 0.0)
    return (terms.sum(dim=1, keepdim=True) / lengths.clamp(min=1)).mean()


def list_consistency(
    first: Tensor,
    second: Tensor,
    first_candidates: Tensor,
    second_candidates: Tensor,
    temperature: float = 0.05,
    *,
    positive_offset: int = 0,
) -> Tensor:
    r"""The Jensen-Shannon divergence of the lists that two views of an anchor give (RankCSE, Liu et al., ACL 2023).

    .. math:: \frac{1}{2 N} \sum_i \mathrm{KL}(p_i \| m_i) + \mathrm{KL}(r_i \| m_i), \quad m_i = (p_i + r_i) / 2

    :math:`p_i` is the softmax of the cosines of the first view with the second views of the others, :math:`r_i` that of
    the second view with the first ones. All logarithms are of the softmax itself, so that nothing has to be clamped.

    Args:
        first: (N, d), a view of each anchor.
        second: (N, d), the other view.
        first_candidates: (M, d).
        second_candidates: (M, d).
        temperature: > 0.
        positive_offset: the candidate of anchor 0, which is no part of its list.

    Returns:
        A scalar in [0, log 2], the mean over the anchors.

    Raises:
        ValueError: for shapes that do not fit or a temperature that is not positive.
    """
    logs = []
    for anchors, candidates in ((first, second_candidates), (second, first_candidates)):
        logits, _ = _list_logits(anchors, candidates, temperature, None, positive_offset)
        logs.append(logits.log_softmax(dim=1))
    middle = torch.logaddexp(*logs) - math.log(2)
    divergences = [(log.exp() * (log - middle)).sum(dim=1).mean() for log in logs]
    return torch.stack(divergences).mean()


def shuffle_groups(
    teacher_scores: Tensor,
    noise: Tensor,
    temperature: float = 0.5,
    keep: Tensor | None = None,
    *,
    mass: float = 0.1,
    positive_offset: int = 0,
) -> Tensor:
    """Shuffle a teacher's scores among candidates of about the same rank (DistillCSE, Xu et al., EMNLP Findings 2023).

    The candidates of a list are cut into groups of a share of the softmax, from the best on. Within a group the scores
    change places, so that a student learns the order of the groups and not the teacher's noise.

    Args:
        teacher_scores: (N, M).
        noise: (N, M) in [0, 1), whose order within a group decides who gets which score.
        temperature: of the softmax, > 0.
        keep: (N, M) boolean; a candidate marked False is no part of the list and keeps its score, as the positive does.
        mass: the share of a group, in (0, 1].
        positive_offset: the column of row 0's positive.

    Returns:
        (N, M), in each row the same numbers.

    Raises:
        ValueError: for shapes or types that do not fit, or an option out of range.
    """
    check_temperature(temperature)
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be a share in (0, 1], got {mass}")
    scores = _bounded(teacher_scores)
    check_pairwise("noise", noise, scores)
    listed = _listed(scores, keep, positive_offset)
    share = _within(scores / temperature, listed).softmax(dim=1).masked_fill(~listed, -1.0)
    ranked, order = share.sort(dim=1, descending=True, stable=True)
    share = ranked.clamp(min=0)
    group = ((share.cumsum(dim=1) - share) / mass).floor()
    # Those outside of the list come last, in the order that they are in.
    outside = ranked < 0
    key = torch.where(outside, math.inf, group + noise.to(group.dtype).gather(1, order))
    shuffled = order.gather(1, key.argsort(dim=1, stable=True))
    return scores.scatter(1, shuffled, scores.gather(1, order))


def _list_logits(
    anchors: Tensor, candidates: Tensor, temperature: float, keep: Tensor | None, positive_offset: int
) -> tuple[Tensor, Tensor]:
    """(N, M) logits whose softmax is the student's list, and which pairs are in it."""
    cosine = cosine_similarity_matrix(anchors, candidates)
    listed = _listed(cosine, keep, positive_offset)
    return _within(logits_of(cosine, temperature, positive_offset), listed), listed


def _listed(pairwise: Tensor, keep: Tensor | None, positive_offset: int) -> Tensor:
    """(N, M) boolean, False for the positives and for what ``keep`` leaves out."""
    others = ~positive_mask(pairwise, positive_offset)
    if keep is None:
        return others
    check_keep(keep, pairwise)
    return others & keep


def _within(logits: Tensor, listed: Tensor) -> Tensor:
    """The logits of a list, and for what is outside of it one that a softmax makes 0 of, and a gradient too."""
    return torch.where(listed, logits, logits.detach().amin(dim=1, keepdim=True) - _OUTSIDE)


def _bounded(teacher_scores: Tensor) -> Tensor:
    """Scores in float32 or float64, without gradient."""
    return widen(teacher_scores.detach()).clamp(-LARGEST_SCORE, LARGEST_SCORE)
