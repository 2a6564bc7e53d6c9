"""Whether a difference between methods is more than chance: over seeds (t-test) and over sentence pairs (bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from st_kdmcse.files import progress_bar

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_REPLICATES_AT_A_TIME = 50


class Summary(NamedTuple):
    """A score over seeds.

    Attributes:
        mean: the mean.
        std: the standard deviation with n - 1 in the denominator; None for a single value.
        n: number of values.
    """

    mean: float
    std: float | None
    n: int


class PairedDifference(NamedTuple):
    """The difference of two methods over the seeds that both were trained with.

    Attributes:
        mean: of the differences.
        low: lower end of the confidence interval of the mean (Student's t); None for a single seed.
        high: upper end.
        p: two-sided p value of the paired t-test; None where there is none, as where all differences are the same.
        n: number of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int


class BootstrapDifference(NamedTuple):
    """How far the difference of two methods' scores varies with the choice of the sentence pairs.

    Attributes:
        low: lower end of the percentile interval.
        high: upper end.
        p: two-sided p value of the difference being 0.
    """

    low: float
    high: float
    p: float


def summarize(values: Sequence[float]) -> Summary:
    """Mean and standard deviation over seeds.

    Args:
        values: n >= 1 scores.

    Example:
        >>> summarize([1.0, 2.0, 3.0])
        Summary(mean=2.0, std=1.0, n=3)
    """
    if not values:
        raise ValueError("there is no score to summarize")
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), std, len(values))


def t_test(first: Sequence[float], second: Sequence[float], welch: bool = False) -> float | None:
    """Two-sided p value of the independent t-test, for the difference of two methods over seeds.

    Args:
        first: scores of a method, one a seed.
        second: scores of another method.
        welch: do not assume that both vary equally over seeds (Welch's test). The paper's is the plain one.

    Returns:
        The p value; None where there is no test: with less than two seeds each, or where no score varies.
    """
    if min(len(first), len(second)) < 2 or np.ptp(first) == np.ptp(second) == 0:
        return None
    p = float(stats.ttest_ind(first, second, equal_var=not welch).pvalue)
    return p if math.isfinite(p) else None


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """The paired t-test, for the difference of two methods over the same seeds.

    Args:
        first: n >= 1 scores of a method, one a seed.
        second: scores of another method, of the same seeds in the same order.
        confidence: of the interval.

    Raises:
        ValueError: if the lengths differ.

    Example:
        >>> paired_difference([2.0, 3.0, 5.0], [1.0, 2.0, 3.0]).mean.__round__(3)
        1.333
    """
    differences = np.subtract(first, second) if len(first) == len(second) else None
    if differences is None or not len(differences):
        raise ValueError(f"paired scores must be as many, got {len(first)} and {len(second)}")
    mean, n = float(differences.mean()), len(differences)
    if n < 2:
        return PairedDifference(mean, None, None, None, n)
    if np.ptp(differences) == 0:
        return PairedDifference(mean, mean, mean, None, n)
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(confidence)
    return PairedDifference(mean, float(interval.low), float(interval.high), float(test.pvalue), n)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct the p values of a family of comparisons, so that the chance of any false difference stays at 0.05.

    Holm's step-down method: the smallest of m p values is multiplied by m, the next by m - 1, ...

    Args:
        p_values: m p values; None for a comparison without a test, which stays None and does not count.

    Returns:
        The corrected p values in the same order.

    Example:
        >>> holm([0.01, None, 0.5])
        [0.02, None, 0.5]
    """
    tested = sorted((p, position) for position, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, position) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        corrected[position] = largest
    return corrected


def resampled_spearman(predictions: npt.ArrayLike, gold: npt.ArrayLike, counts: npt.ArrayLike) -> Array:
    """Spearman's correlation on resamples of the pairs, with average ranks for ties.

    A resample says how often each pair is in it. The sorting is done once a model, not once a resample: the rank of a
    value in a resample follows from the counts of the smaller ones.

    Args:
        predictions: (models, pairs) similarities.
        gold: (pairs,) gold scores.
        counts: (resamples, pairs) whole numbers; ones are the original data.

    Returns:
        (models, resamples) correlations from -1 to 1; NaN where the predictions or the gold scores do not vary.
    """
    predictions, gold, counts = np.atleast_2d(predictions), np.asarray(gold), np.asarray(counts)
    counts = counts.astype(np.float64)  # sums of half ranks stay exact
    gold_ranks, gold_variation = _centred_ranks(gold, counts)
    weighted = counts * gold_ranks
    found = np.empty((len(predictions), len(counts)))
    for model, values in enumerate(predictions):
        ranks, variation = _centred_ranks(values, counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            found[model] = np.einsum("rp,rp->r", ranks, weighted) / np.sqrt(variation * gold_variation)
    return found


def bootstrap_scores(
    predictions: Sequence[npt.ArrayLike],
    gold: Sequence[npt.ArrayLike],
    replicates: int = 1000,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> Array:
    """Scores of all models on the same resamples of the sentence pairs.

    In each replicate the pairs of each task are drawn again, with replacement, as many as the task has.

    Args:
        predictions: (models, pairs) similarities of each task.
        gold: (pairs,) gold scores of each task.
        replicates: number of resamples.
        seed: of the resamples.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Returns:
        (models, replicates): the mean over the tasks of Spearman's correlation x 100.
    """
    generator = np.random.default_rng(seed)
    tasks = [(np.atleast_2d(task), np.asarray(scores)) for task, scores in zip(predictions, gold, strict=True)]
    if not tasks:
        raise ValueError("there is no task to resample")
    found = np.empty((len(tasks[0][0]), replicates))
    starts = range(0, replicates, _REPLICATES_AT_A_TIME)
    for start in progress_bar(None, "Bootstrap", "it", show_progress_bar, iterable=starts):
        size = min(_REPLICATES_AT_A_TIME, replicates - start)
        parts = []
        for task, scores in tasks:
            pairs = len(scores)
            counts = generator.multinomial(pairs, np.full(pairs, 1 / pairs), size=size)
            parts.append(resampled_spearman(task, scores, counts))
        found[:, start : start + size] = 100 * np.mean(parts, axis=0)
    return found


def bootstrap_difference(first: Array, second: Array, confidence: float = 0.95) -> BootstrapDifference | None:
    """The paired bootstrap: how the difference of two methods varies with the sentence pairs.

    The runs are taken as given, so that one seed a method is enough; another seed may vary more than the pairs do.

    Args:
        first: (runs, replicates) of a method, from :func:`bootstrap_scores`.
        second: (runs, replicates) of another method on the same resamples.
        confidence: share of the replicates that the interval holds.

    Returns:
        Interval and p value of mean(first) - mean(second); None if no replicate has a score. p is twice the share of
        the replicates on the other side of 0, the observed data counted as one of them, and at most 1.
    """
    differences = np.mean(first, axis=0) - np.mean(second, axis=0)
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return None
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    return BootstrapDifference(float(low), float(high), float(min(1, 2 * (beyond + 1) / (len(differences) + 1))))


def _centred_ranks(values: npt.NDArray[np.generic], counts: Array) -> tuple[Array, Array]:
    """Ranks (resamples, pairs) within each resample, minus their mean, and the sum of their squares (resamples,)."""
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    ends = np.searchsorted(group[order], np.arange(len(distinct)), side="right") - 1
    up_to = np.cumsum(counts[:, order], axis=1)[:, ends]
    below = np.concatenate([np.zeros((len(counts), 1)), up_to[:, :-1]], axis=1)
    # The copies of a value take the ranks below + 1 to up_to; the mean of all ranks is (n + 1) / 2.
    ranks = (below + up_to - up_to[:, -1:]) / 2
    variation = np.einsum("rg,rg,rg->r", up_to - below, ranks, ranks)
    return ranks[:, group], variation
