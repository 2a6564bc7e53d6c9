"""Teacher features in the memory of a device, gathered there: no step waits for a copy."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from st_kdmcse.data.layout import IMAGES, NOT_FINITE, TEXTS, Array, RowNumbers
from st_kdmcse.data.store import FeatureStore

logger = logging.getLogger(__name__)

_SHARE_OF_FREE_MEMORY = 0.25


class ResidentFeatures:
    """A copy of a feature store on a device.

    Args:
        store: the features.
        device: where to.

    Raises:
        ValueError: if features are not finite; names the file and the row.
    """

    def __init__(self, store: FeatureStore, device: torch.device) -> None:
        self.device = device
        self._images, self._texts, self._image_rows, self._text_rows = (
            torch.from_numpy(np.array(array)).to(device) for array in _arrays(store)
        )
        for name, features in ((IMAGES, self._images), (TEXTS, self._texts)):
            if not features.isfinite().all():
                bad = int((~features.isfinite().all(dim=1)).nonzero()[0])
                raise ValueError(f"{store.path / name}, row {bad}: {NOT_FINITE}")

    @classmethod
    def fitting(cls, store: FeatureStore, device: torch.device) -> ResidentFeatures | None:
        """The copy on a GPU, if it takes no more than a quarter of the memory that is free there; else None."""
        if device.type != "cuda":
            return None
        size = sum(array.nbytes for array in _arrays(store))
        free, _ = torch.cuda.mem_get_info(device)
        if size > _SHARE_OF_FREE_MEMORY * free:
            logger.info("teacher features of %.1f GiB stay on disk, and are copied batch by batch", size / 2**30)
            return None
        return cls(store, device)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of some rows.

        Args:
            rows: (B,) integers of the store's rows; on a GPU it is not checked that they are.

        Returns:
            Image and text features (B, T) in the dtype of the store, and the image rows (B,).
        """
        rows = rows.to(self.device, non_blocking=True)
        image_rows = self._image_rows[rows]
        return self._images[image_rows], self._texts[self._text_rows[rows]], image_rows


def _arrays(store: FeatureStore) -> tuple[Array, Array, RowNumbers, RowNumbers]:
    return store.image_features, store.text_features, store.image_rows, store.text_rows
