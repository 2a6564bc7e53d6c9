"""The pure functions against slow loops, at the edges of their domain, and as properties."""

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from st_kdmcse import functional
from st_kdmcse.functional import spread

N, DIM = 6, 5


def rows(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def teacher(seed, n=N):
    return torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def assert_same_with_gradients(fast, slow_loss, *inputs, **tolerance):
    expected = torch.autograd.grad(slow_loss(*inputs), inputs)
    actual = torch.autograd.grad(fast(*inputs), inputs)
    torch.testing.assert_close(fast(*inputs), slow_loss(*inputs), **tolerance)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


CASES = {
    "info_nce": (
        lambda x, y: functional.info_nce(x, y, 0.1),
        lambda x, y: reference.info_nce(x, y, 0.1),
    ),
    "arc_cse": (
        lambda x, y: functional.arc_cse(x, y, 0.2, 0.1),
        lambda x, y: reference.arc_cse(x, y, 0.2, 0.1),
    ),
    "adap_acse": (
        lambda x, y: functional.adap_acse(x, y, teacher(7), 0.3, 0.1),
        lambda x, y: reference.adap_acse(x, y, teacher(7), 0.3, 0.1),
    ),
    "adap_acse filtered": (
        lambda x, y: functional.adap_acse(x, y, teacher(7), 0.3, 0.1, keep=teacher(8) < 0.2),
        lambda x, y: reference.adap_acse(x, y, teacher(7), 0.3, 0.1, keep=teacher(8) < 0.2),
    ),
    "adap_acse wide margin": (
        lambda x, y: functional.adap_acse(x, y, teacher(7), 1.5, 0.1),
        lambda x, y: reference.adap_acse(x, y, teacher(7), 1.5, 0.1),
    ),
    "adap_acse unguarded": (
        lambda x, y: functional.adap_acse(x, y, teacher(7), 1.5, 0.1, guard=False),
        lambda x, y: reference.adap_acse(x, y, teacher(7), 1.5, 0.1, guard=False),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_against_the_slow_loop_with_gradients(name, seed):
    assert_same_with_gradients(*CASES[name], rows(seed, N, DIM), rows(seed + 10, N, DIM))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_narrow_inputs_are_computed_in_float32(name, dtype, tolerance):
    fast, reference = CASES[name]
    x, y = rows(0, N, DIM, dtype=dtype), rows(10, N, DIM, dtype=dtype)
    loss = fast(x, y)
    assert loss.dtype == torch.float32
    expected = reference(x.detach().double(), y.detach().double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, y)]
    for actual, exact in zip(
        torch.autograd.grad(loss, (x, y)), torch.autograd.grad(reference(*wide), wide), strict=True
    ):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


def test_autocast_does_not_narrow_the_loss():
    x, y = rows(0, N, DIM, dtype=torch.float32), rows(1, N, DIM, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = functional.info_nce(x, y)
        evenness, products = functional.uniformity(x), functional.dot_product_matrix(x, y)
    assert torch.equal(inside, functional.info_nce(x, y))
    assert torch.equal(evenness, functional.uniformity(x))
    assert torch.equal(products, x @ y.T)


def test_scores_out_of_the_range_of_float32_stay_finite():
    alpha = torch.full((N, N), 1e300, dtype=torch.float64)
    x = rows(0, N, DIM, dtype=torch.float32)
    loss = functional.adap_acse(x, rows(1, N, DIM, dtype=torch.float32), alpha, 0.3)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


def test_the_smallest_half_precision_vectors_have_finite_gradients():
    x = (rows(0, N, DIM).detach() * 6e-8).half().requires_grad_()
    for loss in (functional.info_nce(x, x.flip(0)), functional.arc_cse(x, x, 0.2)):
        x.grad = None
        loss.backward()
        assert x.grad.isfinite().all()


LOSSES = {
    "info_nce": lambda x: functional.info_nce(x, x.flip(0)),
    "info_nce with itself": lambda x: functional.info_nce(x, x),
    "arc_cse": lambda x: functional.arc_cse(x, x, 0.2),
    "arc_cse opposite": lambda x: functional.arc_cse(x, -x, 0.2),
    "adap_acse": lambda x: functional.adap_acse(x, x, torch.zeros(len(x), len(x)), 0.2),
    "adap_acse unguarded": lambda x: functional.adap_acse(x, x.flip(0), torch.zeros(len(x), len(x)), 3.0, guard=False),
    "adap_acse nothing kept": lambda x: functional.adap_acse(
        x, x, torch.zeros(len(x), len(x)), 0.2, keep=torch.zeros(len(x), len(x), dtype=torch.bool)
    ),
    "alignment": lambda x: functional.alignment(x, x.flip(0)),
    "uniformity": functional.uniformity,
    "uniformity of one": lambda x: functional.uniformity(x[:1]),
    "batch of one": lambda x: functional.adap_acse(x[:1], x[:1], torch.zeros(1, 1), 0.2),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_degenerate_inputs_give_finite_values_and_gradients(name, dtype):
    limits = torch.finfo(dtype)
    for scale in (limits.max, 1.0, limits.smallest_normal, 0.0):
        x = torch.tensor(
            [[1, 1, 0], [1, 1, 0], [-1, -1, 0], [0, 0, 0], [1, -1, 1], [1, 1, 1e-3]], dtype=dtype
        ) * torch.tensor(scale, dtype=dtype)
        x = x.detach().requires_grad_()
        loss = LOSSES[name](x)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.floats(-65504, 65504, width=16), min_size=3, max_size=3),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(sorted(LOSSES)),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_any_finite_input_gives_finite_values_and_gradients(values, name, dtype):
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    loss = LOSSES[name](x)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [slice(None), (0, 1)], ids=["all", "one entry"])
def test_nan_shows_in_the_result(name, bad, where):
    x = torch.eye(4)
    x[where] = bad
    assert LOSSES[name](x).isnan() or name == "uniformity of one"


def test_nan_in_a_score_shows_in_the_result():
    x = torch.eye(3)
    scores = torch.zeros(3, 3)
    scores[0, 1] = math.nan
    keep = functional.threshold_filter(scores, 0.8)
    assert keep.all()
    assert functional.adap_acse(x, x.roll(1, 0), scores, 0.2, keep=keep).isnan()
    assert functional.list_distillation(x, x, scores).isnan()
    assert functional.empirical_distribution(scores, torch.tensor([-1.0, 1.0]))[0, 1].isnan()
    assert functional.standardize(torch.ones(2), 0.0, math.nan).isnan().all()


def test_a_zero_vector_gets_no_gradient_and_disturbs_no_other():
    x = rows(0, N, DIM)
    with torch.no_grad():
        x[2] = 0
    functional.info_nce(x, x).backward()
    assert torch.equal(x.grad[2], torch.zeros(DIM, dtype=torch.float64))
    assert x.grad.abs().max() < 100


@given(st.integers(0, 10_000), st.floats(0.01, 1.0))
@settings(deadline=None, max_examples=25)
def test_margin_zero_is_info_nce_exactly(seed, temperature):
    x, y = rows(seed, N, DIM), rows(seed + 1, N, DIM)
    expected = functional.info_nce(x, y, temperature)
    assert torch.equal(functional.adap_acse(x, y, teacher(seed), 0.0, temperature), expected)
    assert torch.equal(functional.arc_cse(x, y, 0.0, temperature), expected)


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=25)
def test_no_filter_is_a_threshold_that_nothing_reaches(seed):
    x, y, alpha = rows(seed, N, DIM), rows(seed + 1, N, DIM), teacher(seed)
    keep = functional.threshold_filter(alpha, 1.0)
    assert torch.equal(functional.adap_acse(x, y, alpha, keep=keep), functional.adap_acse(x, y, alpha))


@given(st.integers(0, 10_000), st.permutations(range(N)))
@settings(deadline=None, max_examples=25)
def test_the_order_of_the_batch_does_not_matter(seed, order):
    x, y, alpha = rows(seed, N, DIM), rows(seed + 1, N, DIM), teacher(seed)
    keep = functional.threshold_filter(alpha, 0.5)
    torch.testing.assert_close(
        functional.adap_acse(x[order], y[order], alpha[order][:, order], 0.3, keep=keep[order][:, order]),
        functional.adap_acse(x, y, alpha, 0.3, keep=keep),
    )


@given(st.integers(0, 10_000), st.floats(-30, 30))
@settings(deadline=None, max_examples=25)
def test_the_length_of_the_vectors_does_not_matter(seed, exponent):
    x, y = rows(seed, N, DIM), rows(seed + 1, N, DIM)
    torch.testing.assert_close(functional.arc_cse(x * 10**exponent, y, 0.2), functional.arc_cse(x, y, 0.2))


def test_a_wider_margin_on_the_negatives_costs_more_and_the_more_so_the_less_alike_they_are():
    x, y = rows(0, N, DIM), rows(1, N, DIM)
    alike, unlike = torch.full((N, N), 0.9), torch.full((N, N), 0.1)
    losses = [
        functional.adap_acse(x, y, alike, 0.0),
        functional.adap_acse(x, y, alike, 0.2),
        functional.adap_acse(x, y, unlike, 0.2),
    ]
    assert losses == sorted(losses)


def test_the_margin_spares_negatives_within_it_and_the_positive():
    angles = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    logits = torch.tensor([[1.0, math.cos(0.1), math.cos(0.3 - 0.2)]], dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits / 0.05, torch.tensor([0]))
    torch.testing.assert_close(functional.adap_acse(x[:1], x, torch.zeros(1, 3), margin=0.2), expected)


def test_no_gradient_reaches_the_teacher():
    alpha = teacher(0).requires_grad_()
    functional.adap_acse(rows(0, N, DIM), rows(1, N, DIM), alpha, 0.2).backward()
    assert alpha.grad is None


def test_filter_removes_high_scores_and_never_the_positive():
    scores = torch.tensor([[0.95, 0.8, 0.79], [0.1, 0.2, 0.3], [0.9, 0.8, 0.99]])
    assert functional.threshold_filter(scores, 0.8).tolist() == [
        [True, False, True],
        [True, True, True],
        [False, False, True],
    ]
    assert functional.threshold_filter(scores, 0.8, inclusive=False).tolist()[0] == [True, True, True]
    assert functional.threshold_filter(scores, None).all()


def test_gathered_candidates_are_the_rows_of_one_large_batch():
    x, y, alpha = rows(0, 8, DIM), rows(1, 8, DIM), teacher(0, 8)
    keep = functional.threshold_filter(alpha, 0.3)
    halves = [
        functional.adap_acse(
            x[part],
            y,
            alpha[part],
            0.2,
            keep=functional.threshold_filter(alpha[part], 0.3, positive_offset=offset),
            positive_offset=offset,
        )
        for offset, part in ((0, slice(0, 4)), (4, slice(4, 8)))
    ]
    torch.testing.assert_close(sum(halves) / 2, functional.adap_acse(x, y, alpha, 0.2, keep=keep))


@pytest.mark.parametrize("block", [1, 8, 24, 10**6])
def test_uniformity_in_blocks_with_gradients(block, monkeypatch):
    monkeypatch.setattr(spread, "_UNIFORMITY_BLOCK", block)
    x = rows(3, 9, DIM)
    assert functional.uniformity(x).item() == pytest.approx(reference.uniformity(x.detach(), 2))
    assert torch.autograd.gradcheck(functional.uniformity, (x,))


def test_uniformity_of_distant_points_does_not_underflow():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert functional.uniformity(x, t=1000).item() == pytest.approx(-4000)


def test_alignment_is_the_mean_squared_distance_on_the_sphere():
    x, y = rows(0, N, DIM), rows(1, N, DIM)
    expected = sum(2 - 2 * reference.cosine(a, b) for a, b in zip(x, y, strict=True)) / N
    torch.testing.assert_close(functional.alignment(x, y), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: functional.info_nce(x, x[:, :2]), "one width"),
        (lambda x: functional.info_nce(x, x[:2]), "need as many candidates"),
        (lambda x: functional.info_nce(x[:0], x[:0]), "empty batch"),
        (lambda x: functional.info_nce(x, x, temperature=0), "temperature"),
        (lambda x: functional.arc_cse(x, x, -0.1), "margin"),
        (lambda x: functional.arc_cse(x, x, math.nan), "margin"),
        (lambda x: functional.adap_acse(x, x, torch.zeros(2, 2)), "teacher_similarity must have shape"),
        (lambda x: functional.adap_acse(x, x, torch.zeros(N, N), keep=torch.ones(N, N)), "keep must be boolean"),
        (lambda x: functional.alignment(x, x[:2]), "one shape"),
        (lambda x: functional.uniformity(x, t=0), "t must be positive"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(rows(0, N, DIM))


@pytest.mark.parametrize("offset", [-1, 2])
def test_a_positive_outside_of_the_candidates_is_refused(offset):
    rows, scores = torch.eye(3, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    candidates = torch.cat([rows, rows[:1]])
    calls = [
        lambda: functional.info_nce(rows, candidates, positive_offset=offset),
        lambda: functional.arc_cse(rows, candidates, 0.1, positive_offset=offset),
        lambda: functional.adap_acse(rows, candidates, scores, 0.1, positive_offset=offset),
        lambda: functional.threshold_filter(scores, 0.5, positive_offset=offset),
        lambda: functional.relative_filter(scores, positive_offset=offset),
        lambda: functional.soft_targets(scores, positive_offset=offset),
        lambda: functional.list_distillation(rows, candidates, scores, positive_offset=offset),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"3 anchors from candidate {offset} on"):
            call()
