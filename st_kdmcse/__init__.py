"""Sentence encoders trained with knowledge from CLIP: KDMCSE and its relatives for sentence-transformers."""

from st_kdmcse import functional
from st_kdmcse.attach import attach_features
from st_kdmcse.collator import KDMCSEDataCollator
from st_kdmcse.config import KDMCSEConfig
from st_kdmcse.data import FeatureStore, FeatureStoreWriter, import_released_json, read_sentences
from st_kdmcse.examples import MultimodalInputExample, check_examples
from st_kdmcse.fit import fit_objectives
from st_kdmcse.losses import ArcCSELoss, KDMCSELoss, MCSELoss, SimCSELoss
from st_kdmcse.schedule import StepRatioBatchSampler
from st_kdmcse.student import build_student
from st_kdmcse.trainer import KDMCSETrainer

__version__ = "0.1.0"

__all__ = [
    "ArcCSELoss",
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
    "attach_features",
    "build_student",
    "check_examples",
    "fit_objectives",
    "functional",
    "import_released_json",
    "read_sentences",
]
