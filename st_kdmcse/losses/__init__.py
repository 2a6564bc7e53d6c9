"""Loss modules for sentence-transformers."""

from st_kdmcse.losses.arccse import ArcCSELoss
from st_kdmcse.losses.cached import CachedKDMCSELoss, CachedMCSELoss, CachedSimCSELoss
from st_kdmcse.losses.components import LossComponents
from st_kdmcse.losses.kdmcse import KDMCSELoss
from st_kdmcse.losses.mcse import MCSELoss
from st_kdmcse.losses.simcse import SimCSELoss

__all__ = [
    "ArcCSELoss",
    "CachedKDMCSELoss",
    "CachedMCSELoss",
    "CachedSimCSELoss",
    "KDMCSELoss",
    "LossComponents",
    "MCSELoss",
    "SimCSELoss",
]
