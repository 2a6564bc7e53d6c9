"""A feature store with the wrong pictures, as a control: what a student learns from it, it does not learn from them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from st_kdmcse.data.layout import RowNumbers
from st_kdmcse.data.store import FeatureStore


class PermutedFeatureStore(FeatureStore):
    """A feature store in which the captions of each image have the features of another image.

    Captions of one image still share one. Files, checksum and ids are those of the store.

    Args:
        path: folder of the store, of at least two images.
        seed: of the permutation.
    """

    def __init__(self, path: str | Path, seed: int) -> None:
        super().__init__(path)
        self._seed = seed

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Path, int]]:  # type: ignore[override]
        return PermutedFeatureStore, (self._path, self._seed)

    @cached_property
    def _row_numbers(self) -> tuple[RowNumbers, RowNumbers]:
        image_rows, text_rows = super()._row_numbers
        cycle = np.random.default_rng(self._seed).permutation(self.num_images)
        other = np.empty_like(cycle)
        other[cycle] = np.roll(cycle, 1)  # a single cycle: no image keeps its own features
        return other[image_rows], text_rows
