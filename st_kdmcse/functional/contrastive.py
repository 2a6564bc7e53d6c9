"""Contrastive losses: SimCSE, ArcCSE and AdapACSE, their filters, and several positives."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from st_kdmcse.functional.cosines import (
    LARGEST_SCORE,
    check_keep,
    check_pairwise,
    cosine_similarity_matrix,
    logits_of,
    positive_mask,
    widen,
)


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    temperature: float = 0.05,
    keep: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    positive_offset: int = 0,
) -> Tensor:
    r"""InfoNCE with in-batch negatives, the loss of SimCSE (Eq. 1).

    .. math:: -\frac{1}{N} \sum_i \log \frac{e^{\cos \theta_{ii} / \tau}}{\sum_j e^{\cos \theta_{ij} / \tau}}

    Args:
        anchors: (N, d).
        candidates: (M, d), usually M = N.
        temperature: the :math:`\tau` > 0 that divides the cosines.
        keep: (N, M) boolean; a negative marked False leaves the denominator. The positive always stays.
        targets: (N, M) shares of several positives, see :func:`soft_targets`; None is the one positive. A candidate
            with a share always stays.
        positive_offset: the candidate of anchor 0.

    Returns:
        A scalar, the mean over the anchors; 0 where an anchor has no negative.

    Raises:
        ValueError: for shapes or types that do not fit, or a temperature that is not positive.

    Example:
        >>> round(info_nce(torch.eye(4), torch.eye(4), temperature=1.0).item(), 4)  # log(1 + 3 / e)
        0.7437
    """
    return _softmax_loss(cosine_similarity_matrix(anchors, candidates), temperature, positive_offset, keep, targets)


def info_nce_with_margin(
    anchors: Tensor,
    candidates: Tensor,
    margin: float,
    temperature: float = 0.05,
    keep: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    guard: bool = True,
    positive_offset: int = 0,
) -> Tensor:
    """InfoNCE with one angular margin on every negative: the text loss of the authors' released code.

    Args:
        anchors: (N, d).
        candidates: (M, d).
        margin: in radians, from 0 (:func:`info_nce`) to pi.
        temperature: > 0.
        keep: as for :func:`info_nce`.
        targets: as for :func:`info_nce`; a candidate with a share has no margin.
        guard: apply the margin only to negatives whose angle exceeds it.
        positive_offset: the candidate of anchor 0.

    Returns:
        A scalar, the mean over the anchors.

    Raises:
        ValueError: for shapes that do not fit, or a margin or temperature out of range.
    """
    if margin == 0:
        return info_nce(anchors, candidates, temperature, keep, targets, positive_offset=positive_offset)
    # AdapACSE with a teacher to whom every pair is unlike has the same margin everywhere.
    nothing_alike = anchors.new_zeros(len(anchors), len(candidates))
    return adap_acse(
        anchors,
        candidates,
        nothing_alike,
        margin,
        temperature,
        keep,
        targets,
        guard=guard,
        positive_offset=positive_offset,
    )


def arc_cse(
    anchors: Tensor, candidates: Tensor, margin: float, temperature: float = 0.05, *, positive_offset: int = 0
) -> Tensor:
    r"""ArcCSE: a fixed angular margin on the positive pair (Eq. 10; Zhang et al., ACL 2022).

    The positive's logit is :math:`\cos(\theta_{ii} + m)`; the negatives keep :math:`\cos \theta_{ij}`.

    Args:
        anchors: (N, d).
        candidates: (M, d).
        margin: m in radians, from 0 (:func:`info_nce`) to pi.
        temperature: > 0.
        positive_offset: the candidate of anchor 0.

    Returns:
        A scalar, the mean over the anchors.

    Raises:
        ValueError: for shapes that do not fit, or a margin or temperature out of range.
    """
    _check_margin(margin)
    cosine = cosine_similarity_matrix(anchors, candidates)
    shift = margin * positive_mask(cosine, positive_offset).to(cosine.dtype)
    return _softmax_loss(_cosine_of_sum(cosine, shift), temperature, positive_offset)


def adap_acse(
    anchors: Tensor,
    candidates: Tensor,
    teacher_similarity: Tensor,
    margin: float = 0.125,
    temperature: float = 0.05,
    keep: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    guard: bool = True,
    positive_offset: int = 0,
) -> Tensor:
    r"""AdapACSE: an angular margin on each negative, as wide as the teacher finds the pair unlike (Eq. 12, 13).

    The positive keeps :math:`\cos \theta_{ii}`. The logit of a negative is :math:`\cos(\theta_{ij} - m \Delta_{ij})`
    with :math:`\Delta_{ij} = |1 - \alpha_{ij}|`, where its angle exceeds m, and :math:`\cos \theta_{ij}` elsewhere:
    so near to the anchor a margin would carry the angle past zero, where the cosine falls again.

    Args:
        anchors: (N, d).
        candidates: (M, d).
        teacher_similarity: (N, M), the soft labels :math:`\alpha`; no gradient flows into them.
        margin: m in radians, from 0 (:func:`info_nce`) to pi.
        temperature: > 0.
        keep: (N, M) boolean; a negative marked False leaves the denominator (:func:`threshold_filter`). The positive
            always stays.
        targets: as for :func:`info_nce`; a candidate with a share has no margin.
        guard: False applies the margin to every negative, however small its angle.
        positive_offset: the candidate of anchor 0.

    Returns:
        A scalar, the mean over the anchors; 0 where an anchor has no negative left.

    Raises:
        ValueError: for shapes or types that do not fit, or a margin or temperature out of range.
    """
    _check_margin(margin)
    cosine = cosine_similarity_matrix(anchors, candidates)
    check_pairwise("teacher_similarity", teacher_similarity, cosine)
    if margin > 0:
        shifted = ~positive_mask(cosine, positive_offset)
        if targets is not None:
            check_pairwise("targets", targets, cosine)
            shifted = shifted & (targets == 0)
        if guard:
            shifted = shifted & (cosine.detach() < math.cos(margin))
        difference = (1 - widen(teacher_similarity.detach())).abs().clamp(max=LARGEST_SCORE).to(cosine.dtype)
        shifted = shifted | difference.isnan()  # which must show in the result
        cosine = _cosine_of_sum(cosine, torch.where(shifted, -margin * difference, 0.0))
    return _softmax_loss(cosine, temperature, positive_offset, keep, targets)


def threshold_filter(
    teacher_similarity: Tensor, threshold: float | None, *, inclusive: bool = True, positive_offset: int = 0
) -> Tensor:
    """The negatives that stay in the denominator: those that the teacher does not score as similar.

    Eq. 8 is printed the wrong way round; here, as in the paper's text and Figure 4, a high score removes the pair.

    Args:
        teacher_similarity: (N, M) scores.
        threshold: a negative with a score of at least this leaves; None keeps all.
        inclusive: False keeps a score that equals the threshold.
        positive_offset: the column of row 0's positive, which always stays.

    Returns:
        (N, M) boolean, True for the pairs that stay.

    Example:
        >>> threshold_filter(torch.tensor([[0.9, 0.8], [0.1, 0.9]]), 0.8)
        tensor([[ True, False],
                [ True,  True]])
    """
    positive = positive_mask(teacher_similarity, positive_offset)
    if threshold is None:
        return torch.ones_like(positive)
    score = widen(teacher_similarity.detach())
    removed = score >= threshold if inclusive else score > threshold
    return ~removed | positive  # a pair whose score is NaN stays, and shows in the loss


def relative_filter(teacher_similarity: Tensor, slack: float = 0.0, *, positive_offset: int = 0) -> Tensor:
    """The negatives that the teacher scores no higher than the positive of their row.

    The rule of GISTEmbed (Solatorio, 2024, arXiv 2402.16829).

    Args:
        teacher_similarity: (N, M) scores.
        slack: a negative leaves from this far below the score of the positive on; negative values are lenient.
        positive_offset: the column of row 0's positive, which always stays.

    Returns:
        (N, M) boolean, True for the pairs that stay.

    Example:
        >>> relative_filter(torch.tensor([[0.3, 0.4], [0.1, 0.9]]))
        tensor([[ True, False],
                [ True,  True]])
    """
    positive = positive_mask(teacher_similarity, positive_offset)
    score = widen(teacher_similarity.detach())
    own = score[:, positive_offset : positive_offset + len(score)].diagonal().unsqueeze(1)
    return ~(score > own - slack) | positive


def soft_targets(weights: Tensor, *, positive_offset: int = 0) -> Tensor:
    r"""The shares of several positives, :math:`q_{ij} \propto [i = j] + w_{ij}`.

    Args:
        weights: (N, M), each >= 0: how much of a positive a candidate is. That of the positive itself counts as 1.
        positive_offset: the column of row 0's positive.

    Returns:
        (N, M), the rows of sum 1; no gradient flows into ``weights``.

    Example:
        >>> soft_targets(torch.tensor([[0.0, 0.25], [0.0, 0.0]]))
        tensor([[0.8000, 0.2000],
                [0.0000, 1.0000]])
    """
    share = widen(weights.detach()).masked_fill(positive_mask(weights, positive_offset), 1.0)
    return share / share.sum(dim=1, keepdim=True)


def _softmax_loss(
    cosine: Tensor,
    temperature: float,
    positive_offset: int,
    keep: Tensor | None = None,
    targets: Tensor | None = None,
) -> Tensor:
    """The mean of -log softmax at the positives, over the kept pairs of (N, M) cosines."""
    logits = logits_of(cosine, temperature, positive_offset)
    if keep is not None:
        check_keep(keep, cosine)
        stays = keep | positive_mask(cosine, positive_offset)
        if targets is not None:
            check_pairwise("targets", targets, cosine)
            stays = stays | (targets > 0)
        logits = logits.masked_fill(~stays, -math.inf)
    if targets is None:
        target = torch.arange(len(logits), device=logits.device) + positive_offset
        return F.cross_entropy(logits, target)
    check_pairwise("targets", targets, cosine)
    share = targets.detach().to(logits.dtype)
    return -(share * logits.log_softmax(dim=1).masked_fill(share == 0, 0.0)).sum(dim=1).mean()


def _cosine_of_sum(cosine: Tensor, shift: Tensor) -> Tensor:
    """cos(theta + shift) from cos(theta), theta in [0, pi], by the addition theorem.

    At theta = 0 and theta = pi the slope of the sine is infinite; there the sine is the constant 0.
    """
    squared_sine = (1 - cosine) * (1 + cosine)
    inside = squared_sine > 4 * torch.finfo(cosine.dtype).eps
    sine = torch.where(inside, torch.where(inside, squared_sine, 1.0).sqrt(), 0.0)
    return cosine * shift.cos() - sine * shift.sin()


def _check_margin(margin: float) -> None:
    if not 0 <= margin <= math.pi:
        raise ValueError(f"margin is an angle in radians from 0 to pi, got {margin}")
