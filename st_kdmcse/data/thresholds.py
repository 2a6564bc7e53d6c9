"""Thresholds for the filter of false negatives, read off the teacher features."""

from __future__ import annotations

from typing import Literal

import numpy as np

from st_kdmcse.data.layout import Array
from st_kdmcse.data.store import FeatureStore


def true_pair_score(
    store: FeatureStore,
    pair: Literal["text-text", "text-image", "image-text", "image-image"],
    score: Literal["cosine", "dot"] = "cosine",
    max_images: int = 2000,
    seed: int = 0,
) -> float | None:
    """The median score of true pairs: a negative that scores as high is taken for a false one.

    True pairs are two captions of one image, or a caption and its image.

    Args:
        store: the teacher features.
        pair: which features are compared.
        score: how: cosine, or dot product of the features as stored.
        max_images: how many images to draw, without replacement; all of them where there are fewer.
        seed: seed of the draw.

    Returns:
        The score; None where there is no true pair: for two images, or where no image drawn has two captions.
    """
    if pair == "image-image":
        return None
    images = np.unique(store.image_rows)
    if len(images) > max_images:
        images = np.random.default_rng(seed).choice(images, max_images, replace=False)
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
    return float(np.median(found)) if found.size else None


def _prepared(features: Array, score: str) -> Array:
    wide = features.astype(np.float32)
    if score == "dot":
        return wide
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(np.float32).tiny))
