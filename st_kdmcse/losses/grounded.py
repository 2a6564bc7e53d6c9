"""What MCSE and KDMCSE share: teacher features of a batch, the grounding and teacher heads, the cross-modal terms."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_kdmcse import functional
from st_kdmcse.config import KDMCSEConfig, SoftLabel
from st_kdmcse.losses.base import AnchorTensors, TwoViewLoss, Views
from st_kdmcse.losses.components import LossComponents
from st_kdmcse.losses.heads import ProjectionHead

if TYPE_CHECKING:
    from st_kdmcse.data.resident import ResidentFeatures
    from st_kdmcse.data.store import FeatureStore

Modality = Literal["image", "text"]

DEFAULT_TEACHER_DIM = 512
"""The width of CLIP ViT-B/32's features."""

# The name of each term in the logs: "text" is the student's own text loss there.
_TERM: dict[Modality, str] = {"image": "image", "text": "caption"}

_SCORES = {"cosine": functional.cosine_similarity_matrix, "dot": functional.dot_product_matrix}


class GroundedLoss(TwoViewLoss):
    """Base of the losses that ground sentences in teacher features.

    Args:
        model: the student.
        config: the options.
        modalities: the teacher features to learn from.
        teacher_dim: T, the width of the teacher features; None is that of ``features``, or 512 (CLIP ViT-B/32) without.
        features: the store that row numbers refer to.
        gather_across_devices: use the batches of all processes as candidates.

    Raises:
        ValueError: if ``teacher_dim`` is below 1 or not the width of ``features``, if a threshold is "auto" without
            ``features``, or if the options compare images with texts of two teachers.
    """

    keep_features_on_device = True
    """Copy the store to a GPU that has room for it, and gather batches there."""

    def __init__(
        self,
        model: SentenceTransformer,
        config: KDMCSEConfig,
        modalities: Sequence[Modality],
        teacher_dim: int | None,
        features: FeatureStore | None,
        gather_across_devices: bool,
    ) -> None:
        super().__init__(model, gather_across_devices)
        if features is not None and teacher_dim not in (None, features.dim):
            raise ValueError(
                f"the features at {features.path} have {features.dim} dimensions and `teacher_dim` is {teacher_dim}: "
                "leave `teacher_dim` out"
            )
        if teacher_dim is None:
            teacher_dim = DEFAULT_TEACHER_DIM if features is None else features.dim
        if teacher_dim < 1:
            raise ValueError(f"`teacher_dim` must be at least 1, got {teacher_dim}")
        if features is not None and not features.shared_space:
            _check_comparisons(config, modalities, features)
        self.config = _with_thresholds(config, features)
        self.modalities = tuple(modalities)
        self.teacher_dim = teacher_dim
        self.features = features
        self._resident: tuple[torch.device, ResidentFeatures | None] | None = None
        self.heads["grounding"] = ProjectionHead(self.hidden_dim, config.projection_dim)
        for modality in self.modalities:
            self.heads[f"teacher_{modality}"] = ProjectionHead(self.teacher_dim, config.projection_dim)
        self.heads.to(model.device)

    def text_loss(self, anchors: Tensor, candidates: Tensor, offset: int) -> Tensor:
        """SimCSE (Eq. 1), or with ``text_margin`` the released code's fixed margin on the negatives."""
        config = self.config
        return functional.info_nce_with_margin(
            anchors,
            candidates,
            config.text_margin,
            config.text_temperature,
            guard=config.margin_guard,
            positive_offset=offset,
        )

    def compute_loss_from_embeddings(
        self,
        views: Views,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        image_ids: Any = None,
    ) -> LossComponents:
        """The loss of sentences that are encoded already: the text loss alone where there are no teacher features.

        Args:
            views: two (N, hidden) tensors, the sentence embeddings under two dropout masks.
            image_features: (N, T) teacher features of each sentence's image, or None.
            text_features: (N, T) teacher features of each sentence, or None.
            image_ids: N integers (or any hashable values) that are equal where the image is; needed by
                ``remove_same_image``.

        Returns:
            The terms "text", "image" and "caption", weighted: their sum is the training loss. As metrics, how many
            negatives the filter removed from each cross-modal term.

        Raises:
            ValueError: if one of the features is missing or has the wrong shape.
        """
        loss = super().compute_loss_from_embeddings(views)
        rows: AnchorTensors = {}
        if image_features is not None:
            rows["image"] = image_features
        if text_features is not None:
            rows["text"] = text_features
        if not rows:
            return loss
        self._check_features(rows, len(views[0]))
        if self.config.remove_same_image:
            rows["image_ids"] = self._image_numbers(image_ids).to(views[0].device)
        candidates = {name: self.gather(values) for name, values in rows.items()}
        rows["first"], rows["second"] = (self.heads["grounding"](view) for view in views)
        for modality in self.modalities:
            teacher = self.heads[f"teacher_{modality}"](candidates[modality])
            cross_modal = partial(self._cross_modal, modality, teacher, candidates)
            term, *removed = self.over_anchors(cross_modal, rows, self.offset(views[0]))
            loss[_TERM[modality]] = self._weight * term
            if removed:
                loss.metrics[f"{_TERM[modality]}_negatives_removed"] = removed[0]
        return loss

    def teacher_batch(self, labels: Tensor | None, device: torch.device) -> dict[str, Any]:
        """Teacher features from the labels: row numbers (N,) or (N, 1) of the store, or the features (N, 2 T)."""
        if labels is None:
            return {}
        if labels.ndim == 1 or labels.shape[1] == 1:
            return self._features_of_rows(labels.reshape(-1), device)
        if labels.ndim != 2 or labels.shape[1] != 2 * self.teacher_dim:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} are neither row numbers (N, 1) nor image and text features "
                f"(N, {2 * self.teacher_dim}) of a teacher with `teacher_dim` {self.teacher_dim}. (MatryoshkaLoss cuts "
                "off features whose total width is that of the model: use row numbers of a feature store there)"
            )
        finite = labels.isfinite().all(dim=1)
        if not finite.all():
            position = int(finite.logical_not().nonzero()[0])
            raise ValueError(f"the teacher features of example {position} of the batch hold NaN or infinite values")
        image_features, text_features = labels.chunk(2, dim=1)
        return {"image_features": image_features, "text_features": text_features}

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        store = self.features
        of_store = {} if store is None else {"teacher": store.teacher, "features_sha256": store.checksum}
        return {"teacher_dim": self.teacher_dim, **of_store, **super().get_config_dict()}

    @property
    def _weight(self) -> float:
        """What a term is multiplied with, once summed over the two views."""
        views = 2 if self.config.view_reduction == "mean" else 1
        modalities = len(self.modalities) if self.config.modality_reduction == "mean" else 1
        return self.config.multimodal_weight / (views * modalities)

    def _cross_modal(
        self, modality: Modality, teacher: Tensor, candidates: AnchorTensors, rows: AnchorTensors, offset: int
    ) -> tuple[Tensor, ...]:
        """AdapACSE of some anchors, summed over their views, and how many negatives the filter removed, if it is on."""
        keep = self._keep(modality, rows, candidates, offset)
        soft_labels = self._soft_labels(modality, rows, candidates)
        views = [self._adap_acse(rows[view], teacher, soft_labels, keep, offset) for view in ("first", "second")]
        term = torch.stack(views).sum()
        return (term,) if keep is None else (term, (~keep).sum())

    def _adap_acse(
        self, anchors: Tensor, teacher: Tensor, soft_labels: Tensor, keep: Tensor | None, offset: int
    ) -> Tensor:
        config = self.config
        return functional.adap_acse(
            anchors,
            teacher,
            soft_labels,
            config.margin,
            config.temperature,
            keep,
            guard=config.margin_guard,
            positive_offset=offset,
        )

    def _soft_labels(self, modality: Modality, rows: AnchorTensors, candidates: AnchorTensors) -> Tensor:
        if self.config.margin == 0:  # no margin to scale: any matrix of the right shape will do
            features = rows[modality]
            return features.new_zeros(len(features), len(candidates[modality]))
        kind = self.config.image_soft_label if modality == "image" else self.config.text_soft_label
        return functional.cosine_similarity_matrix(*_sides(kind, rows, candidates))

    def _keep(self, modality: Modality, rows: AnchorTensors, candidates: AnchorTensors, offset: int) -> Tensor | None:
        """The (N, M) mask of the pairs that stay, None where nothing is removed."""
        config = self.config
        threshold = config.image_threshold if modality == "image" else config.text_threshold
        keep = None
        if config.filter_negatives and threshold is not None:
            kind = config.image_filter if modality == "image" else config.text_filter
            anchors, others = _sides(kind, rows, candidates)
            similarity = _SCORES[config.filter_score]
            keep = functional.threshold_filter(
                similarity(anchors, others), float(threshold), inclusive=config.filter_inclusive, positive_offset=offset
            )
        if config.remove_same_image:
            other_image = rows["image_ids"].unsqueeze(1) != candidates["image_ids"]
            other_image |= functional.positive_mask(other_image, offset)
            keep = other_image if keep is None else keep & other_image
        return keep

    def _image_numbers(self, image_ids: Tensor | Sequence[Hashable] | None) -> Tensor:
        if image_ids is None:
            raise ValueError(
                "`remove_same_image` needs `image_ids`: train with row numbers of a feature store, or pass them"
            )
        if isinstance(image_ids, Tensor):
            return image_ids
        if self.gathers:
            raise ValueError("across devices `image_ids` must be a tensor of integers that mean the same everywhere")
        number: dict[Hashable, int] = {}
        return torch.tensor([number.setdefault(image, len(number)) for image in image_ids])

    def _check_features(self, features: AnchorTensors, count: int) -> None:
        for name in self.modalities:
            if name not in features:
                raise ValueError(f"{type(self).__name__} needs `{name}_features` as well")
        for given, values in features.items():
            if values.shape != (count, self.teacher_dim):
                raise ValueError(
                    f"`{given}_features` must have shape {(count, self.teacher_dim)} (sentences, teacher_dim), "
                    f"got {tuple(values.shape)}"
                )

    def _features_of_rows(self, rows: Tensor, device: torch.device) -> dict[str, Any]:
        if rows.is_floating_point():
            raise ValueError(
                f"labels of {rows.dtype} with one number a sentence are no row numbers: leave the label out for a "
                "batch of plain text, or give rows as integers"
            )
        if self.features is None:
            raise ValueError(
                f"the labels are row numbers, and {type(self).__name__} has no feature store: give `features`"
            )
        if resident := self._resident_features(device):
            images, texts, image_ids = resident.gather(rows)
        else:
            batch = self.features.gather(rows.cpu())
            images, texts, image_ids = (
                torch.from_numpy(array).to(device, non_blocking=True)
                for array in (batch.image_features, batch.text_features, batch.image_rows)
            )
        return {"image_features": images, "text_features": texts, "image_ids": image_ids}

    def _resident_features(self, device: torch.device) -> ResidentFeatures | None:
        """The copy of the features on a device; it is made, or found not to fit, at the first batch there."""
        if not self.keep_features_on_device or self.features is None:
            return None
        if self._resident is None or self._resident[0] != device:
            from st_kdmcse.data.resident import ResidentFeatures

            self._resident = device, ResidentFeatures.fitting(self.features, device)
        return self._resident[1]


def _sides(kind: SoftLabel, rows: AnchorTensors, candidates: AnchorTensors) -> tuple[Tensor, Tensor]:
    """The anchors' and the candidates' features of a soft label such as "text-image"."""
    anchor, candidate = kind.split("-")
    for name in (anchor, candidate):
        if name not in rows:
            raise ValueError(f"the soft label {kind} needs `{name}_features` as well")
    return rows[anchor], candidates[candidate]


def _check_comparisons(config: KDMCSEConfig, modalities: Sequence[Modality], features: FeatureStore) -> None:
    """Refuse to compare images with texts where two teachers gave the features."""
    filters = config.filter_negatives
    for modality in modalities:
        read = {f"{modality}_soft_label": config.margin != 0}
        read[f"{modality}_filter"] = filters and getattr(config, f"{modality}_threshold") is not None
        for option, is_read in read.items():
            kind = getattr(config, option)
            if is_read and kind not in ("text-text", "image-image"):
                raise ValueError(
                    f"`{option}` is {kind!r}, but the images and texts of {features.path} come from two teachers "
                    f"({features.teacher}), which cannot be compared: choose 'image-image' or 'text-text'"
                )


def _with_thresholds(config: KDMCSEConfig, features: FeatureStore | None) -> KDMCSEConfig:
    """Replace thresholds that say "auto" by what the store suggests."""
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
