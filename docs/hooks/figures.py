"""Draw the figures of the site: python docs/hooks/figures.py FEATURES REPORT.json.

FEATURES is a feature store of photographs (the site's are of 984 images of Flickr8k), REPORT.json that of the grounding
experiment. The files go to docs/images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from st_kdmcse import FeatureStore

IMAGES = Path(__file__).parents[1] / "images"
GREY, BLUE, ORANGE, GREEN = "#808080", "#4c78a8", "#e4843c", "#54a24b"  # on white as on black
MARGIN, QUANTILE_MARGIN, PAPER_THRESHOLD = 0.125, 0.25, 0.8
_STYLE = {
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.titlecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "svg.hashsalt": "st_kdmcse",  # the same file each time
}


def main(features: str, report: str) -> None:
    """Draw all figures."""
    IMAGES.mkdir(exist_ok=True)
    plt.rcParams.update(_STYLE)
    store = FeatureStore.open(features)
    images, texts = (np.asarray(array, dtype=np.float32) for array in (store.image_features, store.text_features))
    generator = np.random.default_rng(0)
    rows = generator.integers(len(store), size=(2, 100_000))
    apart = store.image_rows[rows[0]] != store.image_rows[rows[1]]
    first, second = rows[0][apart], rows[1][apart]
    other = {
        "text-image": (texts[first] * images[store.image_rows[second]]).sum(axis=1),
        "text-text": (texts[first] * texts[second]).sum(axis=1),
    }
    true = {"text-image": (texts * images[store.image_rows]).sum(axis=1), "text-text": _of_one_image(store, texts)}
    _save(_margins(other), "margins")
    _save(_thresholds(true, other), "thresholds")
    _save(_results(json.loads(Path(report).read_text(encoding="utf-8"))), "results")


def _of_one_image(store: FeatureStore, texts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    order = np.argsort(store.image_rows, kind="stable")
    same = store.image_rows[order][1:] == store.image_rows[order][:-1]
    scores: np.ndarray[Any, Any] = (texts[order[1:][same]] * texts[order[:-1][same]]).sum(axis=1)
    return scores


def _margins(other: dict[str, np.ndarray[Any, Any]]) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    angles = np.linspace(0, np.pi, 400)
    left.plot(angles, np.cos(angles), color=GREY, label="Δ = 0: alike in the teacher's eyes")
    for delta, color in ((0.5, ORANGE), (1.0, BLUE)):
        moved = np.where(angles > MARGIN * delta, angles - MARGIN * delta, angles)
        left.plot(angles, np.cos(moved), color=color, label=f"Δ = {delta:g}" + (": unlike" if delta == 1 else ""))
    left.set(
        xlabel="angle θ of the negative (radians)",
        ylabel="cosine that enters the loss",
        xlim=(0, 2.2),
        ylim=(-0.6, 1.05),
    )
    left.set_title("a negative with margin m = 0.125", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    scores = other["text-text"]
    shares = np.argsort(np.argsort(scores)) / (len(scores) - 1)
    bins = np.linspace(0, 0.3, 61)
    for margins, color, label in (
        (MARGIN * np.abs(1 - scores), BLUE, "raw scores, m = 0.125"),
        (QUANTILE_MARGIN * (1 - shares), ORANGE, "quantiles, m = 0.25"),
    ):
        right.hist(
            margins, bins, weights=np.full(len(margins), 100 / len(margins)), color=color, alpha=0.6, label=label
        )
    right.set(xlabel="margin m Δ (radians)", ylabel="% of negatives")
    right.set_title("margins between captions of Flickr8k", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    return figure


def _thresholds(true: dict[str, Any], other: dict[str, Any]) -> Any:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    bins = np.linspace(-0.6, 1, 81)
    for panel, (kind, scores) in zip(panels, other.items(), strict=True):
        for values, color, label in ((scores, GREY, "different images"), (true[kind], GREEN, "one image")):
            weights = np.full(len(values), 100 / len(values))
            panel.hist(values, bins, weights=weights, color=color, alpha=0.6, label=label)
        median = float(np.median(true[kind]))
        for threshold, style, name in ((median, "-", "auto"), (PAPER_THRESHOLD, "--", "paper")):
            removed = 100 * (scores >= threshold).mean()
            label = f"{name}: {threshold:.2f}, removes {removed:.2g} %"
            panel.axvline(threshold, ymax=0.8, color=ORANGE, linestyle=style, label=label)
        panel.set(xlabel="teacher's cosine", ylabel="% of pairs")
        panel.set_title(f"{kind} scores", fontsize=10)
        panel.set_ylim(0, 1.5 * panel.get_ylim()[1])
        panel.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    return figure


def _results(report: dict[str, Any]) -> Any:
    names = {
        "simcse": "SimCSE",
        "mcse": "MCSE",
        "kdmcse": "KDMCSE",
        "lists-image": "SimCSE + lists of images",
        "lists-image-permuted": "same, pictures permuted",
        "recipe": "--recipe grounded",
        "recipe-permuted": "same, pictures permuted",
    }
    arms = {arm["name"]: arm["scores"][report["primary"]] for arm in report["arms"]}
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axis: Axes = axes
    for place, name in enumerate(names):
        scores = arms[name]
        color = GREY if name.endswith("permuted") else BLUE
        axis.plot(scores, np.full(len(scores), place), "|", color=color, markersize=12)
        axis.plot(np.mean(scores), place, "o", color=color, markersize=6)
        axis.annotate(
            f"{np.mean(scores):.2f}", (max(scores), place), xytext=(8, 0), textcoords="offset points", va="center"
        )
        axis.axhline(place, color=GREY, alpha=0.2, linewidth=0.8)
    before = report["before"][report["primary"]]
    axis.axvline(before, color=ORANGE, label=f"before training {before:.2f}")
    axis.set_yticks(range(len(names)), [*names.values()])
    axis.invert_yaxis()
    axis.set(xlabel="Spearman x 100, mean of STS12, STS-B, SICK-R, CxC; a stroke is a seed", xlim=(58, 72))
    axis.legend(frameon=False, fontsize=8, loc="center left")
    return figure


def _save(figure: Any, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
