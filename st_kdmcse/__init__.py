"""Sentence encoders trained with knowledge from CLIP: KDMCSE and its relatives for sentence-transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from st_kdmcse._version import __version__

if TYPE_CHECKING:
    from st_kdmcse import functional
    from st_kdmcse.config import KDMCSEConfig, MCSEConfig
    from st_kdmcse.data import FeatureStore, FeatureStoreWriter, import_released_json, read_sentences
    from st_kdmcse.evaluation.sts import STSEvaluator
    from st_kdmcse.extraction import extract
    from st_kdmcse.losses import (
        ArcCSELoss,
        CachedKDMCSELoss,
        CachedMCSELoss,
        CachedSimCSELoss,
        KDMCSELoss,
        MCSELoss,
        SimCSELoss,
    )
    from st_kdmcse.search import SemanticIndex
    from st_kdmcse.teachers import OpenCLIPTeacher
    from st_kdmcse.training.attach import attach_features
    from st_kdmcse.training.collator import KDMCSEDataCollator
    from st_kdmcse.training.examples import MultimodalInputExample
    from st_kdmcse.training.fit import fit_objectives
    from st_kdmcse.training.retrieval import ImageTextRetrievalEvaluator
    from st_kdmcse.training.student import build_student
    from st_kdmcse.training.text_image import export_text_image
    from st_kdmcse.training.trainer import KDMCSETrainer
    from st_kdmcse.training.unpadding import unpadded

__all__ = [
    "ArcCSELoss",
    "CachedKDMCSELoss",
    "CachedMCSELoss",
    "CachedSimCSELoss",
    "FeatureStore",
    "FeatureStoreWriter",
    "ImageTextRetrievalEvaluator",
    "KDMCSEConfig",
    "KDMCSEDataCollator",
    "KDMCSELoss",
    "KDMCSETrainer",
    "MCSEConfig",
    "MCSELoss",
    "MultimodalInputExample",
    "OpenCLIPTeacher",
    "STSEvaluator",
    "SemanticIndex",
    "SimCSELoss",
    "__version__",
    "attach_features",
    "build_student",
    "export_text_image",
    "extract",
    "fit_objectives",
    "functional",
    "import_released_json",
    "read_sentences",
    "unpadded",
]

_MODULES = {
    "ArcCSELoss": "losses",
    "CachedKDMCSELoss": "losses",
    "CachedMCSELoss": "losses",
    "CachedSimCSELoss": "losses",
    "FeatureStore": "data",
    "FeatureStoreWriter": "data",
    "ImageTextRetrievalEvaluator": "training.retrieval",
    "KDMCSEConfig": "config",
    "KDMCSEDataCollator": "training.collator",
    "KDMCSELoss": "losses",
    "KDMCSETrainer": "training.trainer",
    "MCSEConfig": "config",
    "MCSELoss": "losses",
    "MultimodalInputExample": "training.examples",
    "OpenCLIPTeacher": "teachers",
    "STSEvaluator": "evaluation.sts",
    "SemanticIndex": "search",
    "SimCSELoss": "losses",
    "attach_features": "training.attach",
    "build_student": "training.student",
    "export_text_image": "training.text_image",
    "extract": "extraction",
    "fit_objectives": "training.fit",
    "import_released_json": "data",
    "read_sentences": "data",
    "unpadded": "training.unpadding",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    """Import a name when it is used: PyTorch takes seconds, and ``st-kdmcse --help`` does not need it."""
    if name == "functional":
        return import_module("st_kdmcse.functional")
    if name in _MODULES:
        return getattr(import_module(f"st_kdmcse.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'st_kdmcse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
