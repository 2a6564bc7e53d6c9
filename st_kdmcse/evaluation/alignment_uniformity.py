"""Alignment and uniformity on the development set of STS-B (Table 2 of the paper; Eq. 15, 16)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer

from st_kdmcse.data import STSPairs, STSTask
from st_kdmcse.encoding import encode_distinct
from st_kdmcse.evaluation.plots import COLORS, MARKERS, elided, new_figure
from st_kdmcse.evaluation.sts import score_embeddings
from st_kdmcse.functional import alignment, uniformity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POSITIVE_SCORE = 4.0
"""From this gold similarity on, of 5, a pair is positive."""
_LABEL_CHARACTERS = 40


@dataclass(frozen=True)
class AlignmentUniformity:
    """A row of Table 2.

    Attributes:
        label: the model.
        alignment: mean squared distance of the positive pairs, from 0 to 4; smaller is better (Eq. 15).
        uniformity: logarithm of the mean Gaussian potential of all pairs of sentences at t = 2, from -8 to 0; smaller
            is better (Eq. 16).
        spearman: Spearman correlation x 100 of the cosines with the gold similarities, as
            :func:`~st_kdmcse.evaluation.sts.evaluate_sts` computes it.
        positives: number of positive pairs.
        sentences: number of sentences, of both columns, with repetitions.
    """

    label: str
    alignment: float
    uniformity: float
    spearman: float
    positives: int
    sentences: int

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        return asdict(self)


def alignment_uniformity(
    model: SentenceTransformer, pairs: STSPairs, label: str = "model", show_progress_bar: bool | None = None
) -> AlignmentUniformity:
    """Measure a model's alignment and uniformity, over the whole set at once.

    Eq. 15 is taken over the pairs with a gold similarity of at least 4, Eq. 16 over the sentences of both columns, a
    sentence that occurs in several pairs as often as it occurs.

    The numbers are not on the scale of the paper's Table 2. MCSE's published code, which the paper builds on, sorts the
    pairs by length, computes both in each batch, and averages over the batches: a batch without a positive pair counts
    as an alignment of 0, and sentences are compared with those of similar length only. Compare models with models that
    were measured here.

    Args:
        model: any sentence-transformers model.
        pairs: usually the development set of STS-B (:func:`~st_kdmcse.data.load_sts_benchmark`).
        label: what the model is called in tables and plots.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Raises:
        ValueError: if no pair is positive, the gold similarities or the cosines are all the
            same, or an embedding is not finite.
    """
    positive = torch.tensor(pairs.scores) >= POSITIVE_SCORE
    if not positive.any():
        raise ValueError(f"{pairs.name} has no pair with a gold similarity of {POSITIVE_SCORE:g} or more to align")
    sentences = [*pairs.sentences1, *pairs.sentences2]
    places = [*pairs.places, *pairs.places]
    embeddings = encode_distinct(
        model, sentences, show_progress_bar=show_progress_bar, where=places.__getitem__ if places else None
    )
    first, second = (torch.from_numpy(embeddings(column)) for column in (pairs.sentences1, pairs.sentences2))
    spearman = score_embeddings(embeddings, [STSTask("STS-B", (pairs,))]).details["STS-B"]["spearman"]["all"]
    if spearman is None:
        raise ValueError(f"{label}, {pairs.name}: the gold similarities or the cosines are all the same")
    return AlignmentUniformity(
        label=label,
        alignment=alignment(first[positive], second[positive]).item(),
        uniformity=uniformity(torch.cat([first, second])).item(),
        spearman=spearman,
        positives=int(positive.sum()),
        sentences=len(sentences),
    )


def table(results: Sequence[AlignmentUniformity]) -> str:
    """A row a model: alignment, uniformity, Spearman.

    Args:
        results: at least one, of the same pairs.
    """
    width = max(5, *(len(result.label) for result in results))
    lines = [f"{'model':{width}}  alignment  uniformity  STS-B dev, Spearman x 100"]
    lines += [
        f"{result.label:{width}}  {result.alignment:9.4f}  {result.uniformity:10.4f}  {result.spearman:25.2f}"
        for result in results
    ]
    first = results[0]
    pairs = f"{first.positives} positive pairs, {first.sentences:,} sentences"
    return "\n".join([*lines, f"{pairs}; smaller alignment and uniformity are better"])


def plot_alignment_uniformity(results: Sequence[AlignmentUniformity]) -> Figure:
    """A marker a model: uniformity on x, alignment on y, the Spearman correlation in the legend.

    Args:
        results: of the same pairs.
    """
    labels = [f"{elided(result.label, _LABEL_CHARACTERS)}: {result.spearman:.2f}" for result in results]
    longest = max(map(len, labels))
    figure, (axes,) = new_figure(width=5.5 + 0.08 * longest, height=max(4.0, 1 + 0.25 * len(results)))
    for number, result in enumerate(results):
        axes.scatter(
            result.uniformity,
            result.alignment,
            s=80,
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[(number + number // len(COLORS)) % len(MARKERS)],
            edgecolors="white",
            label=labels[number],
            zorder=3,
        )
    axes.margins(0.15)
    axes.set(
        title="STS-B dev; smaller is better",
        xlabel="uniformity (log of the mean potential, t = 2)",
        ylabel="alignment (mean squared distance)",
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, title="Spearman x 100", alignment="left")
    return figure
