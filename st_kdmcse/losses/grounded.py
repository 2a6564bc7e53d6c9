"""What MCSE and KDMCSE share: teacher features of a batch, the grounding and teacher heads, the cross-modal terms."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor

from st_kdmcse import functional
from st_kdmcse.config import SCORE_KINDS, KDMCSEConfig
from st_kdmcse.functional import ScoreStatistics
from st_kdmcse.losses.base import AnchorTensors, TwoViewLoss, Views
from st_kdmcse.losses.components import LossComponents
from st_kdmcse.losses.heads import GradientBalance, ProjectionHead
from st_kdmcse.losses.lists import VIEWS, ListScores, consistency_term, distillation_term
from st_kdmcse.losses.teacher_scores import (
    TeacherScores,
    batch_statistics,
    check_comparisons,
    needs_statistics,
    score_kinds,
    statistics_of_store,
    with_thresholds,
)

if TYPE_CHECKING:
    from st_kdmcse.data.resident import ResidentFeatures
    from st_kdmcse.data.store import FeatureStore

Modality = Literal["image", "text"]

DEFAULT_TEACHER_DIM = 512
"""The width of CLIP ViT-B/32's features."""

# The name of each term in the logs: "text" is the student's own text loss there.
_TERM: dict[Modality, str] = {"image": "image", "text": "caption"}


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
            check_comparisons(config, modalities, features)
        self.config = with_thresholds(config, features)
        self.modalities = tuple(modalities)
        self.teacher_dim = teacher_dim
        self.features = features
        self.statistics = statistics_of_store(features) if features is not None and needs_statistics(config) else None
        self._resident: tuple[torch.device, ResidentFeatures | None] | None = None
        if config.multimodal_weight != 0:
            self.heads["grounding"] = self.student_head(config.projection_dim)
            for modality in self.modalities:
                self.heads[f"teacher_{modality}"] = ProjectionHead(self.teacher_dim, config.projection_dim)
        if config.multimodal_weight == "auto":
            self.heads["balance"] = GradientBalance()
        self.heads.to(model.device)
        # In a tuple it is no submodule: neither trained, nor saved, nor replaced by the wrappers of the Trainer.
        self._initial = (deepcopy(model).eval().requires_grad_(False),) if config.retention_weight else ()

    def text_loss(
        self,
        anchors: Tensor,
        candidates: Tensor,
        offset: int,
        keep: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """SimCSE (Eq. 1), or with ``text_margin`` the released code's fixed margin on the negatives.

        Args:
            anchors: (N, hidden) head outputs.
            candidates: (M, hidden) head outputs.
            offset: the candidate of anchor 0.
            keep: (N, M) which negatives stay; None is all.
            targets: (N, M) shares of several positives; None is one each.
        """
        config = self.config
        return functional.info_nce_with_margin(
            anchors,
            candidates,
            config.text_margin,
            config.text_temperature,
            keep,
            targets,
            guard=config.margin_guard,
            positive_offset=offset,
        )

    def compute_loss_from_embeddings(
        self,
        views: Views,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        image_ids: Any = None,
        initial_embeddings: Tensor | None = None,
    ) -> LossComponents:
        """The loss of sentences that are encoded already: that of plain text where there are no teacher features.

        Args:
            views: two (N, hidden) tensors, the sentence embeddings under two dropout masks.
            image_features: (N, T) teacher features of each sentence's image, or None.
            text_features: (N, T) teacher features of each sentence, or None.
            image_ids: N integers (or any hashable values) that are equal where the image is; needed by ``same_image``.
                With them, captions of one image are not in each other's lists.
            initial_embeddings: (N, any width) of plain text by the student as it was before training, for
                ``retention_weight``.

        Returns:
            The terms, weighted: their sum is the training loss. They are "text"; of pairs also "image", "caption" and
            "list"; of plain text also "consistency" and "retention". As metrics, how many negatives were removed from a
            term, and the weight of the cross-modal terms if it is "auto".

        Raises:
            ValueError: if one of the features is missing or has the wrong shape.
        """
        rows: AnchorTensors = {}
        if image_features is not None:
            rows["image"] = image_features
        if text_features is not None:
            rows["text"] = text_features
        if not rows:
            return self._loss_of_text(views, initial_embeddings)
        self._check_features(rows, len(views[0]))
        if self.config.same_image != "negative" or (self.config.list_weight and image_ids is not None):
            rows["image_ids"] = self._image_numbers(image_ids).to(views[0].device)
        return self._loss_of_pairs(views, rows)

    def text_batch(self, columns: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The embeddings of the student as it was before training, for ``retention_weight``."""
        if not self._initial:
            return {}
        (model,) = self._initial
        if model.device != (device := columns[0]["input_ids"].device):
            model.to(device)
        with torch.no_grad():
            return {"initial_embeddings": model(dict(columns[0]))["sentence_embedding"]}

    def teacher_batch(self, labels: Tensor, device: torch.device) -> dict[str, Any]:
        """Teacher features from the labels: row numbers (N,) or (N, 1) of the store, or the features (N, 2 T)."""
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
        of_store: dict[str, Any] = {}
        if store is not None:
            of_store |= {"teacher": store.teacher, "features_sha256": store.checksum}
        if self.statistics is not None:
            moments = zip(SCORE_KINDS, self.statistics.mean.tolist(), self.statistics.std.tolist(), strict=True)
            of_store["teacher_scores"] = {kind: {"mean": mean, "std": std} for kind, mean, std in moments}
        return {"teacher_dim": self.teacher_dim, **of_store, **super().get_config_dict()}

    def _loss_of_text(self, views: Views, initial_embeddings: Tensor | None) -> LossComponents:
        """The text loss, and with consistency and retention their terms."""
        config, offset = self.config, self.offset(views[0])
        loss = LossComponents({})
        if config.text_weight:
            loss["text"] = config.text_weight * super().compute_loss_from_embeddings(views)["text"]
        if config.consistency_weight:
            rows, others = self._lists_of(views)
            (term,) = self.over_anchors(partial(consistency_term, config, others), rows, offset)
            loss["consistency"] = config.consistency_weight * term
        if config.retention_weight and initial_embeddings is not None:
            candidates = {"initial": self.gather(initial_embeddings)}
            statistics = batch_statistics(_initial_scores, candidates)

            def scores(given: AnchorTensors) -> tuple[Tensor, None]:
                plain = _initial_scores(given, candidates)[0]
                return functional.standardize(plain, statistics.mean[0], statistics.std[0]), None

            term = self._list_term(views, {"initial": initial_embeddings}, scores)
            loss["retention"] = config.retention_weight * term
        return loss

    def _loss_of_pairs(self, views: Views, rows: AnchorTensors) -> LossComponents:
        """The text loss, the cross-modal terms and the lists of sentences with teacher features."""
        config, offset = self.config, self.offset(views[0])
        candidates = {name: self.gather(values) for name, values in rows.items()}
        teacher = TeacherScores(config, candidates, self._statistics_for(candidates))
        terms, weights, metrics = {}, {"text": config.text_weight}, {}
        if config.text_weight:
            anchors, others, _ = self.project_text(views)
            text_term = partial(self._text_term, teacher, others)
            terms["text"] = self.over_anchors(text_term, {**rows, "anchors": anchors}, offset)
        if config.multimodal_weight != 0:
            given = rows | {name: self.heads["grounding"](view) for name, view in zip(VIEWS, views, strict=True)}
            for modality in self.modalities:
                features = self.heads[f"teacher_{modality}"](candidates[modality])
                cross_modal = partial(self._cross_modal, modality, teacher, features)
                terms[_TERM[modality]] = self.over_anchors(cross_modal, given, offset)
            weight = self._multimodal_weight(terms, views)
            weights |= {_TERM[modality]: weight / self._summed for modality in self.modalities}
            if config.multimodal_weight == "auto":
                metrics["multimodal_weight"] = views[0].new_tensor(weight)
        metrics |= {f"{name}_negatives_removed": counts[0] for name, (_, *counts) in terms.items() if counts}
        loss = LossComponents({name: weights[name] * term for name, (term, *_) in terms.items()}, metrics)
        if config.list_weight:
            loss["list"] = config.list_weight * self._list_term(views, rows, teacher.lists)
        return loss

    @property
    def _summed(self) -> int:
        """How many views and modalities a sum of cross-modal terms has to be divided by, for the mean of either."""
        views = 2 if self.config.view_reduction == "mean" else 1
        modalities = len(self.modalities) if self.config.modality_reduction == "mean" else 1
        return views * modalities

    def _multimodal_weight(self, terms: Mapping[str, tuple[Tensor, ...]], views: Views) -> float:
        """Lambda: the option, or with "auto" what the gradients of this batch and those before say."""
        if self.config.multimodal_weight != "auto":
            return self.config.multimodal_weight
        balance = cast("GradientBalance", self.heads["balance"])
        if not balance.settled and torch.is_grad_enabled() and views[0].requires_grad:
            cross_modal = torch.stack([terms[_TERM[modality]][0] for modality in self.modalities]).sum()
            of_text, of_cross_modal = (_gradient_norm(term, views) for term in (terms["text"][0], cross_modal))
            ratio = of_text / (of_cross_modal / self._summed)
            if get_world_size() > 1:
                dist.all_reduce(ratio)
                ratio /= get_world_size()
            balance.add(float(ratio))
        return balance.weight

    def _text_term(
        self, teacher: TeacherScores, others: Tensor, rows: AnchorTensors, offset: int
    ) -> tuple[Tensor, ...]:
        """The text loss of some captions, and how many negatives of their image left, if they may."""
        keep, targets = teacher.other_image(rows, offset), teacher.targets(rows, offset)
        return _with_count(self.text_loss(rows["anchors"], others, offset, keep, targets), keep, targets)

    def _cross_modal(
        self, modality: Modality, teacher: TeacherScores, features: Tensor, rows: AnchorTensors, offset: int
    ) -> tuple[Tensor, ...]:
        """AdapACSE of some anchors, summed over their views, and how many negatives were removed, if any may be."""
        config = self.config
        keep, targets = teacher.keep(modality, rows, offset), teacher.targets(rows, offset)
        soft_labels = teacher.soft_labels(modality, rows)
        views = [
            functional.adap_acse(
                rows[view],
                features,
                soft_labels,
                config.margin,
                config.temperature,
                keep,
                targets,
                guard=config.margin_guard,
                positive_offset=offset,
            )
            for view in VIEWS
        ]
        return _with_count(torch.stack(views).sum(), keep, targets)

    def _lists_of(self, views: Views) -> tuple[AnchorTensors, AnchorTensors]:
        """The views by name, of the anchors and of all candidates."""
        rows = dict(zip(VIEWS, views, strict=True))
        return rows, {name: self.gather(view, with_grad=True) for name, view in rows.items()}

    def _list_term(self, views: Views, given: AnchorTensors, scores: ListScores) -> Tensor:
        """List distillation from a teacher's scores, which need ``given`` of each anchor."""
        rows, others = self._lists_of(views)
        noise = None
        if self.config.list_shuffle:
            noise = torch.rand(len(others["first"]), device=views[0].device)
            given = given | {"noise": 100 + 900 * torch.rand(len(views[0]), device=views[0].device)}
        term = partial(distillation_term, self.config, scores, others, noise)
        (loss,) = self.over_anchors(term, given | rows, self.offset(views[0]))
        return loss

    def _statistics_for(self, candidates: AnchorTensors) -> ScoreStatistics | None:
        """The statistics of the store, or of the batch where features are of none; None where no option needs them."""
        if not needs_statistics(self.config):
            return None
        if self.statistics is None:
            return batch_statistics(score_kinds, candidates)
        device = candidates["text"].device
        if self.statistics.mean.device != device:
            self.statistics = self.statistics.to(device)
        return self.statistics

    def _image_numbers(self, image_ids: Tensor | Sequence[Hashable] | None) -> Tensor:
        if image_ids is None:
            raise ValueError("`same_image` needs `image_ids`: train with row numbers of a feature store, or pass them")
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


def _initial_scores(rows: AnchorTensors, candidates: AnchorTensors) -> Tensor:
    return functional.cosine_similarity_matrix(rows["initial"], candidates["initial"]).unsqueeze(0)


def _with_count(term: Tensor, keep: Tensor | None, targets: Tensor | None) -> tuple[Tensor, ...]:
    """A term, and how many pairs left it if any may leave."""
    if keep is None:
        return (term,)
    return term, (~keep if targets is None else ~keep & (targets == 0)).sum()


def _gradient_norm(term: Tensor, views: Views) -> Tensor:
    """The norm of a term's gradient at the sentence embeddings."""
    gradients = torch.autograd.grad(term, views, retain_graph=True)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(gradients).float())
    return norm
