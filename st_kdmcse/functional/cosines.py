"""Cosines of rows in float32, whose values and gradients are finite, and the checks that all functions share."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this length a vector counts as zero: its direction is rounding noise and its gradient (1 / length) would
# leave the range of the number format.
ZERO_LENGTH = {torch.float32: 1e-12, torch.float64: 1e-100}

# Bound on a teacher's scores, which only keeps a number beyond the range of float32 from becoming infinite.
LARGEST_SCORE = 1e6


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
    return _pairwise_products(unit(widen(x)), unit(widen(y)))


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
    return _pairwise_products(widen(x), widen(y))


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


def logits_of(cosine: Tensor, temperature: float, positive_offset: int) -> Tensor:
    """(N, M) cosines over the temperature, after the checks of both."""
    check_temperature(temperature)
    _check_offset(cosine, positive_offset)
    return cosine / temperature


def widen(x: Tensor) -> Tensor:
    """Float32 of a narrower tensor; the gradient that flows back is kept inside the narrow range."""
    if x.dtype in ZERO_LENGTH:
        return x
    wide = x.float()
    if wide.requires_grad and x.is_floating_point():
        # An eighth of the range, as the gradients of several uses of one tensor are added up.
        limit = torch.finfo(x.dtype).max / 8
        wide.register_hook(lambda gradient: gradient.clamp(-limit, limit))
    return wide


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay zero and get no gradient."""
    # Dividing by the largest entry first keeps the squares of very long and very short vectors in range.
    scale = x.detach().abs().amax(dim=-1, keepdim=True)
    nonzero = ~(scale <= ZERO_LENGTH[x.dtype])  # NaN is not zero: it must show in the result
    x = torch.where(nonzero, x, 0.0) / torch.where(nonzero, scale, 1.0)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(nonzero, length, 1.0)


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def check_keep(keep: Tensor, cosine: Tensor) -> None:
    """Refuse a mask of another shape than the pairs', or not of booleans."""
    check_pairwise("keep", keep, cosine)
    if keep.dtype != torch.bool:
        raise ValueError(f"keep must be boolean, got {keep.dtype}")


def check_pairwise(name: str, value: Tensor, cosine: Tensor) -> None:
    """Refuse a matrix of another shape than the pairs'; the error calls it by name."""
    if value.shape != cosine.shape:
        raise ValueError(
            f"{name} must have shape {tuple(cosine.shape)} (anchors, candidates), got {tuple(value.shape)}"
        )


def _pairwise_products(x: Tensor, y: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, y.dtype)
    with torch.autocast(device_type=x.device.type, enabled=False):
        return x.to(dtype) @ y.to(dtype).T


def _check_matrices(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected matrices of one width, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if len(x) == 0 or len(y) == 0:
        raise ValueError("an empty batch has no loss; leave it out")


def _check_offset(pairwise: Tensor, positive_offset: int) -> None:
    rows, columns = pairwise.shape
    if positive_offset < 0 or rows + positive_offset > columns:
        raise ValueError(
            f"{rows} anchors from candidate {positive_offset} on need as many candidates, from 0 on; got {columns}"
        )
