"""The mathematics of SimCSE, ArcCSE, KDMCSE and list distillation as pure functions of tensors.

They are one module, long as it is, because all rest on the few helpers at its end. Equation numbers are those of KDMCSE
(Nguyen et al., NAACL 2024, arXiv 2403.17486). Every function normalises its rows itself, so that the length of a vector
never matters, and works in float32 (float64 stays float64), whatever the input and whether or not autocast is on. A
zero vector has cosine 0 with everything and receives no gradient. All values and gradients are finite for finite
inputs; NaN in an input is NaN in the result.

Shapes: N anchors, M >= N candidates, dimension d. The candidate of anchor ``i`` is row ``i + positive_offset``; M > N
and an offset occur where the candidates of several processes are gathered.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = [
    "ListLoss",
    "ScoreStatistics",
    "adap_acse",
    "alignment",
    "arc_cse",
    "cosine_similarity_matrix",
    "dot_product_matrix",
    "empirical_distribution",
    "fuse",
    "info_nce",
    "info_nce_with_margin",
    "list_consistency",
    "list_distillation",
    "positive_mask",
    "relative_filter",
    "score_statistics",
    "shuffle_groups",
    "soft_targets",
    "standardize",
    "threshold_filter",
    "uniformity",
]

ListLoss = Literal["listnet", "listmle"]
"""How a student's list is compared with the teacher's: as distributions, or by the teacher's order."""

# Below this length a vector counts as zero: its direction is rounding noise and its gradient (1 / length) would
# leave the range of the number format.
_ZERO_LENGTH = {torch.float32: 1e-12, torch.float64: 1e-100}

# Elements of the similarity block that `uniformity` holds at a time (16 MiB in float32).
_UNIFORMITY_BLOCK = 2**22

# How far below all others the logits outside of a list lie: their exponential is 0 in float64 too, and, unlike an
# infinite one, they have products and gradients.
_OUTSIDE = 1000.0

# Bound on a teacher's scores, which only keeps a number beyond the range of float32 from becoming infinite.
_LARGEST_SCORE = 1e6


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
    _check_pairwise("teacher_similarity", teacher_similarity, cosine)
    if margin > 0:
        shifted = ~positive_mask(cosine, positive_offset)
        if targets is not None:
            _check_pairwise("targets", targets, cosine)
            shifted = shifted & (targets == 0)
        if guard:
            shifted = shifted & (cosine.detach() < math.cos(margin))
        difference = (1 - _widen(teacher_similarity.detach())).abs().clamp(max=_LARGEST_SCORE).to(cosine.dtype)
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
    score = _widen(teacher_similarity.detach())
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
    score = _widen(teacher_similarity.detach())
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
    share = _widen(weights.detach()).masked_fill(positive_mask(weights, positive_offset), 1.0)
    return share / share.sum(dim=1, keepdim=True)


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
    scores, same = _widen(scores.detach()), _widen(same_image_scores.detach())
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
    varies = ~(std <= _ZERO_LENGTH[scores.dtype])
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
    scores = _widen(scores.detach())
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
    scores, weights = _widen(scores.detach()), weights.to(scores)
    mean, std, correlation = (each.to(scores) for each in (statistics.mean, statistics.std, statistics.correlation))
    standard = standardize(scores, mean[:, None, None], std[:, None, None])
    # Rounding apart, a variance of 0 belongs to a sum of 0.
    variance = (weights @ correlation @ weights).clamp_min(1e-6 * weights.square().sum())
    return torch.einsum("b,bnm->nm", weights, standard) / variance.sqrt()


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
    _check_temperature(teacher_temperature)
    logits, listed = _list_logits(anchors, candidates, temperature, keep, positive_offset)
    _check_pairwise("teacher_scores", teacher_scores, logits)
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
    _check_temperature(temperature)
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be a share in (0, 1], got {mass}")
    scores = _bounded(teacher_scores)
    _check_pairwise("noise", noise, scores)
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


def cosine_similarity_matrix(x: Tensor, y: Tensor) -> Tensor:
    r"""The cosine of every row of ``x`` with every row of ``y``; of teacher features, the soft labels (Eq. 7).

    Args:
        x: (N, d).
        y: (M, d).

    Returns:
        (N, M) float32 (float64 if an input is), in [-1, 1] up to rounding; 0 for a zero vector.

    Raises:
        ValueError: if the inputs are not matrices of one width, or one has no row.
    """
    _check_matrices(x, y)
    return _pairwise_products(_unit(_widen(x)), _unit(_widen(y)))


def dot_product_matrix(x: Tensor, y: Tensor) -> Tensor:
    """The dot product of every row of ``x`` with every row of ``y``: the score of the released code's filter.

    Args:
        x: (N, d).
        y: (M, d).

    Returns:
        (N, M) float32 (float64 if an input is).

    Raises:
        ValueError: if the inputs are not matrices of one width, or one has no row.
    """
    _check_matrices(x, y)
    return _pairwise_products(_widen(x), _widen(y))


def positive_mask(pairwise: Tensor, positive_offset: int = 0) -> Tensor:
    """Where the positives are in a matrix of pairs.

    Args:
        pairwise: (N, M), of which only the shape and device matter.
        positive_offset: the column of row 0's positive.

    Returns:
        (N, M) boolean, True at column i + positive_offset of row i.

    Raises:
        ValueError: if a positive would be outside of the matrix.
    """
    _check_offset(pairwise, positive_offset)
    rows, columns = pairwise.shape
    device = pairwise.device
    return torch.arange(columns, device=device) == torch.arange(rows, device=device).unsqueeze(1) + positive_offset


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
    return (_unit(_widen(x)) - _unit(_widen(y))).square().sum(dim=1).mean()


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
    x = _unit(_widen(x))
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


def _softmax_loss(
    cosine: Tensor,
    temperature: float,
    positive_offset: int,
    keep: Tensor | None = None,
    targets: Tensor | None = None,
) -> Tensor:
    """The mean of -log softmax at the positives, over the kept pairs of (N, M) cosines."""
    logits = _logits(cosine, temperature, positive_offset)
    if keep is not None:
        _check_keep(keep, cosine)
        stays = keep | positive_mask(cosine, positive_offset)
        if targets is not None:
            _check_pairwise("targets", targets, cosine)
            stays = stays | (targets > 0)
        logits = logits.masked_fill(~stays, -math.inf)
    if targets is None:
        target = torch.arange(len(logits), device=logits.device) + positive_offset
        return F.cross_entropy(logits, target)
    _check_pairwise("targets", targets, cosine)
    share = targets.detach().to(logits.dtype)
    return -(share * logits.log_softmax(dim=1).masked_fill(share == 0, 0.0)).sum(dim=1).mean()


def _list_logits(
    anchors: Tensor, candidates: Tensor, temperature: float, keep: Tensor | None, positive_offset: int
) -> tuple[Tensor, Tensor]:
    """(N, M) logits whose softmax is the student's list, and which pairs are in it."""
    cosine = cosine_similarity_matrix(anchors, candidates)
    listed = _listed(cosine, keep, positive_offset)
    return _within(_logits(cosine, temperature, positive_offset), listed), listed


def _listed(pairwise: Tensor, keep: Tensor | None, positive_offset: int) -> Tensor:
    """(N, M) boolean, False for the positives and for what ``keep`` leaves out."""
    others = ~positive_mask(pairwise, positive_offset)
    if keep is None:
        return others
    _check_keep(keep, pairwise)
    return others & keep


def _within(logits: Tensor, listed: Tensor) -> Tensor:
    """The logits of a list, and for what is outside of it one that a softmax makes 0 of, and a gradient too."""
    return torch.where(listed, logits, logits.detach().amin(dim=1, keepdim=True) - _OUTSIDE)


def _logits(cosine: Tensor, temperature: float, positive_offset: int) -> Tensor:
    """(N, M) cosines over the temperature, after the checks of both."""
    _check_temperature(temperature)
    _check_offset(cosine, positive_offset)
    return cosine / temperature


def _check_offset(pairwise: Tensor, positive_offset: int) -> None:
    rows, columns = pairwise.shape
    if positive_offset < 0 or rows + positive_offset > columns:
        raise ValueError(
            f"{rows} anchors from candidate {positive_offset} on need as many candidates, from 0 on; got {columns}"
        )


def _bounded(teacher_scores: Tensor) -> Tensor:
    """Scores in float32 or float64, without gradient."""
    return _widen(teacher_scores.detach()).clamp(-_LARGEST_SCORE, _LARGEST_SCORE)


def _cosine_of_sum(cosine: Tensor, shift: Tensor) -> Tensor:
    """cos(theta + shift) from cos(theta), theta in [0, pi], by the addition theorem.

    At theta = 0 and theta = pi the slope of the sine is infinite; there the sine is the constant 0.
    """
    squared_sine = (1 - cosine) * (1 + cosine)
    inside = squared_sine > 4 * torch.finfo(cosine.dtype).eps
    sine = torch.where(inside, torch.where(inside, squared_sine, 1.0).sqrt(), 0.0)
    return cosine * shift.cos() - sine * shift.sin()


def _widen(x: Tensor) -> Tensor:
    """Float32 of a narrower tensor; the gradient that flows back is kept inside the narrow range."""
    if x.dtype in _ZERO_LENGTH:
        return x
    wide = x.float()
    if wide.requires_grad and x.is_floating_point():
        # An eighth of the range, as the gradients of several uses of one tensor are added up.
        limit = torch.finfo(x.dtype).max / 8
        wide.register_hook(lambda gradient: gradient.clamp(-limit, limit))
    return wide


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay zero and get no gradient."""
    # Dividing by the largest entry first keeps the squares of very long and very short vectors in range.
    scale = x.detach().abs().amax(dim=-1, keepdim=True)
    nonzero = ~(scale <= _ZERO_LENGTH[x.dtype])  # NaN is not zero: it must show in the result
    x = torch.where(nonzero, x, 0.0) / torch.where(nonzero, scale, 1.0)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(nonzero, length, 1.0)


def _pairwise_products(x: Tensor, y: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, y.dtype)
    with torch.autocast(device_type=x.device.type, enabled=False):
        return x.to(dtype) @ y.to(dtype).T


def _check_matrices(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected matrices of one width, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if len(x) == 0 or len(y) == 0:
        raise ValueError("an empty batch has no loss; leave it out")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _check_keep(keep: Tensor, cosine: Tensor) -> None:
    _check_pairwise("keep", keep, cosine)
    if keep.dtype != torch.bool:
        raise ValueError(f"keep must be boolean, got {keep.dtype}")


def _check_margin(margin: float) -> None:
    if not 0 <= margin <= math.pi:
        raise ValueError(f"margin is an angle in radians from 0 to pi, got {margin}")


def _check_pairwise(name: str, value: Tensor, cosine: Tensor) -> None:
    if value.shape != cosine.shape:
        raise ValueError(
            f"{name} must have shape {tuple(cosine.shape)} (anchors, candidates), got {tuple(value.shape)}"
        )
