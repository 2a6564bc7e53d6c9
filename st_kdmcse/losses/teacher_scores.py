"""What the teacher says about the pairs of a batch: soft labels, what leaves, who is a positive too, and lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from st_kdmcse import functional
from st_kdmcse.config import SCORE_KINDS, Calibration, KDMCSEConfig, SoftLabel
from st_kdmcse.functional import ScoreStatistics
from st_kdmcse.losses.base import AnchorTensors

if TYPE_CHECKING:
    from st_kdmcse.data.store import FeatureStore

_SCORES = {"cosine": functional.cosine_similarity_matrix, "dot": functional.dot_product_matrix}

# Pairs of a batch that its statistics are of.
_SAMPLED_PAIRS = 2**18


class TeacherScores:
    """The teacher's side of a batch of pairs.

    Args:
        config: the options.
        candidates: "image" and "text" features (M, T) and "image_ids" (M,) of all candidates, as far as there are any.
        statistics: of the teacher's scores, where the options need them (:func:`needs_statistics`).
    """

    def __init__(
        self, config: KDMCSEConfig, candidates: AnchorTensors, statistics: ScoreStatistics | None = None
    ) -> None:
        self.config = config
        self.candidates = candidates
        self._statistics = statistics

    def soft_labels(self, modality: str, rows: AnchorTensors) -> Tensor:
        """(N, M) soft labels of a cross-modal term.

        Args:
            modality: "image" or "text".
            rows: the features of N anchors.
        """
        config = self.config
        if config.margin == 0:  # no margin to scale: any matrix of the right shape will do
            features = rows[modality]
            return features.new_zeros(len(features), len(self.candidates[modality]))
        kind: SoftLabel = getattr(config, f"{modality}_soft_label")
        labels = functional.cosine_similarity_matrix(*_sides(kind, rows, self.candidates))
        labels = self._calibrated(labels, kind, config.soft_label_calibration)
        return 1 - labels if config.reverse_margin else labels

    def keep(self, modality: str, rows: AnchorTensors, offset: int) -> Tensor | None:
        """The (N, M) mask of the pairs that stay in a cross-modal term, None where nothing is removed."""
        config = self.config
        threshold = getattr(config, f"{modality}_threshold")
        keep = None
        if config.filter_negatives and (threshold is not None or config.filter_relative):
            kind: SoftLabel = getattr(config, f"{modality}_filter")
            scores = _SCORES[config.filter_score](*_sides(kind, rows, self.candidates))
            scores = self._calibrated(scores, kind, config.filter_calibration)
            if config.filter_relative:
                keep = functional.relative_filter(scores, config.filter_slack, positive_offset=offset)
            else:
                keep = functional.threshold_filter(
                    scores, float(threshold), inclusive=config.filter_inclusive, positive_offset=offset
                )
        other_image = self.other_image(rows, offset)
        if keep is None or other_image is None:
            return other_image if keep is None else keep
        return keep & other_image

    def other_image(self, rows: AnchorTensors, offset: int) -> Tensor | None:
        """The (N, M) mask of the positives and the pairs of different images; None where one image is as another."""
        if self.config.same_image == "negative":
            return None
        others = self._of_other_images(rows)
        return others | functional.positive_mask(others, offset)

    def targets(self, rows: AnchorTensors, offset: int) -> Tensor | None:
        """(N, M) shares of the positives where captions of one image are soft ones; None where there is one each."""
        if self.config.same_image != "positive":
            return None
        statistics = self._needed
        scores = functional.cosine_similarity_matrix(rows["text"], self.candidates["text"])
        alike = functional.standardize(scores, statistics.same_image_mean, statistics.same_image_std).sigmoid()
        weights = (self.config.same_image_weight * alike).masked_fill(self._of_other_images(rows), 0.0)
        return functional.soft_targets(weights, positive_offset=offset)

    def lists(self, rows: AnchorTensors) -> tuple[Tensor, Tensor | None]:
        """(N, M) fused scores in standard units, and which pairs are in the lists; None for all."""
        config, statistics = self.config, self._needed
        kinds = score_kinds(rows, self.candidates)
        weights = (config.list_text_weight, config.list_cross_weight, config.list_image_weight, 0.0)
        fused = functional.fuse(kinds, kinds.new_tensor(weights), statistics)
        return fused, self._of_other_images(rows) if "image_ids" in rows else None

    @property
    def _needed(self) -> ScoreStatistics:
        if self._statistics is None:
            raise ValueError("these options need the statistics of the teacher's scores")
        return self._statistics

    def _of_other_images(self, rows: AnchorTensors) -> Tensor:
        return rows["image_ids"].unsqueeze(1) != self.candidates["image_ids"]

    def _calibrated(self, scores: Tensor, kind: SoftLabel, calibration: Calibration) -> Tensor:
        if calibration == "none":
            return scores
        statistics, row = self._needed, _row(kind)
        if calibration == "quantile":
            return functional.empirical_distribution(scores, statistics.quantiles[row])
        share: Tensor = torch.special.ndtr(functional.standardize(scores, statistics.mean[row], statistics.std[row]))
        return share


def needs_statistics(config: KDMCSEConfig) -> bool:
    """Whether an option reads the statistics of the teacher's scores."""
    in_cross_modal = (config.margin != 0 and config.soft_label_calibration != "none") or (
        config.filter_negatives and config.filter_calibration != "none"
    )
    return bool(config.list_weight or config.same_image == "positive" or (config.multimodal_weight and in_cross_modal))


def batch_statistics(
    kinds: Callable[[AnchorTensors, AnchorTensors], Tensor], candidates: AnchorTensors
) -> ScoreStatistics:
    """The statistics of a batch, for features that are of no store.

    Args:
        kinds: (B, n, M) scores of some of the candidates with all.
        candidates: M rows each, of which a large batch is sampled; "image_ids" tell pairs of one image from the others.
    """
    count = len(next(iter(candidates.values())))
    step = -(-count * count // _SAMPLED_PAIRS)
    rows = {name: values[::step] for name, values in candidates.items()}
    with torch.no_grad():
        scores = kinds(rows, candidates)
    number = torch.arange(count, device=scores.device)
    others = number[::step].unsqueeze(1) != number
    same_image = torch.zeros_like(others)
    if "image_ids" in candidates:
        same_image = others & (rows["image_ids"].unsqueeze(1) == candidates["image_ids"])
    sample = scores[:, others & ~same_image]
    if sample.shape[1] == 0:
        sample = scores.new_zeros(len(scores), 1)
    return functional.score_statistics(sample, scores[0][same_image])


def score_kinds(rows: AnchorTensors, candidates: AnchorTensors) -> Tensor:
    """(B, N, M) scores of some anchors with all candidates, of each of :data:`~st_kdmcse.config.SCORE_KINDS`."""
    cosine = functional.cosine_similarity_matrix
    text_image = cosine(rows["text"], candidates["image"])
    cross = (text_image + cosine(rows["image"], candidates["text"])) / 2
    text_text, image_image = cosine(rows["text"], candidates["text"]), cosine(rows["image"], candidates["image"])
    return torch.stack([text_text, cross, image_image, text_image])


def threshold_score(config: KDMCSEConfig, modality: str, statistics: ScoreStatistics | None) -> float | None:
    """The score from which the filter of a cross-modal term removes a negative; None where no one score decides.

    Args:
        config: the options, with thresholds that are numbers or None.
        modality: "image" or "text".
        statistics: of the teacher's scores, where thresholds are shares of pairs.
    """
    threshold = getattr(config, f"{modality}_threshold")
    if threshold is None or config.filter_relative or not config.filter_negatives or not config.multimodal_weight:
        return None
    if config.filter_calibration == "none" or statistics is None:
        return float(threshold)
    row = _row(getattr(config, f"{modality}_filter"))
    if config.filter_calibration == "quantile":
        quantiles = statistics.quantiles[row].cpu().numpy()
        return float(np.interp(threshold, np.linspace(0, 1, len(quantiles)), quantiles))
    if not 0 < threshold < 1:
        return math.copysign(1.0, threshold - 0.5)
    return float(statistics.mean[row] + statistics.std[row] * NormalDist().inv_cdf(threshold))


def statistics_of_store(features: FeatureStore) -> ScoreStatistics:
    """The statistics of a feature store, in float32."""
    from st_kdmcse.data.statistics import store_statistics

    return ScoreStatistics(*(each.float() for each in store_statistics(features)))


def check_comparisons(config: KDMCSEConfig, modalities: Sequence[str], features: FeatureStore) -> None:
    """Refuse to compare images with texts where two teachers gave the features.

    Args:
        config: the options.
        modalities: those of the cross-modal terms.
        features: of two teachers.

    Raises:
        ValueError: naming the option that compares them.
    """
    unlike = (
        f"but the images and texts of {features.path} come from two teachers ({features.teacher}), which cannot be "
        "compared"
    )
    if config.list_weight and config.list_cross_weight:
        raise ValueError(f"`list_cross_weight` is {config.list_cross_weight}, {unlike}: set it to 0")
    for modality in modalities if config.multimodal_weight != 0 else ():
        filters = config.filter_negatives and (
            config.filter_relative or getattr(config, f"{modality}_threshold") is not None
        )
        read = {f"{modality}_soft_label": config.margin != 0, f"{modality}_filter": filters}
        for option, is_read in read.items():
            kind = getattr(config, option)
            if is_read and kind not in ("text-text", "image-image"):
                raise ValueError(f"`{option}` is {kind!r}, {unlike}: choose 'image-image' or 'text-text'")


def with_thresholds(config: KDMCSEConfig, features: FeatureStore | None) -> KDMCSEConfig:
    """The options with what the store suggests for thresholds that say "auto".

    Args:
        config: the options.
        features: the store, or None.

    Raises:
        ValueError: if a threshold is "auto" and there is no store.
    """
    if "auto" not in (config.image_threshold, config.text_threshold):
        return config
    if features is None:
        raise ValueError('a threshold of "auto" is read off a feature store: give `features`, or a number')
    from st_kdmcse.data.scores import true_pair_score

    changes: dict[str, Any] = {
        f"{term}_threshold": true_pair_score(features, getattr(config, f"{term}_filter"), config.filter_score)
        for term in ("image", "text")
        if getattr(config, f"{term}_threshold") == "auto"
    }
    return replace(config, **changes)


def _row(kind: SoftLabel) -> int:
    return SCORE_KINDS.index("text-image" if kind == "image-text" else kind)


def _sides(kind: SoftLabel, rows: AnchorTensors, candidates: AnchorTensors) -> tuple[Tensor, Tensor]:
    """The anchors' and the candidates' features of a soft label such as "text-image"."""
    anchor, candidate = kind.split("-")
    for name in (anchor, candidate):
        if name not in rows:
            raise ValueError(f"the soft label {kind} needs `{name}_features` as well")
    return rows[anchor], candidates[candidate]
