"""The methods of the paper's tables by name, and how the loss of each is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sentence_transformers import SentenceTransformer

from st_kdmcse.config import KDMCSEConfig, MCSEConfig
from st_kdmcse.data import FeatureStore
from st_kdmcse.losses import (
    CachedKDMCSELoss,
    CachedMCSELoss,
    CachedSimCSELoss,
    KDMCSELoss,
    MCSELoss,
    SimCSELoss,
)
from st_kdmcse.losses.base import TwoViewLoss

_ALL_OPTIONS = frozenset(option.name for option in fields(KDMCSEConfig))
_SIMCSE_OPTIONS = frozenset({"text_temperature", "text_margin"})
_MCSE_OPTIONS = frozenset(option.name for option in fields(MCSEConfig))


@dataclass(frozen=True)
class Method:
    """A row of the paper's tables.

    Attributes:
        loss: the class of its loss.
        cached_loss: the same loss with gradient caching.
        reads: the options of :class:`~st_kdmcse.KDMCSEConfig` that it has.
        needs_features: whether it learns from a teacher.
        fixed: the options of the config that define it.
        arguments: further arguments of the loss that define it.
    """

    loss: type[TwoViewLoss]
    cached_loss: type[TwoViewLoss]
    reads: frozenset[str]
    needs_features: bool = True
    fixed: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "kdmcse": Method(KDMCSELoss, CachedKDMCSELoss, _ALL_OPTIONS),
    "kdmcse-without-adapacse": Method(KDMCSELoss, CachedKDMCSELoss, _ALL_OPTIONS - {"margin"}, fixed={"margin": 0.0}),
    "kdmcse-without-filter": Method(
        KDMCSELoss, CachedKDMCSELoss, _ALL_OPTIONS - {"filter_negatives"}, fixed={"filter_negatives": False}
    ),
    "mcse": Method(MCSELoss, CachedMCSELoss, _MCSE_OPTIONS),
    "mcse-clip-text": Method(MCSELoss, CachedMCSELoss, _MCSE_OPTIONS, arguments={"use_captions": True}),
    "simcse": Method(SimCSELoss, CachedSimCSELoss, _SIMCSE_OPTIONS, needs_features=False),
}
"""The methods of Tables 1, 3 and 5 by name."""


def build_loss(
    method: str,
    model: SentenceTransformer,
    config: KDMCSEConfig,
    features: FeatureStore | None = None,
    gather_across_devices: bool = False,
    mini_batch_size: int | None = None,
) -> TwoViewLoss:
    """The loss of a method.

    Args:
        method: a name of :data:`METHODS`.
        model: the student.
        config: the options; a method reads those in its ``reads``.
        features: the teacher features, for a method that needs them.
        gather_across_devices: use the batches of all devices as negatives.
        mini_batch_size: sentences in a forward pass, for gradient caching; None or 0 turns it off.
    """
    row = METHODS[method]
    arguments: dict[str, Any] = {**row.arguments, "gather_across_devices": gather_across_devices}
    if mini_batch_size:
        arguments["mini_batch_size"] = mini_batch_size
    make: Any = row.cached_loss if mini_batch_size else row.loss
    loss: TwoViewLoss
    if not row.needs_features:
        loss = make(model, config.text_temperature, config.text_margin, **arguments)
        return loss
    if issubclass(make, MCSELoss):
        of_mcse = MCSEConfig(**{name: getattr(config, name) for name in _MCSE_OPTIONS})
        loss = make(model, of_mcse, features=features, **arguments)
    else:
        loss = make(model, config, features=features, **arguments)
    return loss
