"""The statistics of a teacher's scores over a feature store: computed once, and kept with the store."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from st_kdmcse.config import SCORE_KINDS
from st_kdmcse.data.layout import STATISTICS, RowNumbers
from st_kdmcse.data.scores import draw_captions, unit_features
from st_kdmcse.data.store import FeatureStore
from st_kdmcse.files import manifest_checksum, read_json, write_json
from st_kdmcse.functional import ScoreStatistics, score_statistics

logger = logging.getLogger(__name__)

_FORMAT, _VERSION = "st_kdmcse.score_statistics", 2


def store_statistics(
    store: FeatureStore, pairs: int = 100_000, max_images: int = 8192, seed: int = 0
) -> ScoreStatistics:
    """The statistics of the scores of a store, from ``statistics.json`` in its folder where they are kept already.

    They are computed on a sample that is the same at each call, and kept. A file that is damaged, or of another content
    or sample, is replaced. In a folder without a manifest, or one that cannot be written to, nothing is kept.

    Args:
        store: the teacher features.
        pairs: about how many pairs of different images to compare.
        max_images: how many images to draw for them, with a caption each; all of them where there are fewer.
        seed: seed of the draws.

    Returns:
        In float64, of the kinds of :data:`~st_kdmcse.config.SCORE_KINDS`.

    Raises:
        ValueError: if the store has features of a single image only.
    """
    if "checksum" not in store.manifest:
        return _computed(store, pairs, max_images, seed)
    key = {
        "format": _FORMAT,
        "version": _VERSION,
        "store": store.checksum,
        "pairs": pairs,
        "max_images": max_images,
        "seed": seed,
    }
    path = store.path / STATISTICS
    try:
        kept = read_json(path, "it is computed again")
        if {name: kept.get(name) for name in key} == key:
            if kept.get("checksum") != manifest_checksum(kept):
                raise ValueError(f"{path} was edited or damaged: it is computed again")
            return _parsed(path, kept)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning("%s", error)
    statistics = _computed(store, pairs, max_images, seed)
    try:
        content = {**key, **{name: value.tolist() for name, value in statistics._asdict().items()}}
        write_json(path, {**content, "checksum": manifest_checksum(content)})
    except OSError as error:
        logger.info("the statistics of %s are not kept: %s", store.path, error)
    return statistics


def _computed(store: FeatureStore, pairs: int, max_images: int, seed: int) -> ScoreStatistics:
    """Each caption drawn with some of the others, as many at a time as were drawn."""
    generator = np.random.default_rng(seed)
    first, second = draw_captions(store.image_rows, max_images, generator)
    texts, images, image_rows = unit_features(store, first)
    count = len(texts)
    if count < 2:
        raise ValueError(
            f"{store.path} has features of {count} image: statistics of pairs of different images need two"
        )
    # Steps of at most half of the way around: each pair is met once.
    steps = 1 + generator.permutation(max(1, (count - 1) // 2))[: -(-pairs // count)]
    scores = np.concatenate([_scores(texts, images, int(step)) for step in steps], axis=1)
    return score_statistics(torch.from_numpy(scores), torch.from_numpy(_same_image(store, texts, image_rows, second)))


def _scores(texts: Any, images: Any, step: int) -> Any:
    """(kinds, n) scores of each row with the one ``step`` rows behind it."""
    other_texts, other_images = np.roll(texts, step, axis=0), np.roll(images, step, axis=0)
    text_image, image_text = _dots(texts, other_images), _dots(images, other_texts)
    cross = (text_image + image_text) / 2
    return np.stack([_dots(texts, other_texts), cross, _dots(images, other_images), text_image])


def _same_image(store: FeatureStore, texts: Any, image_rows: RowNumbers, second: RowNumbers) -> Any:
    """Text-text scores of the captions with a second caption of their image."""
    others, _, other_rows = unit_features(store, second)
    _, here, there = np.intersect1d(image_rows, other_rows, assume_unique=True, return_indices=True)
    return _dots(texts[here], others[there])


def _dots(x: Any, y: Any) -> Any:
    return np.einsum("ij,ij->i", x, y)


def _parsed(path: Path, kept: dict[str, Any]) -> ScoreStatistics:
    """The statistics in a file of them; ValueError if it does not hold them."""
    try:
        values = [torch.tensor(kept[name], dtype=torch.float64) for name in ScoreStatistics._fields]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): it is computed again") from error
    statistics, kinds = ScoreStatistics(*values), len(SCORE_KINDS)
    shapes = [tuple(value.shape) for value in statistics]
    steps = shapes[2][1] if len(shapes[2]) == 2 else 0
    finite = all(value.isfinite().all() for value in values)
    if shapes != [(kinds,), (kinds,), (kinds, steps), (kinds, kinds), (), ()] or steps < 2 or not finite:
        raise ValueError(f"{path} is damaged (its arrays have shapes {shapes}): it is computed again")
    return statistics
