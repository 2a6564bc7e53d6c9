"""Heads that start aligned: teacher heads from principal components, the grounding head by ridge regression."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import RidgeCV
from torch import nn

from st_kdmcse.encoding import encode_distinct
from st_kdmcse.losses.grounded import GroundedLoss

HeadInit = Literal["random", "ridge"]

_MOST_CAPTIONS = 10_000
_REACH = 0.5  # of the largest output before tanh, which is linear up to 8 % there
_SMALL = 0.05  # length of the rows of a teacher head that have no axis, where an axis has 1
_PENALTIES = np.logspace(-4, 1, 6)  # of the ridge regressions, for inputs of variance 1 and the mean error

_Matrix = npt.NDArray[np.float64]


def align_heads(
    loss: GroundedLoss, rows: npt.NDArray[np.int64] | None = None, show_progress_bar: bool | None = None
) -> None:
    """Set the grounding head and the teacher heads so that captions lie near their images from the first step on.

    The teacher heads project on the principal components of the teacher features, each modality about its own mean,
    which keeps the teacher's similarities. The grounding head is a ridge regression from the student's embeddings
    onto these projections, the mean over the modalities. Where images and texts have two teachers, the text head is a
    ridge regression from its features onto the projections of the images. Penalties are chosen by leaving one out.

    Where the projection is wider than the features, the rest of the teacher heads stays as it was drawn, but small, and
    that of the grounding head is 0. Nothing else is random, and the state of random generators stays as it is.

    Args:
        loss: with a feature store; its heads are changed in place.
        rows: (n,) rows of the store to learn from, evenly thinned out to at most 10,000; None takes all.
        show_progress_bar: over the captions that are encoded; None shows one in a terminal, after two seconds.

    Raises:
        ValueError: if the loss has no feature store, or there are less than two rows.
    """
    store = loss.features
    if store is None:
        raise ValueError(f"{type(loss).__name__} has no feature store to align its heads with: give `features`")
    rows = np.arange(len(store)) if rows is None else rows
    if len(rows) < 2:
        raise ValueError(f"heads are aligned with at least two captions, got {len(rows)}")
    rows = rows[np.linspace(0, len(rows) - 1, min(_MOST_CAPTIONS, len(rows))).astype(np.int64)]
    captions = [store.caption(int(row)) for row in rows]
    embeddings = encode_distinct(loss.model, captions, show_progress_bar=show_progress_bar)(captions).astype(np.float64)
    batch = store.gather(rows)
    both = {"image": batch.image_features, "text": batch.text_features}
    features = {name: both[name].astype(np.float64) for name in loss.modalities}
    means = {name: values.mean(axis=0) for name, values in features.items()}
    centred = {name: values - means[name] for name, values in features.items()}

    width = loss.config.projection_dim
    if store.shared_space or len(features) == 1:
        shared = _principal_axes(np.concatenate(list(centred.values())), width)
        axes = dict.fromkeys(features, shared)
    else:
        first = _principal_axes(centred["image"], width)
        axes = {"image": first, "text": _ridge(centred["text"], centred["image"] @ first.T)[0]}
    projected = {name: values @ axes[name].T for name, values in centred.items()}
    scale = _REACH / max(float(np.abs(values).max()) for values in projected.values())
    for name in features:
        weights, _ = loss.heads[f"teacher_{name}"].parameters()
        drawn = weights.detach()[len(axes[name]) :].cpu().double().numpy()
        lengths = np.linalg.norm(drawn, axis=1, keepdims=True)
        weight = scale * np.concatenate([axes[name], _SMALL * drawn / lengths])
        _set(loss.heads[f"teacher_{name}"], weight, -weight @ means[name])
    with torch.no_grad():
        for parameter in loss.heads["grounding"].parameters():
            parameter.zero_()
    _set(loss.heads["grounding"], *_ridge(embeddings, scale * np.mean(list(projected.values()), axis=0)))


def _principal_axes(centred: _Matrix, most: int) -> _Matrix:
    """(k, T) orthonormal rows, those of the largest variance first; signs are fixed."""
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors.T[::-1][:most]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1, keepdims=True), axis=1)
    return np.asarray(axes * np.sign(largest))


def _ridge(inputs: _Matrix, targets: _Matrix) -> tuple[_Matrix, _Matrix]:
    """(k, D) weights and (k,) biases of the regression of (n, k) targets on (n, D) inputs."""
    spread = float(inputs.std(axis=0).mean()) or 1.0
    fitted = RidgeCV(alphas=len(inputs) * _PENALTIES).fit(inputs / spread, targets)
    return np.atleast_2d(fitted.coef_) / spread, np.atleast_1d(fitted.intercept_)


def _set(head: nn.Module, weight: _Matrix, bias: _Matrix) -> None:
    """Set the first rows of a head."""
    with torch.no_grad():
        for parameter, values in zip(head.parameters(), (weight, bias), strict=True):
            parameter[: len(values)].copy_(torch.from_numpy(values))
