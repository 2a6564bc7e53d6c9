"""The arms of the grounding experiment, and the differences that it tests: data, fixed before the runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Arm:
    """What is trained, beside what all arms share.

    Attributes:
        title: what a report calls it.
        method: a name of :data:`~st_kdmcse.training.methods.METHODS`.
        config: options of :class:`~st_kdmcse.KDMCSEConfig`.
        options: options of :class:`~st_kdmcse.training.options.TrainingOptions`.
    """

    title: str
    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


class Contrast(NamedTuple):
    """A difference that is tested.

    Attributes:
        first: an arm that is expected to be better, or no worse.
        second: the arm that it is compared with.
        expected: the least mean difference that is expected, in points.
    """

    first: str
    second: str
    expected: float = 0.0


# The heads learn: at the student's learning rate they keep their initial weights in so short a run.
_HEADS = {"head_learning_rate": 1e-3}
_TWO_CAPTIONS = {**_HEADS, "captions_per_image_in_batch": 2}
_PERMUTED = {"permute_images": True}
_LAMBDA = {"multimodal_weight": 0.1}
_TEXT_ALONE = {"multimodal_weight": 0.0}  # KDMCSELoss is SimCSE then, to the bit
_LISTS = {"list_weight": 1.0}
_IMAGE_LISTS = {"list_weight": 1.0, "list_text_weight": 0.0, "list_cross_weight": 0.0}
_CROSS_LISTS = {"list_weight": 1.0, "list_text_weight": 0.0, "list_image_weight": 0.0}
_CAPTION_LISTS = {"list_weight": 1.0, "list_cross_weight": 0.0, "list_image_weight": 0.0}
_PICTURE_LISTS = {"list_weight": 1.0, "list_text_weight": 0.0}  # cross 1 and image 0.5, without the captions' own
_QUANTILES = {"margin": 0.25, "soft_label_calibration": "quantile"}
_ONE_PERCENT = {"filter_calibration": "quantile", "image_threshold": 0.99, "text_threshold": 0.99}
_SOFT = {"same_image": "positive"}
_RECIPE = {"recipe": "grounded"}
_GENTLE = {"lr": 1e-5, "pair_every": 4}
_RETAIN = {"text_weight": 0.0, "retention_weight": 1.0}

ARMS: dict[str, Arm] = {
    "simcse": Arm("SimCSE", "simcse", {}, _HEADS),
    "simcse-remove": Arm(
        "SimCSE, captions of one image apart", "kdmcse", {**_TEXT_ALONE, "same_image": "remove"}, _HEADS
    ),
    "simcse-same-image": Arm(
        "SimCSE, captions of one image as soft positives", "kdmcse", {**_TEXT_ALONE, **_SOFT}, _TWO_CAPTIONS
    ),
    "mcse": Arm("MCSE", "mcse", _LAMBDA, _HEADS),
    "kdmcse-paper": Arm("KDMCSE as printed, heads at the student's learning rate", "kdmcse"),
    "kdmcse": Arm("KDMCSE", "kdmcse", _LAMBDA, _HEADS),
    "kdmcse-no-margin": Arm("KDMCSE without margins", "kdmcse", {**_LAMBDA, "margin": 0.0}, _HEADS),
    "kdmcse-reverse": Arm("KDMCSE, margins reversed", "kdmcse", {**_LAMBDA, "reverse_margin": True}, _HEADS),
    "kdmcse-quantile": Arm("KDMCSE, margins by quantiles", "kdmcse", {**_LAMBDA, **_QUANTILES}, _HEADS),
    "kdmcse-filter": Arm("KDMCSE, the most similar percent removed", "kdmcse", {**_LAMBDA, **_ONE_PERCENT}, _HEADS),
    "kdmcse-auto": Arm("KDMCSE, weight by gradients", "kdmcse", {"multimodal_weight": "auto"}, _HEADS),
    "kdmcse-ridge": Arm("KDMCSE, heads aligned first", "kdmcse", _LAMBDA, {**_HEADS, "head_init": "ridge"}),
    "kdmcse-permuted": Arm("KDMCSE, pictures permuted", "kdmcse", _LAMBDA, {**_HEADS, **_PERMUTED}),
    "lists-image": Arm("SimCSE + lists of images", "kdmcse", {**_TEXT_ALONE, **_IMAGE_LISTS}, _HEADS),
    "lists-image-permuted": Arm(
        "SimCSE + lists of images, permuted", "kdmcse", {**_TEXT_ALONE, **_IMAGE_LISTS}, {**_HEADS, **_PERMUTED}
    ),
    "lists-cross": Arm("SimCSE + lists of captions and images", "kdmcse", {**_TEXT_ALONE, **_CROSS_LISTS}, _HEADS),
    "lists-text": Arm("SimCSE + lists of captions", "kdmcse", {**_TEXT_ALONE, **_CAPTION_LISTS}, _HEADS),
    "lists": Arm("SimCSE + fused lists", "kdmcse", {**_TEXT_ALONE, **_LISTS}, _HEADS),
    "lists-shuffled": Arm(
        "SimCSE + fused lists, shuffled in groups", "kdmcse", {**_TEXT_ALONE, **_LISTS, "list_shuffle": True}, _HEADS
    ),
    "lists-mle": Arm(
        "SimCSE + fused lists, ListMLE", "kdmcse", {**_TEXT_ALONE, **_LISTS, "list_loss": "listmle"}, _HEADS
    ),
    "recipe": Arm("KDMCSE + fused lists + soft positives", "kdmcse", {}, _RECIPE),
    "recipe-permuted": Arm("the same, pictures permuted", "kdmcse", {}, {**_RECIPE, **_PERMUTED}),
    "pictures": Arm(
        "KDMCSE + lists without the text branch + soft positives",
        "kdmcse",
        {**_LAMBDA, **_PICTURE_LISTS, **_SOFT},
        _TWO_CAPTIONS,
    ),
    "pictures-permuted": Arm(
        "the same, pictures permuted",
        "kdmcse",
        {**_LAMBDA, **_PICTURE_LISTS, **_SOFT},
        {**_TWO_CAPTIONS, **_PERMUTED},
    ),
    "gentle": Arm("fused lists, retention, no text loss", "kdmcse", {**_TEXT_ALONE, **_LISTS, **_RETAIN}, _GENTLE),
}
"""The arms by name. All train on the captions as text too, in one order for each seed; those with soft positives draw
two captions of an image at a time."""

MAIN_ARMS = ("simcse", "mcse", "kdmcse", "recipe", "recipe-permuted", "lists-image", "lists-image-permuted")
"""Those that the tests are about."""

CONTRASTS: tuple[Contrast, ...] = (
    Contrast("mcse", "simcse"),
    Contrast("kdmcse", "mcse"),
    Contrast("recipe", "kdmcse", 0.8),
    Contrast("recipe", "simcse", 1.6),
    Contrast("simcse", "recipe-permuted"),
    Contrast("recipe", "recipe-permuted"),
    Contrast("lists-image", "simcse"),
    Contrast("lists-image", "lists-image-permuted"),
)
"""The family that Holm's correction is for; those of which an arm was not trained are left out."""

OPTIONS: tuple[Contrast, ...] = (
    Contrast("simcse-remove", "simcse"),
    Contrast("simcse-same-image", "simcse"),
    Contrast("kdmcse", "kdmcse-paper"),
    Contrast("kdmcse", "kdmcse-no-margin"),
    Contrast("kdmcse", "kdmcse-reverse"),
    Contrast("kdmcse-quantile", "kdmcse"),
    Contrast("kdmcse-filter", "kdmcse"),
    Contrast("kdmcse-ridge", "kdmcse"),
    Contrast("kdmcse-auto", "kdmcse"),
    Contrast("lists-text", "simcse"),
    Contrast("lists-cross", "simcse"),
    Contrast("lists", "simcse"),
    Contrast("lists-shuffled", "lists"),
    Contrast("lists-mle", "lists"),
)
"""One option at a time, against the arm that it is an option of: a family of its own."""
