"""Images by one teacher, captions by another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from st_kdmcse.teachers.base import Pixels, Preprocess, Teacher


class CombinedTeacher(Teacher):
    """Two teachers as one: features of images come from the first, those of texts from the second.

    The narrower features are padded with zeros, which changes neither their dot products nor their cosines. Images and
    texts cannot be compared with each other.

    Args:
        images: teacher of the images.
        texts: teacher of the texts.

    Raises:
        ValueError: if the teacher of the images knows no images.
    """

    shared_space = False

    def __init__(self, images: Teacher, texts: Teacher) -> None:
        if not images.knows_images:
            raise ValueError(f"the teacher {images.name} knows no images: it can be the teacher of the texts only")
        self.name = f"{images.name} + {texts.name}"
        self.dim = max(images.dim, texts.dim)
        self.device = images.device
        self.batch_size = images.batch_size
        self.precision = " + ".join(dict.fromkeys([images.precision, texts.precision]))
        self._images = images
        self._texts = texts

    @property
    def preprocess(self) -> Preprocess:
        """That of the teacher of the images."""
        return self._images.preprocess

    def encode_pixels(self, pixels: Pixels) -> torch.Tensor:
        """See :meth:`Teacher.encode_pixels`."""
        return functional.pad(self._images.encode_pixels(pixels), (0, self.dim - self._images.dim))

    def encode_texts(self, texts: Sequence[str], show_progress_bar: bool | None = True) -> npt.NDArray[np.float32]:
        """See :meth:`Teacher.encode_texts`."""
        features = self._texts.encode_texts(texts, show_progress_bar)
        return np.pad(features, ((0, 0), (0, self.dim - self._texts.dim)))
