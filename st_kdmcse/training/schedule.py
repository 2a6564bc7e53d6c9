"""Algorithm 1: at which steps a batch comes from the sentences, at which from the image-caption pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler
from torch.utils.data import BatchSampler, ConcatDataset

ROW_COLUMN = "row"
"""The dataset column that makes a source one of pairs: the row of each caption in a feature store."""


def pair_interval(sentences: int, pairs: int, every: int | None = None) -> int:
    """The p of Algorithm 1: every p-th step is a pair batch.

    Args:
        sentences: |D|.
        pairs: the number of image-caption pairs.
        every: a p to use instead of the computed one.

    Returns:
        ceil(sentences / pairs), or ``every``; at least 2, so that both sources are used.

    Raises:
        ValueError: if ``every`` is smaller than 2, or a source is empty.

    Example:
        >>> pair_interval(1_000_000, 29_783)
        34
    """
    if sentences < 1 or pairs < 1:
        raise ValueError(f"both sources need rows, got {sentences} sentences and {pairs} pairs")
    if every is None:
        return max(2, -(-sentences // pairs))
    if every < 2:
        raise ValueError(f"`pair_every` must be at least 2 (a pair batch at every second step), got {every}")
    return every


def pair_rows(pairs: Dataset) -> npt.NDArray[np.int64]:
    """The row of each pair in the feature store.

    Args:
        pairs: a dataset with the column :data:`ROW_COLUMN`.
    """
    rows = pairs.with_format("numpy").select_columns([ROW_COLUMN])[:][ROW_COLUMN]
    return np.asarray(rows, dtype=np.int64)


class StepRatioBatchSampler(MultiDatasetDefaultBatchSampler):
    """Batches of one or two sources, of which the second supplies every p-th step.

    An epoch ends when each source has been passed over at least once; the one that runs out earlier is shuffled again
    and goes on. With ``captions_per_image``, a pass deals out the captions of each image in groups of that size, in
    random order; the last group of an image has what is left, and a group that the end of a batch cuts goes on in the
    next one. A batch has one group of an image, but for the few in which one round of groups ends and the next begins.
    Incomplete batches are left out: a contrastive loss over fewer negatives is another loss, and processes
    must agree on the shape. (A source smaller than a batch gives batches of its size.) The order is a function of
    seed and epoch alone.

    Args:
        dataset: the sources, concatenated: sentences, or sentences and then pairs in any order.
        batch_samplers: one a source, of which the batch size is taken.
        generator: unused, part of the interface.
        seed: of the order.
        pair_every: p, the interval of pair batches; None computes it.
        run_length: how many batches a step takes: processes x gradient accumulation. They all come from one source,
            so that processes never disagree about the terms of the loss.
        image_rows: the image of each pair, in the order of their source; needed by ``captions_per_image``.
        captions_per_image: captions of an image that a pair batch draws together; None or 1 draws captions one by one.

    Raises:
        ValueError: for more than one source of a kind, a source that does not fill a batch where a step takes several,
            or ``captions_per_image`` below 1 or without an image for each pair.
    """

    def __init__(
        self,
        dataset: ConcatDataset[Any],
        batch_samplers: Sequence[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int = 0,
        pair_every: int | None = None,
        run_length: int = 1,
        image_rows: npt.NDArray[np.int64] | None = None,
        captions_per_image: int | None = None,
    ) -> None:
        super().__init__(dataset, batch_samplers=list(batch_samplers), generator=generator, seed=seed)
        self.run_length = run_length
        self.sizes: list[int] = [len(source) for source in dataset.datasets]  # type: ignore[arg-type]
        kinds = [ROW_COLUMN in source.column_names for source in dataset.datasets]  # type: ignore[attr-defined]
        if kinds.count(True) > 1 or kinds.count(False) > 1:
            raise ValueError(
                f"the schedule takes one source of sentences and one of pairs (with a column {ROW_COLUMN!r}), got "
                f"{kinds.count(False)} and {kinds.count(True)}: join them with datasets.concatenate_datasets"
            )
        for size in self.sizes:
            if size == 0 or (size < self.batch_size and run_length > 1):
                raise ValueError(f"a source of {size} rows does not fill a batch of {self.batch_size}")
        self.pair_source = kinds.index(True) if True in kinds else None
        self.text_source = kinds.index(False) if False in kinds else None
        self.pair_every: int | None = None
        if self.pair_source is not None and self.text_source is not None:
            self.pair_every = pair_interval(self.sizes[self.text_source], self.sizes[self.pair_source], pair_every)
        self.captions_per_image = captions_per_image or 1
        self.image_rows = image_rows
        if self.captions_per_image < 1:
            raise ValueError(f"`captions_per_image_in_batch` must be at least 1, got {captions_per_image}")
        if self.captions_per_image > 1 and self.pair_source is not None:
            images = 0 if image_rows is None else len(image_rows)
            if images != self.sizes[self.pair_source]:
                raise ValueError(f"there are {images} images for {self.sizes[self.pair_source]} pairs")

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of indices into the concatenation, in runs of ``run_length``."""
        streams = [self._stream(source) for source in range(len(self.sizes))]
        for step in range(self.steps):
            stream = streams[self._source(step)]
            for _ in range(self.run_length):
                yield next(stream)

    def __len__(self) -> int:
        return self.steps * self.run_length

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        # A source needs `passes` steps to be passed over; the sentences have p - 1 of p steps, the pairs the p-th.
        passes: list[int] = [max(1, size // (self.batch_size * self.run_length)) for size in self.sizes]
        if self.pair_every is None:
            return passes[0]
        texts, pairs = passes[self.text_source or 0], passes[self.pair_source or 0]
        return max(texts + (texts - 1) // (self.pair_every - 1), pairs * self.pair_every)

    def _source(self, step: int) -> int:
        if self.pair_every is None:
            return 0
        source = self.pair_source if (step + 1) % self.pair_every == 0 else self.text_source
        return source or 0

    def _stream(self, source: int) -> Iterator[list[int]]:
        """Batches of a source without end, shuffled again at each pass."""
        seed = np.random.SeedSequence([self.seed, self.epoch, source]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
        start = sum(self.sizes[:source])
        size = self.sizes[source]
        batch_size = min(self.batch_size, size)
        while True:
            order = self._order(source, generator) + start
            for batch in order[: size - size % batch_size].split(batch_size):
                yield batch.tolist()

    def _order(self, source: int, generator: torch.Generator) -> torch.Tensor:
        """(size,) numbers of a source's examples, for a pass."""
        order = torch.randperm(self.sizes[source], generator=generator)
        if source != self.pair_source or self.captions_per_image == 1 or self.image_rows is None:
            return order
        by_image = order.numpy()[np.argsort(self.image_rows[order.numpy()], kind="stable")]
        images = self.image_rows[by_image]
        group = _rank(images) // self.captions_per_image
        first = np.flatnonzero(np.diff(images, prepend=-1) | np.diff(group, prepend=-1))  # of each group
        size = np.diff(first, append=len(images))
        # Groups of an image take its rounds in random order: else the last round would hold all that is left over.
        keys = torch.rand(2, len(first), generator=generator, dtype=torch.float64).numpy()
        shuffled = np.lexsort((keys[0], images[first]))
        turn = np.empty(len(first), dtype=np.int64)
        turn[shuffled] = _rank(images[first][shuffled])
        taken = np.lexsort((keys[1], turn))
        ends = np.cumsum(size[taken])
        positions = np.repeat(first[taken] - (ends - size[taken]), size[taken]) + np.arange(len(images))
        return torch.from_numpy(by_image[positions])


def _rank(groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many equal values stand before each value of a sorted array."""
    starts = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))
