"""Figures 5 and 6 of the paper for a feature store: scores of pairs with the thresholds, and ranks of true captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from st_kdmcse.evaluation.plots import COLORS, new_figure
from st_kdmcse.evaluation.threshold_statistics import (
    BINS,
    PAPER_THRESHOLD,
    BranchStatistics,
    CaptionRanks,
    ThresholdStatistics,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_threshold_statistics(statistics: ThresholdStatistics) -> Figure:
    """Histograms of the scores with the thresholds (Figure 6), and the curve of the ranks (Figure 5).

    Args:
        statistics: of one store.
    """
    panels = len(statistics.branches) + (statistics.ranks is not None)
    figure, axes = new_figure(panels, width=4.6, height=3.8)
    for branch, panel in zip(statistics.branches, axes, strict=False):
        _plot_histograms(panel, branch)
    if statistics.ranks is not None:
        _plot_ranks(axes[-1], statistics.ranks)
    return figure


def _plot_histograms(panel: Axes, branch: BranchStatistics) -> None:
    edges = np.linspace(-1, 1, BINS + 1)
    pairs = ("two captions of one image", "captions of two images")
    if branch.name == "text-image":
        pairs = ("caption and its image", "caption and another image")
    for histogram, name, color in zip((branch.true_histogram, branch.non_histogram), pairs, COLORS, strict=False):
        if histogram.any():
            panel.stairs(100 * histogram / histogram.sum(), edges, fill=True, color=color, alpha=0.45, label=name)
    for effect, style, name in ((branch.proposed, "-", "proposed"), (branch.paper, "--", "paper")):
        if effect is not None:
            label = f"{name}: {effect.threshold:.2f}"
            panel.axvline(effect.threshold, color="black", linestyle=style, linewidth=1.2, label=label)
    filled = np.flatnonzero(branch.true_histogram + branch.non_histogram)
    panel.set_xlim(edges[filled[0]] - 0.02, max(edges[filled[-1] + 1], PAPER_THRESHOLD) + 0.02)
    panel.set(title=f"{branch.name} scores", xlabel="cosine of the teacher features", ylabel="share of pairs in %")
    _legend_below(panel)


def _plot_ranks(panel: Axes, ranks: CaptionRanks) -> None:
    ordered = np.sort(ranks.ranks)
    shares = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
    panel.step(ordered, shares, where="post", color=COLORS[0], label="an image's own captions")
    chance = np.geomspace(1, ranks.captions, 200)
    panel.plot(chance, 100 * chance / ranks.captions, color=COLORS[6], linestyle=":", label="chance")
    median = float(np.median(ranks.ranks))
    panel.axvline(median, color="black", linewidth=1.2, label=f"median: {median:,.0f}")
    panel.set(
        xscale="log",
        xlim=(1, ranks.captions),
        ylim=(0, 100),
        title="rank of the true captions of an image",
        xlabel=f"rank among all {ranks.captions:,} captions",
        ylabel="share up to that rank in %",
    )
    _legend_below(panel)


def _legend_below(panel: Axes) -> None:
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8, frameon=False)
