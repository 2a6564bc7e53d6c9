"""Images decoded by worker processes, with the errors of those that cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from st_kdmcse.data.images import ImageError, ImageSource
from st_kdmcse.teachers.base import Pixels, Teacher, stack_pixels, try_load


class DecodedImages(Dataset[Any]):
    """Decodes images: its indices are the images themselves."""

    def __init__(self, teacher: Teacher) -> None:
        self.preprocess = teacher.preprocess

    def __getitem__(self, source: ImageSource) -> Tensor | tuple[str, str]:
        loaded = try_load(source, self.preprocess)
        return (loaded.kind, str(loaded)) if isinstance(loaded, ImageError) else loaded


def collate_images(items: Sequence[Tensor | tuple[str, str]]) -> tuple[Pixels, list[tuple[int, str, str]], int]:
    """The pixels of the readable images, the errors of the others by position, and the number of all."""
    pixels = [item for item in items if isinstance(item, Tensor)]
    errors = [(position, *item) for position, item in enumerate(items) if not isinstance(item, Tensor)]
    return stack_pixels(pixels) if pixels else torch.empty(0), errors, len(items)


def named_worker_errors(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader; the death of a worker process is an error with its remedy."""
    try:
        yield from loader
    except RuntimeError as error:
        if not re.search("exited unexpectedly|killed by signal", str(error)):
            raise
        raise ValueError(
            f"a process that decodes images died ({error}): there may be too little (shared) memory: "
            "set `workers` to fewer"
        ) from error
