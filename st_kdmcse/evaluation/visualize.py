"""Sentences under repeated dropout (Figures 8 to 12 of the paper), and nearest neighbours side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device, semantic_search

from st_kdmcse.encoding import encode_distinct
from st_kdmcse.evaluation.plots import COLORS, MARKERS, elided, new_figure
from st_kdmcse.files import progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = npt.NDArray[np.float32]

DEFAULT_SENTENCES = (
    "A dog runs along the beach with a stick in its mouth.",
    "A puppy carries a piece of wood across the sand.",
    "A dog sleeps on a sofa.",
    "Two children build a tower of wooden blocks.",
    "A boy and a girl are playing with toy bricks.",
    "The parliament voted against the new tax.",
    "Lawmakers rejected a proposal to raise taxes.",
    "The recipe needs two eggs and a cup of flour.",
)
"""Three pairs of like meaning, a sentence that shares only a word with one of them, and a stranger."""

_BATCH = 64
_LEGEND_CHARACTERS = 46
_MOST_SENTENCES = len(COLORS) * len(MARKERS)
_NARROWEST = 24


@dataclass(frozen=True)
class DropoutMap:
    """Embeddings of sentences under repeated dropout, and their t-SNE map.

    Attributes:
        label: the model.
        sentences: S sentences.
        points: (S, repeats, 2) positions on the map; only neighbourhoods have a meaning, units have none.
        within: mean cosine of two copies of one sentence; 1 without dropout.
        between: mean cosine of copies of two sentences.
        has_dropout: whether the copies of a sentence differ.
    """

    label: str
    sentences: Sequence[str]
    points: Points
    within: float
    between: float
    has_dropout: bool

    def to_dict(self) -> dict[str, Any]:
        """The map in types that JSON has, without the sentences."""
        return {
            "label": self.label,
            "within": self.within,
            "between": self.between,
            "has_dropout": self.has_dropout,
            "points": self.points.round(4).tolist(),
        }


@dataclass(frozen=True)
class Neighbour:
    """A sentence of the corpus that is near to a query.

    Attributes:
        sentence: the sentence.
        cosine: with the query.
    """

    sentence: str
    cosine: float


def dropout_copies(
    model: SentenceTransformer,
    sentences: Sequence[str],
    repeats: int = 20,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> Points:
    """Encode sentences several times with dropout at work, without gradients.

    Args:
        model: any sentence-transformers model; it is left in the mode in which it was.
        sentences: S sentences.
        repeats: R copies of each.
        seed: of the dropout masks; the state of torch's own generators is left alone.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Returns:
        (S, R, dimension) float32, of length 1.

    Raises:
        ValueError: if an embedding is not finite; names the sentence.
    """
    copies: list[list[torch.Tensor]] = []
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for _ in progress_bar(repeats, "Encoding", "copy", show_progress_bar, iterable=range(repeats)):
                batches = (list(sentences[start : start + _BATCH]) for start in range(0, len(sentences), _BATCH))
                copies.append([_embed(model, batch) for batch in batches])
    finally:
        model.train(was_training)
    embeddings = torch.stack([torch.cat(copy) for copy in copies], dim=1)
    bad = ~embeddings.isfinite().all(dim=2).all(dim=1)
    if bad.any():
        sentence = sentences[int(bad.nonzero()[0])]
        raise ValueError(f"the embedding of {sentence!r} is not finite: the model's weights are damaged")
    return np.asarray(torch.nn.functional.normalize(embeddings, dim=2).numpy())


def dropout_map(
    model: SentenceTransformer,
    sentences: Sequence[str] = DEFAULT_SENTENCES,
    repeats: int = 20,
    seed: int = 0,
    label: str = "model",
    show_progress_bar: bool | None = None,
) -> DropoutMap:
    """The t-SNE map of sentences that are encoded repeatedly under dropout.

    A good encoder keeps the copies of a sentence together and those of unrelated sentences apart. The perplexity is one
    and a half times the number of copies, so that the map shows which other sentences are near, or a third of all
    points where that is less.

    Args:
        model: any sentence-transformers model; without dropout all copies of a sentence are the same.
        sentences: 2 to 64 distinct sentences.
        repeats: copies of each, at least 2.
        seed: of dropout and t-SNE.
        label: what the model is called in the plot.
        show_progress_bar: of the encoding; None shows one in a terminal, after two seconds.

    Raises:
        ValueError: if there are too few or too many sentences, one occurs twice, or an embedding is not finite.
    """
    if not 2 <= len(sentences) <= _MOST_SENTENCES:
        raise ValueError(f"{len(sentences)} sentences: 2 to {_MOST_SENTENCES} can be told apart in a plot")
    if len(set(sentences)) < len(sentences):
        raise ValueError("a sentence occurs twice: leave out the repetition")
    if repeats < 2:
        raise ValueError(f"repeats is {repeats}: dropout shows from 2 copies on")
    copies = dropout_copies(model, sentences, repeats, seed, show_progress_bar)
    count, dimension = len(sentences), copies.shape[2]
    # Sums of products over all pairs of copies, of one sentence and of two.
    sums = copies.astype(np.float64).sum(axis=1)
    of_one = np.einsum("sd,sd->s", sums, sums)
    all_pairs = float(sums.sum(axis=0) @ sums.sum(axis=0))
    return DropoutMap(
        label=label,
        sentences=tuple(sentences),
        points=_tsne(copies.reshape(-1, dimension), repeats, seed).reshape(count, repeats, 2),
        within=float((of_one - repeats).mean() / (repeats * (repeats - 1))),
        between=float((all_pairs - of_one.sum()) / (count * (count - 1) * repeats**2)),
        has_dropout=not np.allclose(copies, copies[:, :1], rtol=0, atol=1e-6),
    )


def plot_dropout_maps(maps: Sequence[DropoutMap]) -> Figure:
    """A panel a model, a colour and marker a sentence, one legend for all.

    Args:
        maps: of the same sentences.
    """
    columns = min(len(maps), 3)
    rows = -(-len(maps) // columns)
    legend_columns = 2 if columns > 1 else 1
    legend_height = 0.22 * -(-len(maps[0].sentences) // legend_columns)
    figure, axes = new_figure(columns, rows, width=5.0, height=4.4 + legend_height / rows)
    for panel in axes[len(maps) :]:
        panel.set_axis_off()
    for panel, each in zip(axes, maps, strict=False):
        for number, (sentence, points) in enumerate(zip(each.sentences, each.points, strict=True)):
            panel.scatter(
                points[:, 0],
                points[:, 1],
                s=28,
                alpha=0.75,
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[(number + number // len(COLORS)) % len(MARKERS)],
                linewidths=0,
                label=textwrap.shorten(sentence, _LEGEND_CHARACTERS, placeholder=" ..."),
            )
        dropout = "" if each.has_dropout else "; no dropout"
        panel.set_title(
            f"{elided(each.label, 40)}\nmean cosine within {each.within:.3f}, between {each.between:.3f}{dropout}"
        )
        panel.set(xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns, frameon=False, fontsize=9)
    return figure


def nearest_neighbours(
    model: SentenceTransformer,
    corpus: Sequence[str],
    queries: Sequence[str],
    k: int = 5,
    show_progress_bar: bool | None = None,
) -> list[list[Neighbour]]:
    """The nearest sentences of a corpus by cosine; a query that is in the corpus is not its own neighbour.

    Args:
        model: any sentence-transformers model.
        corpus: sentences; of repeated ones, one is found.
        queries: Q sentences.
        k: how many neighbours.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Returns:
        For each query its k neighbours (or as many as there are), the nearest first.

    Raises:
        ValueError: if the corpus or the queries are empty, k is less than 1, or an embedding is not finite.
    """
    if not corpus or not queries:
        raise ValueError("there is nothing to look for: give a corpus and at least one query")
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1 neighbour")
    distinct = list(dict.fromkeys(corpus))
    embeddings = encode_distinct(model, [*distinct, *queries], show_progress_bar=show_progress_bar)
    found = semantic_search(
        torch.from_numpy(embeddings(queries)), torch.from_numpy(embeddings.matrix[: len(distinct)]), top_k=k + 1
    )
    return [
        [
            Neighbour(distinct[hit["corpus_id"]], float(hit["score"]))
            for hit in hits
            if distinct[hit["corpus_id"]] != query
        ][:k]
        for query, hits in zip(queries, found, strict=True)
    ]


Neighbours = Mapping[str, Sequence[Sequence[Neighbour]]]
"""For each model by label, the neighbours of each query."""


def neighbours_text(queries: Sequence[str], found: Neighbours, width: int = 120) -> str:
    """A table for the terminal: below each query a column a model, wrapped to the width.

    Args:
        queries: Q sentences.
        found: the neighbours by model.
        width: characters of a line; a column has at least 24, whatever that makes of the width.
    """
    column = max(_NARROWEST, (width + 2) // len(found) - 2)
    lines: list[str] = []
    for number, query in enumerate(queries):
        lines += [*textwrap.wrap(query, width), *_side_by_side([[label] for label in found], column)]
        lines.append("  ".join(["-" * column] * len(found)))
        ranked = [each[number] for each in found.values()]
        for rank in range(max(map(len, ranked))):
            cells = [
                textwrap.wrap(f"{hits[rank].cosine:6.3f} {hits[rank].sentence}", column, subsequent_indent=" " * 7)
                if rank < len(hits)
                else []
                for hits in ranked
            ]
            lines += _side_by_side(cells, column)
        lines.append("")
    return "\n".join(lines[:-1])


def neighbours_markdown(queries: Sequence[str], found: Neighbours) -> str:
    """A Markdown table a query, with a column a model.

    Args:
        queries: Q sentences.
        found: the neighbours by model.
    """
    blocks = []
    for number, query in enumerate(queries):
        ranked = [each[number] for each in found.values()]
        lines = [
            f"### {_escaped(query)}",
            "",
            f"| rank | {' | '.join(map(_escaped, found))} |",
            "| ---: |" + " --- |" * len(found),
        ]
        for rank in range(max(map(len, ranked))):
            cells = [
                f"{hits[rank].cosine:.3f} {_escaped(hits[rank].sentence)}" if rank < len(hits) else ""
                for hits in ranked
            ]
            lines.append(f"| {rank + 1} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def neighbours_dict(queries: Sequence[str], found: Neighbours) -> list[dict[str, Any]]:
    """The same in types that JSON has: for each query the neighbours by model.

    Args:
        queries: Q sentences.
        found: the neighbours by model.
    """
    return [
        {
            "query": query,
            "neighbours": {label: [vars(hit) for hit in each[number]] for label, each in found.items()},
        }
        for number, query in enumerate(queries)
    ]


def _embed(model: SentenceTransformer, sentences: list[str]) -> torch.Tensor:
    prompt = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
    features = batch_to_device(model.preprocess(sentences, prompt=prompt), model.device)
    return model(features)["sentence_embedding"].float().cpu()  # type: ignore[no-any-return]


def _tsne(points: Points, repeats: int, seed: int) -> Points:
    from sklearn.manifold import TSNE

    perplexity = min(1.5 * repeats, (len(points) - 1) / 3)
    return np.asarray(TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points))


def _side_by_side(cells: Sequence[Sequence[str]], column: int) -> list[str]:
    height = max(map(len, cells))
    padded = [[*cell, *[""] * (height - len(cell))] for cell in cells]
    return ["  ".join(part[:column].ljust(column) for part in line).rstrip() for line in zip(*padded, strict=True)]


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
