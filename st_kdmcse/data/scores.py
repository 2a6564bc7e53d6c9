"""Scores of pairs by the teacher: of captions with images and with each other, and what a threshold removes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from st_kdmcse.config import SoftLabel
from st_kdmcse.data.layout import Array, RowNumbers
from st_kdmcse.data.store import FeatureStore

_BLOCK_ROWS = 1024


def true_pair_score(
    store: FeatureStore,
    pair: SoftLabel,
    score: Literal["cosine", "dot"] = "cosine",
    max_images: int = 2000,
    seed: int = 0,
    quantile: float = 0.5,
) -> float | None:
    """A quantile of the scores of true pairs: a negative that scores as high is taken for a false one.

    True pairs are two captions of one image, or a caption and its image. The median is the threshold that "auto"
    stands for; :func:`negatives_removed` tells what it removes.

    Args:
        store: the teacher features.
        pair: which features are compared.
        score: how: cosine, or dot product of the features as stored.
        max_images: how many images to draw, without replacement; all of them where there are fewer.
        seed: seed of the draw.
        quantile: from 0 to 1; of the true pairs, the share 1 - quantile scores at least the result.

    Returns:
        The score; None without a true pair: for two images, or if no image drawn has two captions.

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


def negatives_removed(
    store: FeatureStore,
    pair: SoftLabel,
    threshold: float,
    score: Literal["cosine", "dot"] = "cosine",
    inclusive: bool = True,
    max_images: int = 1000,
    seed: int = 0,
) -> float:
    """The share of negatives that a threshold removes, on a sample.

    Negatives are pairs of captions of different images, as they meet in a batch. One caption of each image drawn is
    compared with all others drawn.

    Args:
        store: the teacher features.
        pair: which features are compared.
        threshold: the score from which a negative leaves.
        score: how: cosine, or dot product of the features as stored.
        inclusive: whether a score that equals the threshold removes the negative.
        max_images: how many images to draw, without replacement; all of them if there are fewer.
        seed: seed of the draws.

    Returns:
        The share, from 0 to 1; 0 for a store of one image, which has no negatives.
    """
    rows, _ = draw_captions(store.image_rows, max_images, np.random.default_rng(seed))
    batch = store.gather(rows)
    features = {"text": batch.text_features, "image": batch.image_features}
    anchors, candidates = (_prepared(features[name], score) for name in pair.split("-"))
    removed = 0
    for start in range(0, len(rows), _BLOCK_ROWS):
        scores = anchors[start : start + _BLOCK_ROWS] @ candidates.T
        hits = scores >= threshold if inclusive else scores > threshold
        removed += int(hits.sum()) - int(np.diagonal(hits, offset=start).sum())
    return removed / max(1, len(rows) * (len(rows) - 1))


class SampledCosines(NamedTuple):
    """Cosines on a sample of one caption an image.

    Attributes:
        images: how many images were drawn.
        own_image: (images,) of a caption with its image.
        other_image: of a caption with another image.
        same_image_captions: of two captions of one image.
        other_captions: of two captions of different images.
        own_image_first: share, from 0 to 1, of the captions that are closer to their image than to any other drawn;
            None for one image.
    """

    images: int
    own_image: npt.NDArray[np.float64]
    other_image: npt.NDArray[np.float64]
    same_image_captions: npt.NDArray[np.float64]
    other_captions: npt.NDArray[np.float64]
    own_image_first: float | None


def sampled_cosines(store: FeatureStore, first: RowNumbers, second: RowNumbers) -> SampledCosines:
    """Compare the features of some captions and images in float64.

    Args:
        store: the teacher features; rows that hold NaN are left out.
        first: a row of each image, see :func:`draw_captions`.
        second: another row of some of the images.
    """
    texts, images, image_rows = unit_features(store, first, skip_damaged=True)
    other_texts, _, other_rows = unit_features(store, second, skip_damaged=True)
    _, here, there = np.intersect1d(image_rows, other_rows, assume_unique=True, return_indices=True)
    cosines = texts @ images.T
    own, others = np.diagonal(cosines), ~np.eye(len(cosines), dtype=bool)
    own_first = None
    if len(cosines) > 1:
        own_first = float((own > np.where(others, cosines, -np.inf).max(axis=1)).mean())
    return SampledCosines(
        len(texts),
        own,
        cosines[others],
        np.einsum("ij,ij->i", texts[here], other_texts[there]),
        (texts @ texts.T)[np.triu_indices(len(texts), k=1)],
        own_first,
    )


def draw_captions(
    image_rows: RowNumbers, max_images: int, generator: np.random.Generator
) -> tuple[RowNumbers, RowNumbers]:
    """A caption of each image drawn, and another caption of those images that have one.

    Args:
        image_rows: (captions,) the image of each caption.
        max_images: how many images to draw, without replacement; all of them if there are fewer.
        generator: draws.

    Returns:
        Row numbers of captions: one of each image, and the second ones.
    """
    images = np.unique(image_rows)
    if len(images) > max_images:
        images = generator.choice(images, max_images, replace=False)
    rows = generator.permutation(np.flatnonzero(np.isin(image_rows, images)))
    rows = rows[np.argsort(image_rows[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(image_rows[rows], prepend=-1))
    several = np.diff(starts, append=len(rows)) > 1
    return rows[starts], rows[starts[several] + 1]


def draw_images(store: FeatureStore, max_images: int, seed: int) -> RowNumbers:
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


def unit_features(store: FeatureStore, rows: RowNumbers, skip_damaged: bool = False) -> tuple[Array, Array, RowNumbers]:
    """Features of captions and of their images in float64, of length 1.

    Args:
        store: the teacher features.
        rows: n row numbers.
        skip_damaged: leave out rows that hold NaN or infinite values.

    Returns:
        (m, T) of the texts, (m, T) of the images, and the m image rows; m is n if none is left out.

    Raises:
        ValueError: if features are not finite, unless they are left out; names the row.
    """
    if not rows.size:
        return np.empty((0, store.dim)), np.empty((0, store.dim)), rows
    batch = store.gather_unchecked(rows) if skip_damaged else store.gather(rows)
    finite = np.isfinite(batch.text_features).all(axis=1) & np.isfinite(batch.image_features).all(axis=1)
    texts, images = (unit_rows(each[finite], np.float64) for each in (batch.text_features, batch.image_features))
    return texts, images, batch.image_rows[finite]


def unit_rows(features: Array, dtype: type[np.floating[Any]] = np.float32) -> Array:
    """(n, T) features in float32, or another type, with rows of length 1; a row of zeros stays one."""
    wide = features.astype(dtype)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(dtype).tiny))


def _prepared(features: Array, score: str) -> Array:
    return features.astype(np.float32) if score == "dot" else unit_rows(features)
