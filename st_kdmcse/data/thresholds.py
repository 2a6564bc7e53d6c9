"""Thresholds for the filter of false negatives, read off the teacher features."""

from __future__ import annotations

from typing import Literal

import numpy as np

from st_kdmcse.data.layout import Array, Rows
from st_kdmcse.data.store import FeatureStore


def true_pair_score(
    store: FeatureStore,
    pair: Literal["text-text", "text-image", "image-text", "image-image"],
    score: Literal["cosine", "dot"] = "cosine",
    max_images: int = 2000,
    seed: int = 0,
    quantile: float = 0.5,
) -> float | None:
    """A quantile of the scores of true pairs: a negative that scores as high is taken for a false one.

    True pairs are two captions of one image, or a caption and its image. The median is the threshold that "auto"
    stands for; :func:`~st_kdmcse.evaluation.threshold_statistics.threshold_statistics` shows what it removes.

    Args:
        store: the teacher features.
        pair: which features are compared.
        score: how: cosine, or dot product of the features as stored.
        max_images: how many images to draw, without replacement; all of them where there are fewer.
        seed: seed of the draw.
        quantile: from 0 to 1; of the true pairs, the share 1 - quantile scores at least the result.

    Returns:
        The score; None where there is no true pair: for two images, or where no image drawn has two captions.

    Raises:
        ValueError: if ``quantile`` is not from 0 to 1.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile is {quantile}, expected a number from 0 to 1")
    if pair == "image-image":
        return None
    images = draw_images(store, max_images, seed)
    rows = np.flatnonzero(np.isin(store.image_rows, images))
    rows = rows[np.argsort(store.image_rows[rows], kind="stable")]
    scores = []
    for of_image in np.split(rows, np.flatnonzero(np.diff(store.image_rows[rows])) + 1):
        batch = store.gather(of_image)
        texts = _prepared(batch.text_features, score)
        if pair == "text-text":
            scores.append((texts @ texts.T)[np.triu_indices(len(texts), k=1)])
        else:
            scores.append(texts @ _prepared(batch.image_features, score)[0])
    found = np.concatenate(scores)
    return float(np.quantile(found, quantile)) if found.size else None


def draw_images(store: FeatureStore, max_images: int, seed: int) -> Rows:
    """Image rows of a store, without replacement, among the images that have a caption.

    Args:
        store: the teacher features.
        max_images: how many; all of them where there are fewer.
        seed: seed of the draw.
    """
    images = np.unique(store.image_rows)
    if len(images) <= max_images:
        return images
    return np.random.default_rng(seed).choice(images, max_images, replace=False)


def unit_rows(features: Array) -> Array:
    """(n, T) features in float32 with rows of length 1; a row of zeros stays one."""
    wide = features.astype(np.float32)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(np.float32).tiny))


def _prepared(features: Array, score: str) -> Array:
    return features.astype(np.float32) if score == "dot" else unit_rows(features)
