"""The figures of a report: curves, scores by seed, and scores by margin."""

# ruff: noqa: RUF001 - a true times sign in what people read

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from st_kdmcse.data.sts import STS_TASKS
from st_kdmcse.evaluation.plots import COLORS, MARKERS, new_figure
from st_kdmcse.experiments.comparison import PRESENT, Comparison
from st_kdmcse.experiments.runs import Group
from st_kdmcse.experiments.statistics import summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_SEEDS: dict[str, Any] = {"linestyle": "", "markersize": 7, "alpha": 0.7}


DEV_AXIS = "STS-B dev, Spearman × 100"


def curves_figure(comparison: Comparison) -> Figure:
    """STS-B dev against the step: the mean over seeds, and a band of one standard deviation on either side."""
    labels = [fill(f"{row.group.label} ({seeds_of(row.group)})", 80) for row in comparison.rows]
    longest = max(map(len, "\n".join(labels).split("\n")))
    columns = 3 if longest <= 22 else 2 if longest <= 36 else 1
    figure, (axes,) = new_figure(
        width=7.5, height=4.2 + 0.25 * (sum(1 + label.count("\n") for label in labels) // columns)
    )
    alpha = 0.15 if len(labels) <= 4 else 0.07
    for number, row in enumerate(comparison.rows):
        color, marker = look(number)
        curves = [dict(run.curve) for run in row.group.runs]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        if not steps:
            continue
        points = [summarize([curve[step] for curve in curves]) for step in steps]
        means = np.array([point.mean for point in points])
        spread = np.array([point.std or 0.0 for point in points])
        every = max(1, len(steps) // 12)
        axes.plot(steps, means, color=color, marker=marker, markersize=5, markevery=every, label=labels[number])
        axes.fill_between(steps, means - spread, means + spread, color=color, alpha=alpha, linewidth=0)
    if any(len(row.group.runs) > 1 for row in comparison.rows):
        axes.fill_between([], [], [], color="#555555", alpha=0.25, linewidth=0, label="± standard deviation")
    axes.set_xlabel("optimizer steps (0 = before training)")
    axes.set_ylabel(DEV_AXIS)
    axes.locator_params(axis="x", integer=True)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def scores_figure(comparison: Comparison) -> Figure:
    """The score of each run, and mean and standard deviation of each method."""
    rows = [row for row in comparison.rows if row.compared]
    labels = [fill(row.group.label, 40) for row in rows]
    longest = max(map(len, "\n".join(labels).split("\n")))
    lines = max(label.count("\n") + 1 for label in labels)
    figure, (axes,) = new_figure(width=5.5 + 0.07 * longest, height=1.4 + max(0.5, 0.2 * lines) * len(rows))
    for number, row in enumerate(rows):
        color, marker = look(number)
        score = summarize(row.compared or [])
        axes.plot(row.compared or [], np.full(score.n, number + 0.25), color=color, marker=".", **_SEEDS)
        axes.errorbar(score.mean, number, xerr=score.std, color=color, marker=marker, markersize=7, capsize=4)
    axes.plot([], [], color="#555555", marker=".", label="a seed", **_SEEDS)
    axes.errorbar([], [], xerr=[], color="#555555", marker="o", capsize=4, label="mean ± standard deviation")
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"Spearman × 100, {measure_of(comparison)}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def margin_figure(comparison: Comparison) -> Figure:
    """Score against the margin: mean and standard deviation over seeds, the best marked.

    Args:
        comparison: of runs with one margin a group.
    """
    rows = sorted(comparison.rows, key=lambda row: margin_of(row.group))
    panels = [
        ("STS-B dev, best checkpoint", [(margin_of(row.group), row.dev["best"]) for row in rows]),
        (measure_of(comparison), [(margin_of(row.group), row.best[PRESENT]) for row in rows]),
    ]
    figure, all_axes = new_figure(columns=2, width=5.2, height=4.2)
    for number, (axes, (title, points)) in enumerate(zip(all_axes, panels, strict=True)):
        known = [(margin, score) for margin, score in points if score is not None]
        color, marker = look(number)
        if known:
            margins = [margin for margin, _ in known]
            means = [score.mean for _, score in known]
            axes.errorbar(
                margins,
                means,
                yerr=[score.std or 0.0 for _, score in known],
                color=color,
                marker=marker,
                capsize=4,
                label="mean ± standard deviation" if any(score.std for _, score in known) else "one seed",
            )
            best = int(np.argmax(means))
            axes.plot(
                margins[best],
                means[best],
                linestyle="",
                marker="o",
                markersize=15,
                markerfacecolor="none",
                markeredgecolor="black",
                label=f"highest mean: {means[best]:.2f} at {margins[best]:g}",
            )
            axes.set_xticks(margins, [f"{margin:g}" for margin in margins], rotation=45)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
        axes.set_title(title)
        axes.set_xlabel("margin m in radians")
        axes.set_ylabel("Spearman × 100")
    return figure


def measure_of(comparison: Comparison) -> str:
    """What is compared, in words."""
    names = list(comparison.tasks)
    if set(names) == set(STS_TASKS):
        return "average of the seven tasks"
    if not names:
        return "STS-B test score"
    return f"mean of {', '.join(names)}" if len(names) > 1 else f"{names[0]} score"


def margin_of(group: Group) -> float:
    """The margin of a group, in radians."""
    margin = group.runs[0].setting("margin")
    if margin is None:
        raise ValueError(f"{group.label} has no margin")
    return float(margin)


def look(number: int) -> tuple[str, str]:
    """Colour and marker; markers shift by one after each round of colours."""
    return COLORS[number % len(COLORS)], MARKERS[(number + number // len(COLORS)) % len(MARKERS)]


def seeds_of(group: Group) -> str:
    """The seeds of a group, for people."""
    return f"{len(group.runs)} seeds" if len(group.runs) > 1 else "1 seed"
