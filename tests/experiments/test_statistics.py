"""Tests, corrections and the bootstrap against hand calculations and slow loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from scipy.stats import t as t_distribution

from st_kdmcse.experiments.statistics import (
    bootstrap_difference,
    bootstrap_scores,
    holm,
    paired_difference,
    resampled_spearman,
    summarize,
    t_test,
)


def test_summary_of_three_and_of_one():
    mean, std, n = summarize([70.0, 71.0, 75.0])
    assert (mean, n) == (72.0, 3)
    assert std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert summarize([3.0]) == (3.0, None, 1)
    with pytest.raises(ValueError, match="no score"):
        summarize([])


def test_paired_t_test_by_hand():
    found = paired_difference([3.0, 4.0, 8.0], [1.0, 2.0, 3.0])  # differences 2, 2, 5
    error = math.sqrt(3 / 3)  # variance 3
    assert (found.mean, found.n) == (3.0, 3)
    assert found.p == pytest.approx(2 * t_distribution.sf(3 / error, 2))
    reach = t_distribution.ppf(0.975, 2) * error
    assert (found.low, found.high) == pytest.approx((3 - reach, 3 + reach))
    assert paired_difference([1.0, 2.0], [0.0, 1.0]) == (1.0, 1.0, 1.0, None, 2)
    assert paired_difference([1.0], [0.5]) == (0.5, None, None, None, 1)
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_t_test_by_hand():
    first, second = [3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 6.0]
    pooled = (2 + 14) / 5  # sums of squares 2 and 14 about the means 4 and 3, 2 + 3 degrees of freedom
    statistic = 1 / math.sqrt(pooled * (1 / 3 + 1 / 4))
    assert t_test(first, second) == pytest.approx(2 * t_distribution.sf(statistic, 5))
    variances = 1 / 3, 14 / 3 / 4
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 3)
    assert t_test(first, second, welch=True) == pytest.approx(
        2 * t_distribution.sf(1 / math.sqrt(sum(variances)), freedom)
    )


@pytest.mark.parametrize(("first", "second"), [([1.0], [2.0, 3.0]), ([1.0, 2.0], [3.0]), ([2.0, 2.0], [3.0, 3.0])])
def test_no_t_test_without_variation(first, second):
    assert t_test(first, second) is None
    assert t_test(first, second, welch=True) is None


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.9 times 4, 3, 2, 1, never falling.
    assert holm([0.03, None, 0.01, 0.9, 0.02]) == [pytest.approx(0.06), None, 0.04, 0.9, pytest.approx(0.06)]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def slow_spearman(predictions, gold, counts):
    rows = np.repeat(np.arange(len(gold)), counts)
    return spearmanr(predictions[rows], gold[rows]).statistic


@given(
    st.integers(3, 12).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 3), min_size=n, max_size=n),
            st.lists(st.integers(0, 3), min_size=n, max_size=n),
            st.lists(st.integers(0, 3), min_size=n, max_size=n),
        )
    )
)
def test_resampled_spearman_equals_scipy_on_the_resample(drawn):
    predictions, gold, counts = map(np.array, drawn)
    rows = np.repeat(np.arange(len(gold)), counts)
    found = resampled_spearman(predictions, gold, counts[None])[0, 0]
    if len(rows) == 0 or np.ptp(predictions[rows]) == 0 or np.ptp(gold[rows]) == 0:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(slow_spearman(predictions, gold, counts), abs=1e-12)


def test_bootstrap_equals_a_slow_loop():
    generator = np.random.default_rng(0)
    gold = [np.round(5 * generator.random(40), 0), np.round(5 * generator.random(25), 1)]
    predictions = [np.round(generator.normal(size=(3, len(each))), 1).astype(np.float32) for each in gold]
    found = bootstrap_scores(predictions, gold, replicates=7, seed=3)
    draws, slow = np.random.default_rng(3), np.empty((3, 7))
    counts = [draws.multinomial(len(each), np.full(len(each), 1 / len(each)), size=7) for each in gold]
    for model in range(3):
        for replicate in range(7):
            slow[model, replicate] = np.mean(
                [
                    100 * slow_spearman(predictions[task][model], gold[task], counts[task][replicate])
                    for task in range(2)
                ]
            )
    np.testing.assert_allclose(found, slow, atol=1e-9)
    np.testing.assert_array_equal(found, bootstrap_scores(predictions, gold, replicates=7, seed=3))
    assert not np.array_equal(found, bootstrap_scores(predictions, gold, replicates=7, seed=4))


def test_every_replicate_has_as_many_pairs_as_the_task_over_several_chunks():
    found = bootstrap_scores([np.arange(30.0)], [np.arange(30.0)], replicates=120)
    np.testing.assert_allclose(found, 100.0)
    assert found.shape == (1, 120)


def test_constant_predictions_have_no_score_and_no_difference():
    gold = [np.arange(10.0)]
    scores = bootstrap_scores([np.stack([np.ones(10), np.arange(10.0)])], gold, replicates=5)
    assert np.isnan(scores[0]).all()
    assert bootstrap_difference(scores[:1], scores[1:]) is None


def test_difference_by_hand():
    first, second = np.array([[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0]]), np.array([[0.0, 1.0, 2.0, 6.0]])
    low, high, p = bootstrap_difference(first, second)  # differences 2, 2, 2, -1
    assert p == pytest.approx(2 * (1 + 1) / (4 + 1))
    assert (low, high) == (pytest.approx(-1 + 3 * 0.075), pytest.approx(2))
    assert bootstrap_difference(second, second).p == 1
    assert bootstrap_difference(first, first - 1).p == pytest.approx(2 / 5)


def test_a_better_model_is_found_and_an_equal_one_is_not():
    generator = np.random.default_rng(1)
    gold = generator.random(300)
    good, bad, alike = (gold + noise * generator.normal(size=300) for noise in (0.2, 0.8, 0.2))
    scores = bootstrap_scores([np.stack([good, bad, alike])], [gold], replicates=300)
    better = bootstrap_difference(scores[:1], scores[1:2])
    assert better.low > 0
    assert better.p < 0.01
    equal = bootstrap_difference(scores[:1], scores[2:])
    assert equal.low < 0 < equal.high
    assert equal.p > 0.05


def test_no_task_is_an_error():
    with pytest.raises(ValueError, match="no task"):
        bootstrap_scores([], [])
