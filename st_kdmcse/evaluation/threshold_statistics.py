"""Teacher scores of true pairs and of all others, and what a threshold would remove (Figures 5 and 6 of the paper).

One module, because the result classes and the pass that fills them change together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from st_kdmcse.data import FeatureStore, true_pair_score
from st_kdmcse.data.layout import ROWS_PER_CHUNK, Array, RowNumbers
from st_kdmcse.data.scores import draw_images, unit_rows
from st_kdmcse.files import progress_bar
from st_kdmcse.provenance import device_name, provenance

Counts = npt.NDArray[np.int64]

PAPER_THRESHOLD = 0.8
"""What the paper reads off its Figure 6, for both branches."""
BINS = 200
"""Bins of the histograms: cosines from -1 to 1 in steps of 0.01."""

_BLOCK_SCORES = 2**24  # 64 MiB in float32
_RANKS_SHOWN = (1, 5, 10)
_CURVE = tuple(step * 10**power for power in range(8) for step in (1, 2, 5))


@dataclass(frozen=True)
class ThresholdEffect:
    """What a threshold does to a branch.

    Attributes:
        threshold: a pair with a score of at least this is removed.
        non_pairs_at_or_above: share, from 0 to 1, of the pairs that do not belong together.
        removed_per_anchor: of the batch_size - 1 negatives of an anchor, how many leave on average; the negatives are
            taken to be of other images.
        true_pairs_at_or_above: share, from 0 to 1, of the true pairs; None without true pairs.
    """

    threshold: float
    non_pairs_at_or_above: float
    removed_per_anchor: float
    true_pairs_at_or_above: float | None


@dataclass(frozen=True)
class BranchStatistics:
    """The scores that filter a branch.

    Attributes:
        name: "text-text", the filter of the caption term: true pairs are two captions of one image, counted from either
            side; or "text-image", the filter of the image term: true pairs are a caption and its image. Everything else
            is a non-pair; a caption with itself is neither.
        true_histogram: (BINS,) numbers of true pairs by cosine, from -1 to 1.
        non_histogram: (BINS,) numbers of non-pairs.
        true_mean: mean cosine of the true pairs; None without true pairs.
        non_mean: mean cosine of the non-pairs; None without non-pairs.
        proposed: the effect of the proposed threshold; None without true pairs.
        paper: the effect of :data:`PAPER_THRESHOLD`.
    """

    name: Literal["text-text", "text-image"]
    true_histogram: Counts
    non_histogram: Counts
    true_mean: float | None
    non_mean: float | None
    proposed: ThresholdEffect | None
    paper: ThresholdEffect

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        return {
            "true_pairs": int(self.true_histogram.sum()),
            "non_pairs": int(self.non_histogram.sum()),
            "true_mean": self.true_mean,
            "non_mean": self.non_mean,
            "proposed": vars(self.proposed) if self.proposed else None,
            "paper": vars(self.paper),
            "true_histogram": self.true_histogram.tolist(),
            "non_histogram": self.non_histogram.tolist(),
        }


@dataclass(frozen=True)
class CaptionRanks:
    """Where an image's own captions come among all captions, ranked by the cosine with the image (Figure 5).

    Attributes:
        ranks: the rank of each own caption, 1 for the best; captions with the same score share their mean rank.
        best: (images,) the rank of each image's best own caption.
        captions: how many captions are ranked.
    """

    ranks: npt.NDArray[np.float64]
    best: npt.NDArray[np.float64]
    captions: int

    def recall(self, k: int) -> float:
        """R@k: the share, from 0 to 1, of the images with an own caption among the first k."""
        return float((self.best <= k).mean())

    def curve(self) -> dict[int, float]:
        """Share of the own captions with a rank of at most k, for k = 1, 2, 5, 10, ... up to all captions."""
        steps = [k for k in _CURVE if k < self.captions] + [self.captions]
        return {k: float((self.ranks <= k).mean()) for k in steps}

    def to_dict(self) -> dict[str, Any]:
        """A summary in types that JSON has."""
        return {
            "median": float(np.median(self.ranks)),
            "mean": float(self.ranks.mean()),
            **{f"R@{k}": self.recall(k) for k in _RANKS_SHOWN},
            "share_of_own_captions_up_to_rank": {str(k): share for k, share in self.curve().items()},
        }


@dataclass(frozen=True)
class ThresholdStatistics:
    """What :func:`threshold_statistics` found; ``str(statistics)`` is a text for the terminal.

    Attributes:
        store: the store's folder.
        teacher: the model that the features come from.
        checksum: of the store's content.
        images: images with a caption.
        captions: captions.
        sampled_images: images drawn; the scores of these images and of their captions are counted.
        quantile: of the true pairs' scores, which the proposed thresholds are.
        batch_size: sentences of a batch, for the number of negatives.
        seed: of the draw.
        text_text: the filter of the caption term.
        text_image: the filter of the image term; None where the store's images and captions share no space.
        ranks: the ranks of the captions; None likewise.
    """

    store: Path
    teacher: str
    checksum: str
    images: int
    captions: int
    sampled_images: int
    quantile: float
    batch_size: int
    seed: int
    text_text: BranchStatistics
    text_image: BranchStatistics | None
    ranks: CaptionRanks | None

    @property
    def branches(self) -> list[BranchStatistics]:
        """The branches that can be measured."""
        return [branch for branch in (self.text_text, self.text_image) if branch is not None]

    def to_dict(self) -> dict[str, Any]:
        """All of it, with its provenance, in types that JSON has."""
        return {
            "store": str(self.store),
            "teacher": self.teacher,
            "images": self.images,
            "captions": self.captions,
            "sampled_images": self.sampled_images,
            "quantile": self.quantile,
            "batch_size": self.batch_size,
            "bins": {"from": -1.0, "to": 1.0, "number": BINS},
            **{
                name: branch.to_dict() if branch else None
                for name, branch in (("text_text", self.text_text), ("text_image", self.text_image))
            },
            "ranks": self.ranks.to_dict() if self.ranks else None,
            **provenance(data_sha256={"features": self.checksum}, seed=self.seed),
            "device": device_name(torch.device("cpu")),
        }

    def __str__(self) -> str:
        drawn = "all of them" if self.sampled_images == self.images else f"{self.sampled_images:,} of them drawn"
        lines = [
            str(self.store),
            f"  teacher    {self.teacher}",
            f"  images     {self.images:,}, {drawn}",
            f"  captions   {self.captions:,}",
        ]
        for branch in self.branches:
            lines += ["", *self._table(branch)]
        if self.text_image is None or self.ranks is None:
            reason = "images and captions of this store share no space: their scores mean nothing, and are left out"
            return "\n".join([*lines, "", f"text-image: {reason}"])
        ranks = self.ranks
        recalls = ", ".join(f"R@{k} {ranks.recall(k):.1%}" for k in _RANKS_SHOWN)
        return "\n".join(
            [
                *lines,
                "",
                f"An image's own captions among all {ranks.captions:,}, by cosine",
                f"  rank: median {np.median(ranks.ranks):,.1f}, mean {ranks.ranks.mean():,.1f}",
                f"  images with an own caption among the first k: {recalls}",
            ]
        )

    def _table(self, branch: BranchStatistics) -> list[str]:
        term = {"text-text": "caption term, text_threshold", "text-image": "image term, image_threshold"}
        columns = [("0.8 (paper)", branch.paper)]
        if branch.proposed is not None:
            name = "auto" if self.quantile == 0.5 else f"quantile {self.quantile:g}"
            columns.insert(0, (f"{branch.proposed.threshold:.3f} ({name})", branch.proposed))
        rows = {
            "non-pairs at or above": [f"{effect.non_pairs_at_or_above:.4%}" for _, effect in columns],
            f"negatives removed of {self.batch_size - 1}": [
                f"{effect.removed_per_anchor:.3f}" for _, effect in columns
            ],
            "true pairs at or above": [_percent(effect.true_pairs_at_or_above) for _, effect in columns],
        }
        true, non = branch.true_histogram.sum(), branch.non_histogram.sum()
        return [
            f"{branch.name} (filter of the {term[branch.name]})",
            f"  true pairs  {true:>16,}   mean cosine {_number(branch.true_mean)}",
            f"  non-pairs   {non:>16,}   mean cosine {_number(branch.non_mean)}",
            f"  {'threshold':<26}" + "".join(f"{name:>18}" for name, _ in columns),
            *(f"  {name:<26}" + "".join(f"{cell:>18}" for cell in cells) for name, cells in rows.items()),
        ]


def threshold_statistics(
    store: FeatureStore,
    sample_images: int = 2000,
    quantile: float = 0.5,
    batch_size: int = 64,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> ThresholdStatistics:
    """Compare the scores of true pairs with those of all others, rank the captions, and propose thresholds.

    Of the images drawn, the captions are compared with all captions of the store and the images with all captions, in
    blocks: the counts and ranks are exact for them. Memory is that of all features in float32, and some 300 MiB; time
    grows with the number of captions drawn times all captions.

    The proposed thresholds are those of :func:`~st_kdmcse.data.true_pair_score` with its own draw, hence, at the
    default quantile, what "auto" gives in training.

    Args:
        store: the teacher features; every byte is read and checked.
        sample_images: how many images to draw, without replacement; 0 takes all.
        quantile: of the scores of true pairs, from 0 to 1, which is proposed as a threshold.
        batch_size: sentences of a training batch.
        seed: seed of the draw.
        show_progress_bar: None shows one in a terminal if it takes more than two seconds.

    Raises:
        ValueError: if the store is damaged, or an option is out of range.
    """
    if sample_images < 0:
        raise ValueError(f"sample_images is {sample_images}, expected a number of images, or 0 for all")
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}: a batch needs at least 2 sentences to have a negative")
    proposed = true_pair_score(store, "text-text", quantile=quantile)
    store.verify(show_progress_bar)
    features = _Features.load(store)
    drawn = np.searchsorted(features.image_rows, draw_images(store, sample_images or store.num_images, seed))
    drawn.sort()
    captions_drawn = int(features.counts[drawn].sum())
    comparisons = captions_drawn + (len(drawn) if store.shared_space else 0)
    text_image = ranks = None
    with progress_bar(comparisons, "Comparing", "row", show_progress_bar) as progress:
        text_text = _text_text(features, drawn, proposed, batch_size, progress)
        if store.shared_space:
            proposed = true_pair_score(store, "text-image", quantile=quantile)
            text_image, ranks = _text_image(features, drawn, proposed, batch_size, progress)
    return ThresholdStatistics(
        store=store.path,
        teacher=store.teacher,
        checksum=store.checksum,
        images=len(features.images),
        captions=len(features.texts),
        sampled_images=len(drawn),
        quantile=quantile,
        batch_size=batch_size,
        seed=seed,
        text_text=text_text,
        text_image=text_image,
        ranks=ranks,
    )


@dataclass(frozen=True)
class _Features:
    """Unit features in memory, the captions sorted by image.

    Attributes:
        texts: (captions, T) float32.
        images: (images, T) float32.
        image_rows: (images,) their rows in the store, ascending.
        counts: (images,) numbers of captions.
        starts: (images,) the first caption of each image.
    """

    texts: Array
    images: Array
    image_rows: RowNumbers
    counts: RowNumbers
    starts: RowNumbers

    @classmethod
    def load(cls, store: FeatureStore) -> _Features:
        order = np.argsort(store.image_rows, kind="stable")
        texts = np.empty((len(store), store.dim), dtype=np.float32)
        for start in range(0, len(order), ROWS_PER_CHUNK):
            rows = order[start : start + ROWS_PER_CHUNK]
            texts[start : start + len(rows)] = unit_rows(store.gather(rows).text_features)
        image_rows, counts = np.unique(store.image_rows, return_counts=True)
        images = unit_rows(store.image_features[image_rows])
        return cls(texts, images, image_rows, counts, np.cumsum(counts) - counts)

    def captions_of(self, images: RowNumbers) -> tuple[RowNumbers, RowNumbers]:
        """The captions of some images: the position of the image in ``images``, and the caption, for each."""
        counts = self.counts[images]
        position = np.repeat(np.arange(len(images)), counts)
        return position, np.arange(len(position)) + np.repeat(
            self.starts[images] - (np.cumsum(counts) - counts), counts
        )


def _text_text(
    features: _Features, drawn: RowNumbers, proposed: float | None, batch_size: int, progress: tqdm[Any]
) -> BranchStatistics:
    tally = _Tally("text-text", proposed, batch_size)
    position, anchors = features.captions_of(drawn)
    for block in _blocks(len(anchors), len(features.texts)):
        scores = features.texts[anchors[block]] @ features.texts.T
        rows, columns = features.captions_of(drawn[position[block]])
        itself = anchors[block][rows] == columns
        own = scores[rows, columns]
        tally.add(scores, true=own[~itself], neither=own[itself])
        progress.update(len(scores))
    return tally.statistics()


def _text_image(
    features: _Features, drawn: RowNumbers, proposed: float | None, batch_size: int, progress: tqdm[Any]
) -> tuple[BranchStatistics, CaptionRanks]:
    tally = _Tally("text-image", proposed, batch_size)
    ranks, best = [], []
    for block in _blocks(len(drawn), len(features.texts)):
        scores = features.images[drawn[block]] @ features.texts.T
        rows, columns = features.captions_of(drawn[block])
        own = scores[rows, columns]
        tally.add(scores, true=own)
        found = _ranks(scores, rows, own)
        ranks.append(found)
        best.append(np.minimum.reduceat(found, np.flatnonzero(np.diff(rows, prepend=-1))))
        progress.update(len(scores))
    return tally.statistics(), CaptionRanks(np.concatenate(ranks), np.concatenate(best), len(features.texts))


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, _BLOCK_SCORES // columns)
    return (slice(start, start + size) for start in range(0, rows, size))


def _ranks(scores: Array, rows: RowNumbers, own: Array) -> npt.NDArray[np.float64]:
    """The rank of each own score in its row of scores; equal scores share their mean rank."""
    ranks = np.empty(len(own))
    for number, (row, score) in enumerate(zip(rows, own, strict=True)):
        above, equal = np.count_nonzero(scores[row] > score), np.count_nonzero(scores[row] == score)
        ranks[number] = above + (equal + 1) / 2
    return ranks


class _Tally:
    """Counts the scores of a branch: all of a block, of which the true pairs and what is neither are taken out."""

    def __init__(self, name: Literal["text-text", "text-image"], proposed: float | None, batch_size: int) -> None:
        self._name: Literal["text-text", "text-image"] = name
        self._batch_size = batch_size
        self._thresholds = [PAPER_THRESHOLD] if proposed is None else [PAPER_THRESHOLD, proposed]
        self._true, self._non = _Count(self._thresholds), _Count(self._thresholds)

    def add(self, scores: Array, true: Array, neither: Array | None = None) -> None:
        self._non.add(scores)
        self._non.add(true, -1)
        if neither is not None:
            self._non.add(neither, -1)
        self._true.add(true)

    def statistics(self) -> BranchStatistics:
        effects = [self._effect(number, threshold) for number, threshold in enumerate(self._thresholds)]
        return BranchStatistics(
            name=self._name,
            true_histogram=self._true.histogram,
            non_histogram=self._non.histogram,
            true_mean=self._true.mean,
            non_mean=self._non.mean,
            proposed=effects[1] if len(effects) > 1 else None,
            paper=effects[0],
        )

    def _effect(self, number: int, threshold: float) -> ThresholdEffect:
        true, non = self._true.share(number), self._non.share(number) or 0.0
        return ThresholdEffect(threshold, non, (self._batch_size - 1) * non, true)


class _Count:
    """Histogram, sum, and numbers at or above some thresholds."""

    def __init__(self, thresholds: Sequence[float]) -> None:
        self._thresholds = thresholds
        self._reached = np.zeros(len(thresholds), dtype=np.int64)
        self._sum = 0.0
        self.histogram: Counts = np.zeros(BINS, dtype=np.int64)

    def add(self, scores: Array, sign: Literal[1, -1] = 1) -> None:
        bins = ((scores.ravel() + 1) * (BINS / 2)).astype(np.int32)
        found = np.bincount(bins, minlength=BINS + 1)
        found[BINS - 1] += found[BINS:].sum()  # a cosine of 1, or a rounding error above
        self.histogram += sign * found[:BINS]
        self._reached += [sign * np.count_nonzero(scores >= threshold) for threshold in self._thresholds]
        self._sum += sign * float(scores.sum(dtype=np.float64))

    @property
    def mean(self) -> float | None:
        total = int(self.histogram.sum())
        return self._sum / total if total else None

    def share(self, number: int) -> float | None:
        total = int(self.histogram.sum())
        return int(self._reached[number]) / total if total else None


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2%}"
