"""Lists, several positives, calibration and filters of the pure functions: slow loops, edges, and properties."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_functional import DIM, N, assert_same_with_gradients, rows, teacher

from st_kdmcse import functional

MASK = torch.tensor([[(i + 2 * j) % 3 != 0 for j in range(N)] for i in range(N)])
SHARES = functional.soft_targets(0.7 * (teacher(3) > 0.3) * teacher(3))

CASES = {
    "listnet": (
        lambda x, y: functional.list_distillation(x, y, teacher(7), 0.1, 0.3),
        lambda x, y: reference.listnet(x, y, teacher(7), 0.1, 0.3),
    ),
    "listnet masked": (
        lambda x, y: functional.list_distillation(x, y, teacher(7), 0.1, 0.3, MASK),
        lambda x, y: reference.listnet(x, y, teacher(7), 0.1, 0.3, MASK),
    ),
    "listmle": (
        lambda x, y: functional.list_distillation(x, y, teacher(7), 0.1, loss="listmle", length=3),
        lambda x, y: reference.listmle(x, y, teacher(7), 0.1, 3),
    ),
    "listmle masked, of the whole list": (
        lambda x, y: functional.list_distillation(x, y, teacher(7), 0.1, keep=MASK, loss="listmle"),
        lambda x, y: reference.listmle(x, y, teacher(7), 0.1, 16, MASK),
    ),
    "consistency": (
        lambda x, y: functional.list_consistency(x, y, x, y, 0.1),
        lambda x, y: reference.list_consistency(x, y, 0.1),
    ),
    "several positives": (
        lambda x, y: functional.info_nce(x, y, 0.1, targets=SHARES),
        lambda x, y: reference.soft_info_nce(x, y, 0.1, SHARES),
    ),
    "several positives, filtered": (
        lambda x, y: functional.info_nce(x, y, 0.1, MASK, SHARES),
        lambda x, y: reference.soft_info_nce(x, y, 0.1, SHARES, MASK),
    ),
    "several positives and a margin": (
        lambda x, y: functional.info_nce_with_margin(x, y, 0.3, 0.1, MASK, SHARES),
        lambda x, y: reference.soft_info_nce(x, y, 0.1, SHARES, MASK, margin=0.3),
    ),
    "filtered": (
        lambda x, y: functional.info_nce(x, y, 0.1, MASK),
        lambda x, y: reference.soft_info_nce(x, y, 0.1, torch.eye(N), MASK),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_against_the_slow_loop_with_gradients(name, seed):
    assert_same_with_gradients(*CASES[name], rows(seed, N, DIM), rows(seed + 10, N, DIM))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(name, dtype):
    fast, slow = CASES[name]
    x, y = rows(0, N, DIM, dtype=dtype), rows(10, N, DIM, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fast(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), slow(x.detach().double(), y.detach().double()), rtol=1e-5, atol=1e-5)


NOTHING, HUGE = torch.zeros(9, 9, dtype=torch.bool), torch.full((9, 9), 1e300, dtype=torch.float64)
LOSSES = {
    "listnet": lambda x: functional.list_distillation(x, x, torch.eye(len(x))),
    "listmle": lambda x: functional.list_distillation(x, x.flip(0), torch.eye(len(x)), loss="listmle", length=2),
    "listnet of nothing": lambda x: functional.list_distillation(x, x, torch.eye(len(x)), keep=_cut(NOTHING, x)),
    "listmle of nothing": lambda x: functional.list_distillation(
        x, x, torch.eye(len(x)), keep=_cut(NOTHING, x), loss="listmle"
    ),
    "listnet of a part": lambda x: functional.list_distillation(x, x, torch.eye(len(x)), keep=_cut(MASK_OF_9, x)),
    "huge scores": lambda x: functional.list_distillation(x, x, _cut(HUGE, x) * torch.eye(len(x)) - _cut(HUGE, x)),
    "consistency": lambda x: functional.list_consistency(x, x.flip(0), x, x.flip(0)),
    "consistency of one view": lambda x: functional.list_consistency(x, x, x, x),
    "several positives": lambda x: functional.info_nce(
        x, x, targets=functional.soft_targets(torch.ones(len(x), len(x))), keep=_cut(NOTHING, x)
    ),
    "one positive as shares": lambda x: functional.info_nce(x, x, targets=torch.eye(len(x)), keep=_cut(NOTHING, x)),
}
MASK_OF_9 = torch.tensor([[i < 2 and j > 1 for j in range(9)] for i in range(9)])


def _cut(square, x):
    return square[: len(x), : len(x)]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.lists(st.floats(-65504, 65504, width=16), min_size=3, max_size=3), min_size=1, max_size=5),
    st.sampled_from(sorted(LOSSES)),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_any_finite_input_gives_finite_values_and_gradients(values, name, dtype):
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    loss = LOSSES[name](x)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["listnet", "listmle"])
def test_an_empty_list_is_no_loss(loss):
    x, y = rows(0, N, DIM), rows(1, N, DIM)
    keep = torch.ones(N, N, dtype=torch.bool)
    keep[2] = False
    some = functional.list_distillation(x, y, teacher(0), keep=keep, loss=loss)
    (gradient,) = torch.autograd.grad(some, x)
    assert torch.equal(gradient[2], torch.zeros_like(gradient[2]))
    others = [i for i in range(N) if i != 2]
    parts = [
        functional.list_distillation(x[i : i + 1], y, teacher(0)[i : i + 1], loss=loss, positive_offset=i)
        for i in others
    ]
    torch.testing.assert_close(some, sum(parts) / N)
    assert functional.list_distillation(x[:1], y[:1], torch.zeros(1, 1), loss=loss) == 0


@given(st.integers(0, 10_000), st.permutations(range(N)), st.sampled_from(["listnet", "listmle"]))
@settings(deadline=None, max_examples=25)
def test_the_order_of_the_batch_does_not_matter(seed, order, loss):
    x, y, scores = rows(seed, N, DIM), rows(seed + 1, N, DIM), teacher(seed)
    noise = teacher(seed + 2).abs()
    one = functional.list_distillation(
        x, y, functional.shuffle_groups(scores, noise, 0.5, MASK), keep=MASK, loss=loss, length=3
    )
    scores, noise, keep = (each[order][:, order] for each in (scores, noise, MASK))
    shuffled = functional.shuffle_groups(scores, noise, 0.5, keep)
    other = functional.list_distillation(x[order], y[order], shuffled, keep=keep, loss=loss, length=3)
    torch.testing.assert_close(one, other)


@given(st.integers(0, 10_000), st.floats(-30, 30))
@settings(deadline=None, max_examples=25)
def test_the_length_of_the_vectors_does_not_matter(seed, exponent):
    x, y = rows(seed, N, DIM), rows(seed + 1, N, DIM)
    for fast, _ in CASES.values():
        torch.testing.assert_close(fast(x * 10**exponent, y), fast(x, y))


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=25)
def test_one_positive_is_info_nce(seed):
    x, y, alpha = rows(seed, N, DIM), rows(seed + 1, N, DIM), teacher(seed)
    targets = functional.soft_targets(torch.zeros(N, N))
    torch.testing.assert_close(functional.info_nce(x, y, targets=targets), functional.info_nce(x, y))
    torch.testing.assert_close(
        functional.adap_acse(x, y, alpha, 0.3, 0.1, MASK, targets), functional.adap_acse(x, y, alpha, 0.3, 0.1, MASK)
    )


def test_a_student_that_has_the_teachers_lists_has_the_least_loss():
    angles = torch.linspace(0, 1.5, N, dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin()], dim=1).requires_grad_()
    scores = functional.cosine_similarity_matrix(x, x).detach()
    loss = functional.list_distillation(x, x, scores, 0.2, 0.2)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    assert loss < functional.list_distillation(x, x, scores.flip(1), 0.2, 0.2)


@pytest.mark.parametrize("loss", ["listnet", "listmle"])
def test_gathered_candidates_are_the_rows_of_one_large_batch(loss):
    x, y, scores = rows(0, 8, DIM), rows(1, 8, DIM), teacher(0, 8)
    keep = torch.tensor([[abs(i - j) != 2 for j in range(8)] for i in range(8)])
    noise = teacher(4, 8).abs()
    shares = functional.soft_targets((~keep) * 0.5)
    halves, consistent, shuffled, positives = [], [], [], []
    for offset, part in ((0, slice(0, 4)), (4, slice(4, 8))):
        options = {"keep": keep[part], "positive_offset": offset}
        halves.append(functional.list_distillation(x[part], y, scores[part], loss=loss, **options))
        consistent.append(functional.list_consistency(x[part], y[part], x, y, positive_offset=offset))
        shuffled.append(functional.shuffle_groups(scores[part], noise[part], **options))
        part_shares = functional.soft_targets((~keep[part]) * 0.5, positive_offset=offset)
        positives.append(functional.info_nce(x[part], y, targets=part_shares, **options))
        assert torch.equal(part_shares, shares[part])
        assert torch.equal(
            functional.relative_filter(scores[part], 0.1, positive_offset=offset),
            functional.relative_filter(scores, 0.1)[part],
        )
    whole = functional.list_distillation(x, y, scores, keep=keep, loss=loss)
    torch.testing.assert_close(sum(halves) / 2, whole)
    torch.testing.assert_close(sum(consistent) / 2, functional.list_consistency(x, y, x, y))
    torch.testing.assert_close(torch.cat(shuffled), functional.shuffle_groups(scores, noise, keep=keep))
    torch.testing.assert_close(sum(positives) / 2, functional.info_nce(x, y, keep=keep, targets=shares))


@pytest.mark.parametrize("mass", [0.1, 0.35, 1.0])
@pytest.mark.parametrize("keep", [None, MASK])
def test_groups_are_shuffled_as_in_the_slow_loop(mass, keep):
    scores, noise = teacher(1), teacher(2).abs()
    found = functional.shuffle_groups(scores, noise, 0.4, keep, mass=mass)
    expected = torch.tensor(reference.shuffled_groups(scores, noise, 0.4, mass, keep), dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found.sort(dim=1).values, scores.sort(dim=1).values)
    if keep is None and mass == 1.0:
        assert not torch.equal(found, scores)


def test_the_relative_filter_compares_with_the_positive():
    scores = torch.tensor([[0.3, 0.3, 0.31], [0.9, 0.5, 0.4], [0.1, 0.2, 0.0]])
    assert functional.relative_filter(scores).tolist() == [
        [True, True, False],
        [False, True, True],
        [False, False, True],
    ]
    assert functional.relative_filter(scores, 0.15).tolist() == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]
    assert functional.relative_filter(scores, -1).all()


def test_shares_are_a_positive_and_what_resembles_it():
    weights = torch.tensor([[5.0, 0.5, 0.0], [0.0, 0.0, 0.25], [0.0, 0.0, 0.0]], requires_grad=True)
    found = functional.soft_targets(weights)
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 1 / 3, 0], [0, 0.8, 0.2], [0, 0, 1]]))
    assert not found.requires_grad


SCORES = torch.stack([teacher(seed, 40).flatten() for seed in (0, 1, 2)])
SCORES[1] = 0.3 * SCORES[0] + 0.1 * SCORES[1]
STATISTICS = functional.score_statistics(SCORES, torch.tensor([0.5, 0.7]), steps=21)


def test_statistics_are_those_of_numpy():
    scores = SCORES.numpy()
    np.testing.assert_allclose(STATISTICS.mean, scores.mean(1))
    np.testing.assert_allclose(STATISTICS.std, scores.std(1))
    np.testing.assert_allclose(STATISTICS.quantiles, np.quantile(scores, np.linspace(0, 1, 21), axis=1).T)
    np.testing.assert_allclose(STATISTICS.correlation, np.corrcoef(scores), atol=1e-12)
    assert STATISTICS.same_image_mean == pytest.approx(0.6)
    assert STATISTICS.same_image_std == pytest.approx(0.1)


def test_fused_scores_are_the_slow_sum_and_have_deviation_one():
    weights = torch.tensor([1.0, 0.5, 0.25])
    found = functional.fuse(SCORES.view(3, 40, 40), weights, STATISTICS)
    expected = reference.fuse(SCORES.view(3, 40, 40), weights.tolist(), *(STATISTICS[i] for i in (0, 1, 3)))
    torch.testing.assert_close(found, expected)
    assert found.std(correction=0).item() == pytest.approx(1)
    one = functional.fuse(SCORES.view(3, 40, 40), torch.tensor([0.0, 2.0, 0.0]), STATISTICS)
    torch.testing.assert_close(one.flatten(), (SCORES[1] - SCORES[1].mean()) / SCORES[1].std(correction=0))


def test_scores_that_do_not_vary_or_cancel_out_fuse_to_zero():
    scores = torch.stack([SCORES[0], -SCORES[0], torch.full_like(SCORES[0], 0.3)])
    statistics = functional.score_statistics(scores, torch.zeros(0))
    assert statistics.correlation[2].tolist() == [0, 0, 1]
    assert statistics.same_image_mean == statistics.same_image_std == 0
    for weights in ([1.0, 1.0, 0.0], [0.0, 0.0, 1.0]):
        fused = functional.fuse(scores.view(3, 40, 40), torch.tensor(weights), statistics)
        torch.testing.assert_close(fused, torch.zeros_like(fused), atol=1e-6, rtol=0)


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=12),
    st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=12),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=100)
def test_a_calibrated_score_is_a_share_that_grows_with_the_score(quantiles, scores, dtype):
    quantiles, scores = torch.tensor(sorted(quantiles), dtype=dtype), torch.tensor(sorted(scores), dtype=dtype)
    found = functional.empirical_distribution(scores, quantiles)
    assert ((found >= 0) & (found <= 1)).all()
    assert (found.diff() >= 0).all()
    for score, share in zip(scores.tolist(), found.tolist(), strict=True):
        assert share == pytest.approx(reference.distribution(score, quantiles.tolist()), abs=1e-5)


def test_the_calibrated_sample_is_uniform():
    shares = functional.empirical_distribution(SCORES[2].view(40, 40), STATISTICS.quantiles[2])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.01)
    assert shares.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: functional.list_distillation(x, x, torch.zeros(2, 2)), "teacher_scores must have shape"),
        (lambda x: functional.list_distillation(x, x, teacher(0), 0), "temperature must be positive"),
        (lambda x: functional.list_distillation(x, x, teacher(0), 1, 0), "temperature must be positive"),
        (lambda x: functional.list_distillation(x, x, teacher(0), loss="mse"), "listnet"),
        (lambda x: functional.list_distillation(x, x, teacher(0), loss="listmle", length=0), "length >= 1"),
        (lambda x: functional.list_distillation(x, x, teacher(0), keep=teacher(0)), "keep must be boolean"),
        (lambda x: functional.list_distillation(x, x[:2], teacher(0)[:, :2]), "need as many candidates"),
        (lambda x: functional.list_consistency(x, x, x, x, 0), "temperature"),
        (lambda x: functional.info_nce(x, x, targets=torch.eye(2)), "targets must have shape"),
        (lambda x: functional.adap_acse(x, x, teacher(0), targets=torch.eye(2)), "targets must have shape"),
        (lambda x: functional.shuffle_groups(teacher(0), torch.zeros(2, 2)), "noise must have shape"),
        (lambda x: functional.shuffle_groups(teacher(0), teacher(0), mass=0), "mass"),
        (lambda x: functional.score_statistics(torch.zeros(2, 0), torch.zeros(0)), "a pair at least"),
        (lambda x: functional.score_statistics(torch.zeros(2, 3), torch.zeros(0), steps=1), "at least 2"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(rows(0, N, DIM))
