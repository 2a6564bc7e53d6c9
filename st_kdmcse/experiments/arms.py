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
_LEARNING = {"head_learning_rate": 1e-3}
_WEIGHT = {"multimodal_weight": 0.1}

ARMS: dict[str, Arm] = {
    "simcse": Arm("SimCSE", "simcse"),
    "mcse": Arm("MCSE, heads that learn", "mcse", _WEIGHT, _LEARNING),
    "kdmcse-paper": Arm("KDMCSE as printed", "kdmcse"),
    "kdmcse": Arm("KDMCSE, heads that learn", "kdmcse", _WEIGHT, _LEARNING),
    "kdmcse-ridge": Arm("KDMCSE, heads aligned and learning", "kdmcse", _WEIGHT, {**_LEARNING, "head_init": "ridge"}),
    "kdmcse-permuted": Arm(
        "KDMCSE, heads that learn, pictures permuted", "kdmcse", _WEIGHT, {**_LEARNING, "permute_images": True}
    ),
}
"""The arms by name. All train on the captions as text too."""

CONTRASTS: tuple[Contrast, ...] = (
    Contrast("mcse", "simcse"),
    Contrast("kdmcse", "mcse"),
    Contrast("kdmcse", "simcse"),
    Contrast("kdmcse", "kdmcse-paper"),
    Contrast("simcse", "kdmcse-permuted"),
)
"""The family that Holm's correction is for; those of which an arm was not trained are left out."""
