"""Crisscrossed Captions: correlation with human judgments, plain and by the bootstrap of its paper."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from sentence_transformers import SentenceTransformer

from st_kdmcse.data.cxc import CxCTask, SITSPairs, image_number
from st_kdmcse.encoding import Matrix, encode_distinct
from st_kdmcse.evaluation.sts import Similarities, cosines
from st_kdmcse.files import progress_bar
from st_kdmcse.precision import Precision
from st_kdmcse.teachers.sentence_transformer import encode_images

logger = logging.getLogger(__name__)

DRAWS = 1000
"""Draws of the bootstrap, as in the paper."""


@dataclass(frozen=True)
class CxCResult:
    """Spearman x 100 of one model on one file of CxC; None where it is undefined.

    Attributes:
        pairs: their number.
        queries: number of distinct captions in the first column.
        spearman: over all pairs.
        bootstrap_mean: over draws of half of the queries with one pair each.
        bootstrap_std: its standard deviation over the draws.
        draws: their number.
        subsets: pairs and Spearman over them, by the way in which the pairs were drawn.
    """

    pairs: int
    queries: int
    spearman: float | None
    bootstrap_mean: float | None
    bootstrap_std: float | None
    draws: int
    subsets: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        return asdict(self)


def evaluate_cxc(
    model: SentenceTransformer,
    task: CxCTask,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    batch_tokens: int | None = None,
    show_progress_bar: bool | None = None,
    precision: Precision = "float32",
) -> CxCResult:
    """Score a model on caption pairs of CxC by the cosines of their embeddings.

    Args:
        model: any sentence-transformers model.
        task: what :func:`~st_kdmcse.data.load_cxc` returns.
        draws: of the bootstrap, see :func:`bootstrap_spearman`.
        seed: of the draws.
        batch_tokens: tokens encoded at a time; 2,048 on a CPU, 16,384 elsewhere.
        show_progress_bar: None shows one in a terminal, after two seconds.
        precision: as for :func:`~st_kdmcse.evaluation.sts.evaluate_sts`.

    Raises:
        ValueError: if the device has no such precision, or an embedding is not finite; names the place.
    """
    sentences, places = [*task.sentences1, *task.sentences2], 2 * task.places
    embeddings = encode_distinct(
        model,
        sentences,
        batch_tokens=batch_tokens,
        show_progress_bar=show_progress_bar,
        where=places.__getitem__,
        precision=precision,
    )
    similarities = cosines(embeddings(task.sentences1), embeddings(task.sentences2))
    methods = [subset.name for subset in task.subsets for _ in range(len(subset))]
    return _result(similarities, task.scores, task.queries, methods, draws, seed, show_progress_bar)


def evaluate_sits(
    model: SentenceTransformer,
    pairs: SITSPairs,
    images: str | Path,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    batch_tokens: int | None = None,
    show_progress_bar: bool | None = None,
    precision: Precision = "float32",
) -> CxCResult:
    """Score a model of sentences and images on pairs of a caption and an image of CxC.

    Args:
        model: a sentence-transformers model that encodes images too, such as one of ``st-kdmcse export``.
        pairs: what :func:`~st_kdmcse.data.load_sits` returns.
        images: folder of their files, by their names of 2014 or of 2017.
        draws: of the bootstrap, see :func:`bootstrap_spearman`.
        seed: of the draws.
        batch_tokens: tokens encoded at a time; 2,048 on a CPU, 16,384 elsewhere.
        show_progress_bar: None shows one in a terminal, after two seconds.
        precision: as for :func:`~st_kdmcse.evaluation.sts.evaluate_sts`.

    Raises:
        FileNotFoundError: if an image is missing; names it.
        ValueError: if the model knows no images, or an image cannot be read.
    """
    if not model.supports("image"):
        raise ValueError(
            "the model knows no images: give a model of sentences and images, such as st-kdmcse export makes of a run"
        )
    names = list(dict.fromkeys(pairs.images))
    files = _files(Path(images), names)
    texts = encode_distinct(
        model,
        pairs.captions,
        batch_tokens=batch_tokens,
        show_progress_bar=show_progress_bar,
        where=pairs.places.__getitem__,
        precision=precision,
    )
    embeddings = encode_images(model, files, show_progress_bar, precision)
    rows = {name: row for row, name in enumerate(names)}
    of_pairs = embeddings[[rows[name] for name in pairs.images]]
    return score_sits(
        pairs, texts(pairs.captions), of_pairs, draws=draws, seed=seed, show_progress_bar=show_progress_bar
    )


def score_sits(
    pairs: SITSPairs,
    texts: Matrix,
    images: Matrix,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> CxCResult:
    """Score embeddings of captions and images that are at hand.

    Args:
        pairs: N pairs.
        texts: (N, dimension) embeddings of their captions.
        images: (N, dimension) embeddings of their images.
        draws: of the bootstrap.
        seed: of the draws.
        show_progress_bar: None shows one in a terminal, after two seconds.
    """
    similarities = cosines(texts, images)
    return _result(similarities, pairs.scores, pairs.queries, pairs.methods, draws, seed, show_progress_bar)


def bootstrap_spearman(
    similarities: npt.ArrayLike,
    scores: npt.ArrayLike,
    queries: Sequence[int],
    draws: int = DRAWS,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> npt.NDArray[np.float64]:
    """Spearman's correlation of each draw of half of the queries with one pair each (Parekh et al., EACL 2021, 5.2).

    Scores of pairs with a caption in common depend on each other; a draw has no two pairs of one query. The paper
    reports the mean over 1,000 draws. It does not say which of two captions is the query: here it is the first column.
    Queries are drawn without replacement, an odd one is left out, and pairs of a query are equally likely.

    Args:
        similarities: (N,) of the model.
        scores: (N,) gold.
        queries: (N,) which pairs have a query in common.
        draws: their number.
        seed: of the draws.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Returns:
        (draws,) from -1 to 1; nan where all pairs of a draw have one score or one similarity.

    Raises:
        ValueError: if ``draws`` is below 1.
    """
    if draws < 1:
        raise ValueError(f"`draws` is {draws}, expected at least 1")
    found, gold = np.asarray(similarities), np.asarray(scores)
    order = np.argsort(queries, kind="stable")
    _, starts, counts = np.unique(np.asarray(queries)[order], return_index=True, return_counts=True)
    generator = np.random.default_rng(seed)
    correlations = np.empty(draws)
    with progress_bar(draws, "Bootstrap", "draw", show_progress_bar) as progress:
        for draw in range(draws):
            chosen = generator.permutation(len(starts))[: len(starts) // 2]
            items = generator.integers(counts[chosen])
            rows = order[starts[chosen] + items]
            correlations[draw] = _spearman(found[rows], gold[rows])
            progress.update()
    return correlations


def _result(
    similarities: Similarities,
    scores: Sequence[float],
    queries: Sequence[int],
    methods: Sequence[str],
    draws: int,
    seed: int,
    show_progress_bar: bool | None = None,
) -> CxCResult:
    gold, kinds = np.asarray(scores), np.asarray(methods)
    correlations = bootstrap_spearman(similarities, gold, queries, draws, seed, show_progress_bar)
    if not np.isfinite(correlations).all():
        logger.warning("all pairs of a draw have one score or one similarity: there is no bootstrap correlation")
    deviation = correlations.std(ddof=1) if draws > 1 else 0.0
    return CxCResult(
        len(gold),
        len(set(queries)),
        _times_100(_spearman(similarities, gold)),
        _times_100(correlations.mean()),
        _times_100(deviation),
        draws,
        {
            kind: {
                "pairs": int((kinds == kind).sum()),
                "spearman": _times_100(_spearman(similarities[kinds == kind], gold[kinds == kind])),
            }
            for kind in dict.fromkeys(methods)
        },
    )


def _spearman(similarities: npt.NDArray[Any], gold: npt.NDArray[Any]) -> float:
    if len(gold) < 2 or np.ptp(similarities) == 0 or np.ptp(gold) == 0:
        return float("nan")
    return float(stats.spearmanr(gold, similarities).statistic)


def _times_100(value: float) -> float | None:
    return 100 * float(value) if np.isfinite(value) else None


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of images, by their names of 2014 or of 2017."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give the folder of the images of MS-COCO as `images`")
    found = {name: _first_file(folder, name) for name in names}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(names):,} images are not in {folder}, the first is {missing[0]}: give the "
            "folder that has them all, such as val2014, as `images`"
        )
    return [file for file in found.values() if file is not None]


def _first_file(folder: Path, name: str) -> Path | None:
    number = image_number(name)
    others = [] if number is None else [f"{number:012d}.jpg"]
    return next((folder / each for each in (name, *others) if (folder / each).is_file()), None)
