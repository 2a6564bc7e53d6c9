"""The options of the method, and the two recipes as values of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeGuard, get_args

SoftLabel = Literal["text-text", "text-image", "image-text", "image-image"]
"""Which teacher features are compared: of the anchor, then of the candidate (the m, n of alpha^{m,n} in Eq. 7)."""

Threshold = float | Literal["auto"] | None
"""A score, None for no threshold, or "auto" to read it off the feature store."""


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class KDMCSEConfig:
    """Every choice of KDMCSE that the paper makes, leaves open, or makes differently from its released code.

    The defaults are the paper's (:meth:`paper`); :meth:`released` gives the choices of the authors' code. The ablations
    of the paper are values: ``margin=0`` is "without AdapACSE", ``filter_negatives=False`` "without threshold
    filtering".

    Args:
        margin: m of AdapACSE in radians, in [0, pi] (Eq. 12).
        margin_guard: apply the margin only to negatives whose angle exceeds it.
        temperature: of the two cross-modal terms, > 0.
        text_temperature: of the text loss, > 0.
        text_margin: a fixed margin on the negatives of the text loss, in [0, pi]; 0 is plain SimCSE.
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
        remove_same_image: also remove the cross-modal negatives that share the anchor's image.
        multimodal_weight: lambda, the weight of the cross-modal terms, >= 0.
        view_reduction: how the two dropout views of a term are combined.
        modality_reduction: how the image and caption terms are combined.
        projection_dim: width of the shared space, >= 1.

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
    remove_same_image: bool = _option(False, "remove the cross-modal negatives that share the anchor's image")
    multimodal_weight: float = _option(0.01, "lambda, the weight of the cross-modal terms")
    view_reduction: Literal["sum", "mean"] = _option("sum", "how the two dropout views are combined")
    modality_reduction: Literal["sum", "mean"] = _option("mean", "how the image and caption terms are combined")
    projection_dim: int = _option(256, "width of the shared space of student and teacher")

    def __post_init__(self) -> None:
        _check_shared(self)
        _check(self, "margin", _is_angle(self.margin), "in [0, pi]")
        for name in ("image_threshold", "text_threshold"):
            value = getattr(self, name)
            _check(self, name, value is None or value == "auto" or _is_number(value), 'a number, None or "auto"')
        for name in ("image_soft_label", "text_soft_label", "image_filter", "text_filter"):
            _check(self, name, getattr(self, name) in get_args(SoftLabel), f"one of {', '.join(get_args(SoftLabel))}")
        for name in ("view_reduction", "modality_reduction"):
            _check(self, name, getattr(self, name) in ("sum", "mean"), '"sum" or "mean"')
        for name in ("margin_guard", "filter_negatives", "filter_inclusive", "remove_same_image"):
            _check(self, name, isinstance(getattr(self, name), bool), "True or False")
        _check(self, "filter_score", self.filter_score in ("cosine", "dot"), '"cosine" or "dot"')

    @classmethod
    def paper(cls, **overrides: Any) -> KDMCSEConfig:
        """The method as the paper prints it."""
        return cls(**overrides)

    @classmethod
    def released(cls, **overrides: Any) -> KDMCSEConfig:
        """The method as the authors' released code computes it."""
        return cls(**(_RELEASED | overrides))


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


@dataclass(frozen=True)
class MCSEConfig:
    """The options of MCSE, named and checked as in :class:`KDMCSEConfig`; the defaults are MCSE's.

    Args:
        multimodal_weight: lambda, the weight of the cross-modal terms, >= 0.
        temperature: of the cross-modal terms, > 0.
        text_temperature: of the text loss, > 0.
        text_margin: a fixed margin in radians on the negatives of the text loss, in [0, pi]; 0 is MCSE.
        projection_dim: width of the shared space, >= 1.

    Raises:
        ValueError: for a value out of range, by name.
    """

    multimodal_weight: float = 0.01
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
        raise ValueError(f"{type(config).__name__}: {name} must be {expected}, got {getattr(config, name)!r}")


def _check_shared(config: KDMCSEConfig | MCSEConfig) -> None:
    """Check the options that both methods have."""
    _check(config, "text_margin", _is_angle(config.text_margin), "in [0, pi]")
    for name in ("temperature", "text_temperature"):
        value = getattr(config, name)
        _check(config, name, _is_number(value) and value > 0, "a positive number")
    weight, width = config.multimodal_weight, config.projection_dim
    _check(config, "multimodal_weight", _is_number(weight) and weight >= 0, "a number >= 0")
    whole = isinstance(width, int) and not isinstance(width, bool) and width > 0
    _check(config, "projection_dim", whole, "a whole number >= 1")


def _is_angle(value: object) -> bool:
    return _is_number(value) and 0 <= value <= math.pi


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
