"""How many times as fast one contestant is as another, when both took turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The ratio of their seconds to ours in each round: median, least and greatest."""
    ratios = [other / mine for mine, other in zip(ours, theirs, strict=True)]
    return {
        "median": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "greatest": round(max(ratios), 3),
    }
