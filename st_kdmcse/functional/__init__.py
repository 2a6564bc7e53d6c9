"""The mathematics of SimCSE, ArcCSE, KDMCSE and list distillation as pure functions of tensors.

Equation numbers are those of KDMCSE (Nguyen et al., NAACL 2024, arXiv 2403.17486). Every function normalises its rows
itself, so that the length of a vector never matters, and works in float32 (float64 stays float64), whatever the input
and whether or not autocast is on. A zero vector has cosine 0 with everything and receives no gradient. All values and
gradients are finite for finite inputs; NaN in an input is NaN in the result.

Shapes: N anchors, M >= N candidates, dimension d. The candidate of anchor ``i`` is row ``i + positive_offset``; M > N
and an offset occur where the candidates of several processes are gathered.
"""

from st_kdmcse.functional.calibration import (
    ScoreStatistics,
    empirical_distribution,
    fuse,
    score_statistics,
    standardize,
)
from st_kdmcse.functional.contrastive import (
    adap_acse,
    arc_cse,
    info_nce,
    info_nce_with_margin,
    relative_filter,
    soft_targets,
    threshold_filter,
)
from st_kdmcse.functional.cosines import cosine_similarity_matrix, dot_product_matrix, positive_mask
from st_kdmcse.functional.lists import ListLoss, list_consistency, list_distillation, shuffle_groups
from st_kdmcse.functional.spread import alignment, uniformity

__all__ = [
    "ListLoss",
    "ScoreStatistics",
    "adap_acse",
    "alignment",
    "arc_cse",
    "cosine_similarity_matrix",
    "dot_product_matrix",
    "empirical_distribution",
    "fuse",
    "info_nce",
    "info_nce_with_margin",
    "list_consistency",
    "list_distillation",
    "positive_mask",
    "relative_filter",
    "score_statistics",
    "shuffle_groups",
    "soft_targets",
    "standardize",
    "threshold_filter",
    "uniformity",
]
