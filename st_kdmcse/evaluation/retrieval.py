"""Image-text retrieval in both directions, by Karpathy's protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt
from sentence_transformers import SentenceTransformer

from st_kdmcse.data.layout import RowNumbers
from st_kdmcse.data.readers import ImageCaptionReader
from st_kdmcse.encoding import encode_distinct
from st_kdmcse.precision import Precision
from st_kdmcse.teachers.sentence_transformer import encode_images

Vectors = npt.NDArray[np.float32]

CUTOFFS = (1, 5, 10)
"""The k of recall@k."""
CAPTIONS = 5
"""Captions of an image that count in Karpathy's protocol: the first ones."""
DIRECTIONS = ("text to image", "image to text")

_SCORES_AT_A_TIME = 2**22  # 16 MiB in float32


@dataclass(frozen=True)
class Retrieval:
    """One direction of a retrieval.

    Attributes:
        queries: their number, of all folds.
        candidates: their number, of a fold.
        recall: by k, the share of queries, in percent, with a right candidate among the k nearest.
        chance: by k, what a random order would give, in percent.
        median_rank: of the nearest right candidate; 1 is the best.
    """

    queries: int
    candidates: int
    recall: dict[int, float]
    chance: dict[int, float]
    median_rank: float

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        return asdict(self)


def evaluate_retrieval(
    texts: npt.ArrayLike, images: npt.ArrayLike, image_rows: RowNumbers | Sequence[int], folds: int = 1
) -> dict[str, Retrieval]:
    """Find images by captions and captions by images, by cosine.

    Candidates with the score of the right one rank before it, so that a model which finds all alike has the last rank.
    Scores are computed in parts: memory does not grow with the product of captions and images.

    Args:
        texts: (N, d) embeddings of captions.
        images: (M, d) embeddings of images.
        image_rows: (N,) the image of each caption.
        folds: parts of as many successive images, each searched by itself, whose results are averaged: 5 for the 1K
            protocol of MS-COCO's 5,000 test images (Karpathy and Fei-Fei, CVPR 2015).

    Returns:
        The results by :data:`DIRECTIONS`.

    Raises:
        ValueError: for shapes that do not fit, embeddings that are not finite, an image without a caption, or folds
            that are not of one size.
    """
    texts, images = _unit("texts", texts), _unit("images", images)
    rows = np.asarray(image_rows, dtype=np.int64)
    if texts.shape[1] != images.shape[1] or rows.shape != (len(texts),):
        raise ValueError(
            f"expected (N, d) texts, (M, d) images and (N,) image rows, got shapes {texts.shape}, {images.shape} and "
            f"{rows.shape}"
        )
    if len(rows) and not (rows.min() >= 0 and rows.max() < len(images)):
        raise ValueError(f"image rows must be from 0 to {len(images) - 1}, got {rows.min()} to {rows.max()}")
    captions = np.bincount(rows, minlength=len(images))
    if not len(images) or (captions == 0).any():
        raise ValueError(f"image {int(captions.argmin())} has no caption: leave it out" if len(images) else "no images")
    _check_folds(len(images), folds)
    size = len(images) // folds
    parts: list[tuple[Retrieval, Retrieval]] = []
    for start in range(0, len(images), size):
        inside = np.flatnonzero((rows >= start) & (rows < start + size))
        parts.append(_both_directions(texts[inside], images[start : start + size], rows[inside] - start))
    return {name: _mean(results) for name, results in zip(DIRECTIONS, zip(*parts, strict=True), strict=True)}


def evaluate_images(
    model: SentenceTransformer,
    reader: ImageCaptionReader,
    folds: int = 1,
    show_progress_bar: bool | None = None,
    precision: Precision = "float32",
) -> dict[str, Retrieval]:
    """Find images by captions and captions by images, with a model of both, such as one of ``st-kdmcse export``.

    Args:
        model: a sentence-transformers model that takes images.
        reader: images with captions, of which the first :data:`CAPTIONS` of each image count.
        folds: as for :func:`evaluate_retrieval`.
        show_progress_bar: None shows one in a terminal, after two seconds.
        precision: as for :func:`~st_kdmcse.encoding.encode_distinct`.

    Returns:
        The results by :data:`DIRECTIONS`.

    Raises:
        ValueError: if the model takes no images, the data set holds none or has a bad row, an image cannot be decoded,
            or the folds are not of one size; names it.
    """
    if not model.supports("image"):
        raise ValueError(
            "the model takes no images: give one of sentences and images, such as st-kdmcse export makes of a run, or "
            "its run with `features`"
        )
    records = list(reader)
    images = [record.image for record in records if record.image is not None]
    if len(images) < len(records):
        raise ValueError(f"{reader.name} holds no images: give their folder as `images`")
    _check_folds(len(images), folds)
    captions = [caption for record in records for caption in record.captions[:CAPTIONS]]
    rows = [row for row, record in enumerate(records) for _ in record.captions[:CAPTIONS]]
    pictures = encode_images(model, images, show_progress_bar, precision)
    texts = encode_distinct(model, captions, show_progress_bar=show_progress_bar, precision=precision)(captions)
    return evaluate_retrieval(texts, pictures, rows, folds)


def _check_folds(images: int, folds: int) -> None:
    if folds < 1 or images % folds or not images:
        raise ValueError(f"{images:,} images cannot be divided into {folds} parts of one size")


def _both_directions(texts: Vectors, images: Vectors, rows: RowNumbers) -> tuple[Retrieval, Retrieval]:
    to_image = np.empty(len(texts), dtype=np.int64)
    best_text = np.full(len(images), -np.inf, dtype=np.float32)
    step = max(1, _SCORES_AT_A_TIME // len(images))
    blocks = [slice(start, start + step) for start in range(0, len(texts), step)]
    for block in blocks:
        scores = texts[block] @ images.T
        own = np.take_along_axis(scores, rows[block, None], axis=1)
        to_image[block] = (scores >= own).sum(axis=1)
        np.maximum.at(best_text, rows[block], own[:, 0])
    # Of an image, the captions of others that are as near as its nearest own one.
    nearer = np.zeros(len(images), dtype=np.int64)
    for block in blocks:
        scores = texts[block] @ images.T
        nearer += ((scores >= best_text) & (rows[block, None] != np.arange(len(images)))).sum(axis=0)
    right = np.bincount(rows, minlength=len(images))
    return (
        _summary(to_image, len(images), np.ones(len(texts), dtype=np.int64)),
        _summary(1 + nearer, len(texts), right),
    )


def _summary(ranks: npt.NDArray[np.int64], candidates: int, right: npt.NDArray[np.int64]) -> Retrieval:
    return Retrieval(
        len(ranks),
        candidates,
        {k: 100 * float((ranks <= k).mean()) for k in CUTOFFS},
        {k: 100 * float(np.mean([_chance(candidates, int(each), k) for each in right])) for k in CUTOFFS},
        float(np.median(ranks)),
    )


def _chance(candidates: int, right: int, k: int) -> float:
    """The probability that one of the right candidates is among k that are drawn."""
    drawn = min(k, candidates)
    return 1 - comb(candidates - right, drawn) / comb(candidates, drawn)


def _mean(results: Sequence[Retrieval]) -> Retrieval:
    return Retrieval(
        sum(result.queries for result in results),
        round(float(np.mean([result.candidates for result in results]))),
        {k: float(np.mean([result.recall[k] for result in results])) for k in CUTOFFS},
        {k: float(np.mean([result.chance[k] for result in results])) for k in CUTOFFS},
        float(np.mean([result.median_rank for result in results])),
    )


def _unit(name: str, vectors: npt.ArrayLike) -> Vectors:
    """(n, d) float32 rows of length 1; a zero row stays zero."""
    matrix = np.asarray(vectors, dtype=np.float32)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {matrix.shape}")
    broken = ~np.isfinite(matrix).all(axis=1)
    if broken.any():
        raise ValueError(f"{name}, row {int(broken.argmax())}: the embedding is not finite")
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.asarray(matrix / np.maximum(lengths, np.finfo(np.float32).tiny), dtype=np.float32)


def retrieval_table(results: Mapping[str, Mapping[str, Retrieval]]) -> str:
    """Recall in percent and median rank: a row a model, and chance.

    Args:
        results: by model, what :func:`evaluate_retrieval` returns.
    """
    width = max(map(len, (*results, "chance")))
    lines = []
    for direction in DIRECTIONS:
        of_models = {name: result[direction] for name, result in results.items()}
        first = next(iter(of_models.values()))
        lines += [f"{direction}: {first.queries:,} queries, {first.candidates:,} candidates"]
        lines += [f"  {'':{width}}" + "".join(f"{f'R@{k}':>8}" for k in CUTOFFS) + "  median rank"]
        for name, each in of_models.items():
            recall = "".join(f"{each.recall[k]:8.2f}" for k in CUTOFFS)
            lines.append(f"  {name:{width}}{recall}{each.median_rank:13.1f}")
        lines.append(f"  {'chance':{width}}" + "".join(f"{first.chance[k]:8.2f}" for k in CUTOFFS))
    return "\n".join(lines)
