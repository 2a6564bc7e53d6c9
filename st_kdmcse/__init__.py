"""Sentence encoders trained with knowledge from CLIP: KDMCSE and its relatives for sentence-transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from st_kdmcse._version import __version__

if TYPE_CHECKING:
    from st_kdmcse import functional
    from st_kdmcse.config import KDMCSEConfig
    from st_kdmcse.data import FeatureStore, FeatureStoreWriter, import_released_json, read_sentences
    from st_kdmcse.losses import (
        ArcCSELoss,
        CachedKDMCSELoss,
        CachedMCSELoss,
        CachedSimCSELoss,
        KDMCSELoss,
        MCSELoss,
        SimCSELoss,
    )
    from st_kdmcse.training.attach import attach_features
    from st_kdmcse.training.collator import KDMCSEDataCollator
    from st_kdmcse.training.examples import MultimodalInputExample, check_examples
    from st_kdmcse.training.fit import fit_objectives
    from st_kdmcse.training.schedule import StepRatioBatchSampler
    from st_kdmcse.training.student import build_student
    from st_kdmcse.training.trainer import KDMCSETrainer
    from st_kdmcse.training.unpadding import unpadded

__all__ = [
    "ArcCSELoss",
    "CachedKDMCSELoss",
    "CachedMCSELoss",
    "CachedSimCSELoss",
    "FeatureStore",
    "FeatureStoreWriter",
    "KDMCSEConfig",
    "KDMCSEDataCollator",
    "KDMCSELoss",
    "KDMCSETrainer",
    "MCSELoss",
    "MultimodalInputExample",
    "SimCSELoss",
    "StepRatioBatchSampler",
    "__version__",
    "attach_features",
    "build_student",
    "check_examples",
    "fit_objectives",
    "functional",
    "import_released_json",
    "read_sentences",
    "unpadded",
]

_MODULES = {
    "training.attach": ("attach_features",),
    "training.collator": ("KDMCSEDataCollator",),
    "config": ("KDMCSEConfig",),
    "data": ("FeatureStore", "FeatureStoreWriter", "import_released_json", "read_sentences"),
    "training.examples": ("MultimodalInputExample", "check_examples"),
    "training.fit": ("fit_objectives",),
    "losses": (
        "ArcCSELoss",
        "CachedKDMCSELoss",
        "CachedMCSELoss",
        "CachedSimCSELoss",
        "KDMCSELoss",
        "MCSELoss",
        "SimCSELoss",
    ),
    "training.schedule": ("StepRatioBatchSampler",),
    "training.student": ("build_student",),
    "training.trainer": ("KDMCSETrainer",),
    "training.unpadding": ("unpadded",),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is used: PyTorch takes seconds, and ``st-kdmcse --help`` does not need it."""
    if name == "functional":
        return import_module("st_kdmcse.functional")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"st_kdmcse.{module}"), name)
    raise AttributeError(f"module 'st_kdmcse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
