"""Thresholds for the filter of false negatives, read off the teacher features."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from st_kdmcse.data.layout import Array
from st_kdmcse.data.store import FeatureStore


def teacher_thresholds(store: FeatureStore, max_images: int = 2000, seed: int = 0) -> tuple[float | None, float]:
    """Thresholds for the false-negative filter, read off the true pairs of a store.

    A negative that scores at least as high as the median true pair is taken for a false negative.

    Args:
        store: the teacher features.
        max_images: how many images to draw, without replacement; all of them where there are fewer.
        seed: seed of the draw.

    Returns:
        The text threshold: the median cosine between two captions of the same image, None if no image drawn has two.
        The image threshold: the median cosine of a caption with its own image.
    """
    images = np.unique(store.image_rows)
    if len(images) > max_images:
        images = np.random.default_rng(seed).choice(images, max_images, replace=False)
    rows = np.flatnonzero(np.isin(store.image_rows, images))
    rows = rows[np.argsort(store.image_rows[rows], kind="stable")]
    text_cosines, image_cosines = [], []
    for of_image in np.split(rows, np.flatnonzero(np.diff(store.image_rows[rows])) + 1):
        batch = store.gather(of_image)
        texts = _unit(batch.text_features)
        image_cosines.append(texts @ _unit(batch.image_features)[0])
        text_cosines.append((texts @ texts.T)[np.triu_indices(len(texts), k=1)])
    between_texts = np.concatenate(text_cosines)
    text_threshold = float(np.median(between_texts)) if between_texts.size else None
    return text_threshold, float(np.median(np.concatenate(image_cosines)))


def _unit(features: Array) -> npt.NDArray[np.float32]:
    features = features.astype(np.float32)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, np.finfo(np.float32).tiny)  # type: ignore[no-any-return]
