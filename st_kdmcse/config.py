"""The options of the method, and the three recipes as values of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeGuard, get_args

SoftLabel = Literal["text-text", "text-image", "image-text", "image-image"]
"""Which teacher features are compared: of the anchor, then of the candidate (the m, n of alpha^{m,n} in Eq. 7)."""

SCORE_KINDS = ("text-text", "cross", "image-image", "text-image")
"""The kinds of teacher scores that have statistics, in order; "cross" is the mean of text-image and image-text."""

Recipe = Literal["paper", "released", "grounded"]
"""The constructors of :class:`KDMCSEConfig` by name."""

Threshold = float | Literal["auto"] | None
"""A score, None for no threshold, or "auto" to read it off the feature store."""

Weight = float | Literal["auto"]
"""A number, or "auto" to balance gradients in the first batches."""

Calibration = Literal["none", "standard", "quantile"]
"""How a teacher's score becomes a share of pairs that score less, from 0 to 1: not at all, as if scores were normally
distributed, or by the quantiles of the feature store."""


def _option(default: Any, help_text: str, hidden: bool = False) -> Any:
    """A field with its help; a hidden one is for experiments, and no option of the commands."""
    return field(default=default, metadata={"help": help_text, "hidden": hidden})


@dataclass(frozen=True)
class KDMCSEConfig:
    """Every choice of KDMCSE that the paper makes, leaves open, or makes differently from its released code.

    The defaults are the paper's (:meth:`paper`); :meth:`released` gives the choices of the authors' code. The ablations
    of the paper are values: ``margin=0`` is "without AdapACSE", ``filter_negatives=False`` "without threshold
    filtering", ``multimodal_weight=0`` SimCSE. Lists, calibration, ``same_image``, consistency and retention go beyond
    the paper; both recipes are without. :meth:`grounded` has lists and soft positives.

    Args:
        margin: m of AdapACSE in radians, in [0, pi] (Eq. 12).
        margin_guard: apply the margin only to negatives whose angle exceeds it.
        temperature: of the two cross-modal terms, > 0.
        text_temperature: of the text loss, > 0.
        text_margin: a fixed margin on the negatives of the text loss, in [0, pi]; 0 is plain SimCSE.
        text_weight: weight of the text loss, >= 0. With 0 it is left out, for a student that is good already: text
            batches then need ``retention_weight`` or ``consistency_weight``, and pair batches ``list_weight`` or
            ``multimodal_weight``.
        image_soft_label: the teacher similarity that sets the margins of the image term.
        text_soft_label: the same for the caption term.
        filter_negatives: remove the negatives that the teacher scores as similar (Eq. 8, 9).
        image_filter: the teacher similarity that the filter of the image term reads.
        text_filter: the same for the caption term.
        filter_score: compare teacher features by "cosine", or by "dot" product of the features as stored.
        filter_inclusive: whether a score that equals the threshold removes the negative.
        image_threshold: a negative of the image term with a score of at least this leaves; None removes none; "auto"
            reads it off the feature store.
        text_threshold: the same for the caption term.
        filter_calibration: what thresholds are compared with: raw scores ("none"), or the share of pairs of different
            images that score less, so that 0.99 removes the most similar percent of pairs on any branch.
        filter_relative: compare a negative with the positive of its row and not with a threshold (GISTEmbed).
        filter_slack: a negative leaves from this far below the positive's score on.
        soft_label_calibration: what sets the margins: raw scores ("none"), or the share of pairs of different images
            that score less, which spreads them over [0, 1] on any branch.
        same_image: what captions of one image are to each other in all terms: a "negative" as any other, nothing
            ("remove"), or a soft "positive".
        same_image_weight: w of "positive", >= 0: such a caption is a positive with w times sigmoid((score - mean) /
            std), of the teacher's text-text score among captions of one image.
        multimodal_weight: lambda, the weight of the cross-modal terms, >= 0; 0 leaves them and their heads out; "auto"
            lets their gradient at the embeddings be 0.3 of the text loss's, measured in the first 20 pair batches.
        view_reduction: how the two dropout views of a term are combined.
        modality_reduction: how the image and caption terms are combined.
        projection_dim: width of the shared space, >= 1.
        list_weight: gamma, the weight of list distillation on pair batches, >= 0; 0 is without.
        list_text_weight: of the text-text scores in the teacher's lists, >= 0.
        list_cross_weight: of the mean of text-image and image-text scores, >= 0.
        list_image_weight: of the image-image scores, >= 0.
        list_temperature: the teacher's, > 0, in standard deviations of its scores.
        list_student_temperature: > 0.
        list_loss: "listnet" or "listmle".
        list_length: ranks that "listmle" reads, >= 1.
        list_shuffle: shuffle the teacher's scores within groups of a tenth of its list (DistillCSE).
        consistency_weight: weight of the divergence between the lists of two views, on text batches, >= 0.
        retention_weight: weight of list distillation from the student as it was before training, on text batches, >= 0;
            the loss keeps a frozen copy of the model. The four options of lists above hold for it too.
        reverse_margin: a control for experiments: margins as wide as the teacher finds a pair alike.

    Raises:
        ValueError: for a value out of range, by name.

    Example:
        >>> KDMCSEConfig.released(margin=0.1).text_margin
        0.15
    """

    margin: float = _option(0.125, "AdapACSE margin in radians; 0 is without AdapACSE")
    margin_guard: bool = _option(True, "apply the margin only to negatives whose angle exceeds it")
    temperature: float = _option(0.05, "temperature of the cross-modal terms")
    text_temperature: float = _option(0.05, "temperature of the text loss")
    text_margin: float = _option(0.0, "fixed margin in radians on the negatives of the text loss")
    text_weight: float = _option(1.0, "weight of the text loss; 0 leaves it out, which needs another term on text")
    image_soft_label: SoftLabel = _option("text-image", "teacher similarity behind the margins of the image term")
    text_soft_label: SoftLabel = _option("text-text", "teacher similarity behind the margins of the caption term")
    filter_negatives: bool = _option(True, "remove the negatives that the teacher scores as similar")
    image_filter: SoftLabel = _option("text-image", "teacher similarity that filters the image term")
    text_filter: SoftLabel = _option("text-text", "teacher similarity that filters the caption term")
    filter_score: Literal["cosine", "dot"] = _option("cosine", "how the filter compares teacher features")
    filter_inclusive: bool = _option(True, "a score that equals the threshold removes the negative")
    image_threshold: Threshold = _option(0.8, "score from which a negative leaves the image term: number, none or auto")
    text_threshold: Threshold = _option(
        0.8, "score from which a negative leaves the caption term: number, none or auto"
    )
    filter_calibration: Calibration = _option("none", "compare thresholds with scores, or with shares of pairs (0.99)")
    filter_relative: bool = _option(False, "remove the negatives that score above the positive, without a threshold")
    filter_slack: float = _option(0.0, "how far below the positive's score a negative may be to leave")
    soft_label_calibration: Calibration = _option("none", "margins by scores, or by shares of pairs that score less")
    same_image: Literal["negative", "remove", "positive"] = _option(
        "negative", "what captions of one image are to each other in a batch"
    )
    same_image_weight: float = _option(1.0, "weight of captions of one image as soft positives")
    multimodal_weight: Weight = _option(0.01, "lambda, the weight of the cross-modal terms: number or auto")
    view_reduction: Literal["sum", "mean"] = _option("sum", "how the two dropout views are combined")
    modality_reduction: Literal["sum", "mean"] = _option("mean", "how the image and caption terms are combined")
    projection_dim: int = _option(256, "width of the shared space of student and teacher")
    list_weight: float = _option(0.0, "weight of list distillation from the teacher on pair batches")
    list_text_weight: float = _option(1.0, "weight of text-text scores in the teacher's lists")
    list_cross_weight: float = _option(0.5, "weight of text-image scores in the teacher's lists")
    list_image_weight: float = _option(0.25, "weight of image-image scores in the teacher's lists")
    list_temperature: float = _option(0.5, "temperature of the teacher's lists, in standard deviations of its scores")
    list_student_temperature: float = _option(0.05, "temperature of the student's lists")
    list_loss: Literal["listnet", "listmle"] = _option("listnet", "compare lists as distributions or by their order")
    list_length: int = _option(16, "ranks that listmle reads")
    list_shuffle: bool = _option(False, "shuffle the teacher's scores within groups of about the same rank")
    consistency_weight: float = _option(0.0, "weight of the consistency of two views' lists on text batches")
    retention_weight: float = _option(0.0, "weight of list distillation from the untrained student on text batches")
    reverse_margin: bool = _option(False, "margins as wide as the teacher finds a pair alike", hidden=True)

    def __post_init__(self) -> None:
        _check_shared(self)
        _check(self, "margin", _is_angle(self.margin), "in [0, pi]")
        for name in ("image_soft_label", "text_soft_label", "image_filter", "text_filter"):
            _check_choice(self, name, get_args(SoftLabel))
        for name in ("filter_calibration", "soft_label_calibration"):
            _check_choice(self, name, get_args(Calibration))
        for name in ("view_reduction", "modality_reduction"):
            _check_choice(self, name, ("sum", "mean"))
        _check_choice(self, "filter_score", ("cosine", "dot"))
        _check_choice(self, "same_image", ("negative", "remove", "positive"))
        _check_choice(self, "list_loss", ("listnet", "listmle"))
        for name in (
            "margin_guard",
            "filter_negatives",
            "filter_inclusive",
            "filter_relative",
            "list_shuffle",
            "reverse_margin",
        ):
            _check(self, name, isinstance(getattr(self, name), bool), "True or False")
        for name in (
            "text_weight",
            "same_image_weight",
            "list_weight",
            "list_text_weight",
            "list_cross_weight",
            "list_image_weight",
            "consistency_weight",
            "retention_weight",
        ):
            _check_weight(self, name)
        for name in ("list_temperature", "list_student_temperature"):
            _check_temperature(self, name)
        _check(self, "filter_slack", _is_number(self.filter_slack), "a number")
        _check_whole(self, "list_length")
        self._check_filter()
        on_text = self.text_weight + self.consistency_weight + self.retention_weight
        _check(self, "text_weight", on_text > 0, "above 0 without consistency and retention")
        auto = self.multimodal_weight == "auto"
        on_pairs = self.text_weight + self.list_weight + (0 if auto else float(self.multimodal_weight))
        needed = "above 0 where multimodal_weight is auto, or where it and list_weight are 0"
        _check(self, "text_weight", self.text_weight > 0 or (on_pairs > 0 and not auto), needed)
        branches = self.list_text_weight + self.list_cross_weight + self.list_image_weight
        _check(self, "list_weight", not self.list_weight or branches > 0, "0 where all three branches have weight 0")

    def _check_filter(self) -> None:
        calibrated = self.filter_negatives and self.filter_calibration != "none"
        _check(self, "filter_score", not calibrated or self.filter_score == "cosine", '"cosine" with a calibration')
        for name in ("image_threshold", "text_threshold"):
            value = getattr(self, name)
            _check(self, name, value is None or value == "auto" or _is_number(value), 'a number, None or "auto"')
            share = value is None or (_is_number(value) and 0 <= value <= 1)
            _check(self, name, share or not calibrated, "a share of pairs from 0 to 1, or None, with a calibration")

    @classmethod
    def paper(cls, **overrides: Any) -> KDMCSEConfig:
        """The method as the paper prints it."""
        return cls(**overrides)

    @classmethod
    def released(cls, **overrides: Any) -> KDMCSEConfig:
        """The method as the authors' released code computes it."""
        return cls(**(_RELEASED | overrides))

    @classmethod
    def grounded(cls, **overrides: Any) -> KDMCSEConfig:
        """The method with more of the teacher: its lists on the sentence embeddings, and captions of one image alike.

        It is meant for heads with a learning rate of 1e-3 and batches of two captions an image
        (``head_learning_rate``, ``captions_per_image_in_batch`` of :class:`~st_kdmcse.KDMCSETrainer`). Its gains are as
        large with permuted pictures: they are those of the captions' features, and of knowing which captions belong
        together.
        """
        return cls(**(_GROUNDED | overrides))


_RELEASED: dict[str, Any] = {
    "margin": 0.15,
    "text_margin": 0.15,
    "image_soft_label": "image-image",
    "text_filter": "image-text",
    "filter_negatives": False,
    "filter_score": "dot",
    "filter_inclusive": False,
    "view_reduction": "mean",
    "modality_reduction": "sum",
}


_GROUNDED: dict[str, Any] = {"multimodal_weight": 0.1, "list_weight": 1.0, "same_image": "positive"}


@dataclass(frozen=True)
class MCSEConfig:
    """The options of MCSE, named and checked as in :class:`KDMCSEConfig`; the defaults are MCSE's.

    Args:
        multimodal_weight: lambda, the weight of the cross-modal terms, >= 0, or "auto".
        temperature: of the cross-modal terms, > 0.
        text_temperature: of the text loss, > 0.
        text_margin: a fixed margin in radians on the negatives of the text loss, in [0, pi]; 0 is MCSE.
        projection_dim: width of the shared space, >= 1.

    Raises:
        ValueError: for a value out of range, by name.
    """

    multimodal_weight: Weight = 0.01
    temperature: float = 0.05
    text_temperature: float = 0.05
    text_margin: float = 0.0
    projection_dim: int = 256

    def __post_init__(self) -> None:
        _check_shared(self)

    def as_kdmcse(self) -> KDMCSEConfig:
        """The same as options of KDMCSE: no margin, no filter, and the sum over the modalities."""
        return KDMCSEConfig(margin=0.0, filter_negatives=False, modality_reduction="sum", **asdict(self))


def _check(config: KDMCSEConfig | MCSEConfig, name: str, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{type(config).__name__}: `{name}` must be {expected}, got {getattr(config, name)!r}")


def _check_choice(config: KDMCSEConfig, name: str, choices: tuple[str, ...]) -> None:
    _check(config, name, getattr(config, name) in choices, f"one of {', '.join(choices)}")


def _check_weight(config: KDMCSEConfig | MCSEConfig, name: str) -> None:
    value = getattr(config, name)
    _check(config, name, _is_number(value) and value >= 0, "a number >= 0")


def _check_temperature(config: KDMCSEConfig | MCSEConfig, name: str) -> None:
    value = getattr(config, name)
    _check(config, name, _is_number(value) and value > 0, "a positive number")


def _check_whole(config: KDMCSEConfig | MCSEConfig, name: str) -> None:
    value = getattr(config, name)
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    _check(config, name, whole, "a whole number >= 1")


def _check_shared(config: KDMCSEConfig | MCSEConfig) -> None:
    """Check the options that both methods have."""
    _check(config, "text_margin", _is_angle(config.text_margin), "in [0, pi]")
    for name in ("temperature", "text_temperature"):
        _check_temperature(config, name)
    if config.multimodal_weight != "auto":
        _check_weight(config, "multimodal_weight")
    _check_whole(config, "projection_dim")


def _is_angle(value: object) -> bool:
    return _is_number(value) and 0 <= value <= math.pi


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
