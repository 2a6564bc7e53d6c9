"""TEMPORARY stand-in until the data room is merged."""

from __future__ import annotations

from typing import Literal

import numpy as np

from st_kdmcse.data.store import FeatureStore
from st_kdmcse.data.thresholds import draw_images, unit_rows


def negatives_removed(
    store: FeatureStore,
    pair: str,
    threshold: float,
    score: Literal["cosine", "dot"] = "cosine",
    inclusive: bool = True,
    max_images: int = 1000,
    seed: int = 0,
) -> float:
    """X."""
    images = draw_images(store, max_images, seed)
    rows = np.flatnonzero(np.isin(store.image_rows, images))
    batch = store.gather(rows)
    f = {"image": batch.image_features, "text": batch.text_features}
    a, b = (f[k].astype(np.float32) if score == "dot" else unit_rows(f[k]) for k in pair.split("-"))
    s = a @ b.T
    neg = batch.image_rows[:, None] != batch.image_rows[None]
    hit = s >= threshold if inclusive else s > threshold
    return float((hit & neg).sum() / neg.sum())
