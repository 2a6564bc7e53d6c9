"""The mathematics of SimCSE, ArcCSE and KDMCSE as pure functions of tensors.

Equation numbers are those of KDMCSE (Nguyen et al., NAACL 2024, arXiv 2403.17486). Every function normalises its rows
itself, so that the length of a vector never matters, and works in float32 (float64 stays float64), whatever the input
and whether or not autocast is on. A zero vector has cosine 0 with everything and receives no gradient. All values and
gradients are finite for finite inputs.

Shapes: N anchors, M >= N candidates, dimension d. The candidate of anchor ``i`` is row ``i + positive_offset``; M > N
and an offset occur where the candidates of several processes are gathered.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = [
    "adap_acse",
    "alignment",
    "arc_cse",
    "cosine_similarity_matrix",
    "dot_product_matrix",
    "info_nce",
    "info_nce_with_margin",
    "positive_mask",
    "threshold_filter",
    "uniformity",
]

# Below this length a vector counts as zero: its direction is rounding noise and its gradient (1 / length) would
# leave the range of the number format.
_ZERO_LENGTH = {torch.float32: 1e-12, torch.float64: 1e-100}

# Elements of the similarity block that `uniformity` holds at a time (16 MiB in float32).
_UNIFORMITY_BLOCK = 2**22


def info_nce(anchors: Tensor, candidates: Tensor, temperature: float = 0.05, *, positive_offset: int = 0) -> Tensor:
    r"""InfoNCE with in-batch negatives, the loss of SimCSE (Eq. 1).

    .. math:: -\frac{1}{N} \sum_i \log \frac{e^{\cos \theta_{ii} / \tau}}{\sum_j e^{\cos \theta_{ij} / \tau}}

    Args:
        anchors: (N, d).
        candidates: (M, d), usually M = N.
        temperature: the :math:`\tau` > 0 that divides the cosines.
        positive_offset: the candidate of anchor 0.

    Returns:
        A scalar, the mean over the anchors; 0 where an anchor has no negative.

    Raises:
        ValueError: for shapes that do not fit or a temperature that is not positive.

    Example:
        >>> round(info_nce(torch.eye(4), torch.eye(4), temperature=1.0).item(), 4)  # log(1 + 3 / e)
        0.7437
    """
    return _softmax_loss(cosine_similarity_matrix(anchors, candidates), temperature, positive_offset)


def info_nce_with_margin(
    anchors: Tensor,
    candidates: Tensor,
    margin: float,
    temperature: float = 0.05,
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
        guard: apply the margin only to negatives whose angle exceeds it.
        positive_offset: the candidate of anchor 0.

    Returns:
        A scalar, the mean over the anchors.

    Raises:
        ValueError: for shapes that do not fit, or a margin or temperature out of range.
    """
    if margin == 0:
        return info_nce(anchors, candidates, temperature, positive_offset=positive_offset)
    # AdapACSE with a teacher to whom every pair is unlike has the same margin everywhere.
    nothing_alike = anchors.new_zeros(len(anchors), len(candidates))
    return adap_acse(
        anchors, candidates, nothing_alike, margin, temperature, guard=guard, positive_offset=positive_offset
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
        if guard:
            shifted = shifted & (cosine.detach() < math.cos(margin))
        # Cosines differ by 2 at most; the bound only keeps a number beyond the range of float32 from becoming infinite.
        difference = (1 - _widen(teacher_similarity.detach())).abs().clamp(max=1e6).to(cosine.dtype)
        cosine = _cosine_of_sum(cosine, torch.where(shifted, -margin * difference, 0.0))
    return _softmax_loss(cosine, temperature, positive_offset, keep)


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
    return (score < threshold if inclusive else score <= threshold) | positive


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
    """
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


def _softmax_loss(cosine: Tensor, temperature: float, positive_offset: int, keep: Tensor | None = None) -> Tensor:
    """The mean of -log softmax at the positives, over the kept pairs of (N, M) cosines."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if cosine.shape[0] + positive_offset > cosine.shape[1]:
        raise ValueError(
            f"{cosine.shape[0]} anchors from candidate {positive_offset} on need as many candidates, "
            f"got {cosine.shape[1]}"
        )
    logits = cosine / temperature
    if keep is not None:
        _check_pairwise("keep", keep, cosine)
        if keep.dtype != torch.bool:
            raise ValueError(f"keep must be boolean, got {keep.dtype}")
        logits = logits.masked_fill(~(keep | positive_mask(cosine, positive_offset)), -math.inf)
    target = torch.arange(len(logits), device=logits.device) + positive_offset
    return F.cross_entropy(logits, target)


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
    nonzero = scale > _ZERO_LENGTH[x.dtype]
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


def _check_margin(margin: float) -> None:
    if not 0 <= margin <= math.pi:
        raise ValueError(f"margin is an angle in radians from 0 to pi, got {margin}")


def _check_pairwise(name: str, value: Tensor, cosine: Tensor) -> None:
    if value.shape != cosine.shape:
        raise ValueError(
            f"{name} must have shape {tuple(cosine.shape)} (anchors, candidates), got {tuple(value.shape)}"
        )
