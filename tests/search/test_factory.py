"""Tests of st_kdmcse.search.factory."""

import logging

import numpy as np
import pytest

from st_kdmcse.search.base import unit_rows
from st_kdmcse.search.factory import (
    Reordered,
    build_faiss,
    choose_factory,
    new_index,
    size_text,
    train,
)
from st_kdmcse.search.tuning import confidence_interval, exact_search, get_effort, rows_as_queries

GIB = 1 << 30


@pytest.mark.parametrize(
    ("rows", "limit", "factory"),
    [
        (0, None, "Flat"),
        (99_999, None, "Flat"),
        (99_999, 100 << 20, "SQfp16"),
        (99_999, 40 << 20, "SQ8"),
        (100_000, None, "IVF1024,PQ192x4fs,RFlat"),
        (1_000_000, None, "IVF4096,PQ192x4fs,RFlat"),
        (1_000_000, GIB, "IVF4096,PQ192x4fs,Refine(SQfp16)"),
        (1_000_000, GIB // 2, "IVF4096,SQ8"),
        (1_000_000, GIB // 4, "IVF4096,PQ192np"),
        (10_000_000, None, "IVF16384,PQ192x4fs,RFlat"),
        (100_000_000, 12 * GIB, "IVF32768_HNSW32,PQ96np"),
    ],
)
def test_choice_by_rows_and_memory(rows, limit, factory):
    choice = choose_factory(rows, 384, limit)
    assert choice.factory == factory
    assert limit is None or choice.memory <= limit
    assert not new_index(384, factory).ntotal


def test_an_odd_dim_has_no_pairs_to_quantise():
    assert choose_factory(1_000_000, 301).factory == "IVF4096,Flat"
    assert choose_factory(1_000_000, 301, GIB // 2).factory == "IVF4096,SQ8"


@pytest.mark.parametrize("limit", [None, 80 << 20, 50 << 20, 20 << 20])
def test_estimated_memory_is_that_of_the_file(limit):
    import faiss

    rows, dim = 100_000, 192
    choice = choose_factory(rows, dim, limit)
    vectors = unit_rows(np.random.default_rng(0).normal(size=(rows, dim)))
    index = new_index(dim, choice.factory)
    faiss.extract_index_ivf(index).cp.niter = 1
    train(index, vectors, choice.factory)
    index.add(vectors)
    assert choice.memory == pytest.approx(faiss.serialize_index(index).nbytes, rel=0.06)


def test_what_does_not_fit_or_exist_is_refused():
    with pytest.raises(ValueError, match=r"1,000,000 rows of dim 384 do not fit into 1.0 MiB.*takes \d"):
        choose_factory(1_000_000, 384, 1 << 20)
    for factory, message in [
        ("nonsense", "no index 'nonsense'"),
        ("IVF16,PQ7", "no index|divides"),
        ("IDMap,Flat", "IDMap"),
        ("PQ8np", "within lists"),
        ("NSG32", "NSG"),
    ]:
        with pytest.raises(ValueError, match=message):
            new_index(64, factory).train(np.ones((1, 64), dtype=np.float32))
    with pytest.raises(ValueError, match="recall_target is 1.5"):
        build_faiss(np.eye(4, dtype=np.float32), "Flat", recall_target=1.5)


def test_rows_that_come_last_change_places_with_those_at_the_end():
    vectors = np.arange(20)[:, None]
    ordered = Reordered(vectors, [3, 7, 18])
    assert set(ordered[17:20].ravel()) == {3, 7, 18}
    assert (ordered.order[ordered.order] == np.arange(20)).all()
    assert {here: int(ordered.order[here]) for here in ordered.swaps} == ordered.swaps
    assert Reordered(vectors).swaps == {}


def clustered(count, seed, dim=24):
    generator, centres = np.random.default_rng(seed), np.random.default_rng(99).normal(size=(100, dim))
    return unit_rows(centres[generator.integers(0, 100, count)] + 0.7 * generator.normal(size=(count, dim)))


def with_copies(vectors, copies, noise=0.3):
    """Each row and noisy copies of it, shuffled."""
    generator = np.random.default_rng(7)
    noisy = [unit_rows(vectors + noise / 24**0.5 * generator.normal(size=vectors.shape)) for _ in range(copies)]
    return generator.permutation(np.concatenate([vectors, *noisy]))


def test_rows_as_queries_leave_their_near_copies_out():
    plain, copied = clustered(20_000, 0), with_copies(clustered(4_000, 0), 4)
    few, many = rows_as_queries(plain), rows_as_queries(copied)
    assert len(few) >= 500
    assert len(few.absent) <= 4000
    assert len(many.absent) <= 4000
    assert len(many.absent) / len(many) > 4.5, "each with its copies"
    assert len(few.absent) / len(few) < 4
    left = np.delete(copied, many.absent, axis=0)
    expected, _ = exact_search(left, many.queries, 10)
    assert many.worst_accepted == pytest.approx(expected[:, -1:], abs=1e-4)
    assert (expected[:, 0] < 0.93).mean() > 0.95, "what is left is no copy"
    assert rows_as_queries(plain[:9]) is None


def test_rows_as_queries_leave_large_groups_of_copies_out():
    corpus = with_copies(clustered(1_000, 0), 60)
    known = rows_as_queries(corpus)
    left = np.setdiff1d(np.arange(61_000), known.absent)
    expected, _ = exact_search(corpus[left], known.queries, 10)
    assert (expected[:, 0] < 0.93).mean() > 0.95, "what is left is no copy"
    assert len(known.absent) <= 12_200


@pytest.mark.parametrize(
    ("factory", "texts", "copies"),
    [("IVF128,Flat", 4_000, 4), ("IVF128,PQ12x4fs,RFlat", 4_000, 4), ("HNSW8", 4_000, 4), ("IVF256,Flat", 1_000, 60)],
)
def test_copies_do_not_flatter_the_recall(factory, texts, copies):
    everything = clustered(texts + 1_000, 0)
    corpus, unseen = with_copies(everything[:texts], copies), everything[texts:]
    built = build_faiss(corpus, factory, recall_target=0.9)
    ordered = corpus[built.order]
    expected, _ = exact_search(ordered, unseen, 10)
    _, found = built.index.search(unseen, 10)
    scores = np.einsum("qd,qkd->qk", unseen, ordered[found])
    recall = (scores >= expected[:, -1:] - 1e-5).mean()
    assert built.tuning.met
    assert built.tuning.low >= 0.9
    assert recall >= 0.9


def test_the_confidence_interval_holds_the_truth():
    generator = np.random.default_rng(0)
    for mean in (0.5, 0.9, 0.99):
        held = 0
        for _ in range(300):
            of_query = generator.beta(mean * 4, (1 - mean) * 4, size=500)
            low, high = confidence_interval(np.round(generator.binomial(10, of_query) / 10, 1))
            assert high - low < 0.12
            held += low <= mean <= high
        assert held >= 288
    low, high = confidence_interval(np.ones(100))
    assert (0.93 < low < 0.95, round(high, 9)) == (True, 1.0)


def test_queries_of_the_users_are_what_it_is_tuned_on(caplog):
    vectors, queries = clustered(5_000, 0), clustered(600, 1)
    built = build_faiss(vectors, "IVF64,Flat", 0.9, tune_queries=queries)
    assert (built.tuning.source, built.tuning.queries, built.tuning.near_copies) == ("queries", 600, None)
    assert built.tuning.met
    assert built.swaps == {}
    few = build_faiss(vectors, "IVF64,Flat", 0.99, tune_queries=queries[:20]).tuning
    assert not few.met
    assert few.recall > 0.98
    assert "leave open whether it is met: give more queries" in caplog.text
    assert "NOT met" in str(few)


def test_an_index_that_refines_takes_more_candidates_where_codes_are_in_the_way():
    vectors = unit_rows(np.random.default_rng(0).normal(size=(4000, 64)))
    built = build_faiss(vectors, "IVF4,PQ8x4fs,RFlat", 0.8)
    assert built.index.k_factor > 8
    assert built.tuning.met


def test_exact_search_in_blocks_equals_one_product():
    vectors = unit_rows(np.random.default_rng(0).normal(size=(40_000, 8)))
    queries = vectors[:5] + 0.01
    scores, found = exact_search(vectors, queries, 7, rows=35_000)
    expected = np.argsort(-(queries @ vectors[:35_000].T), axis=1)[:, :7]
    assert (found == expected).all()
    assert np.allclose(scores, np.take_along_axis(queries @ vectors.T, found, 1))


@pytest.mark.parametrize("factory", ["IVF64,Flat", "HNSW8", "IVF64,PQ12x4fs,RFlat"])
def test_tuning_reaches_the_recall_on_clustered_data_with_no_more_search_than_needed(factory, caplog):
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(100, 24))
    vectors = unit_rows(centres[generator.integers(0, 100, 6000)] + 0.7 * generator.normal(size=(6000, 24)))
    with caplog.at_level(logging.INFO, "st_kdmcse"):
        built_low = build_faiss(vectors, factory, recall_target=0.5)
        built_high = build_faiss(vectors, factory, recall_target=0.97)
    (low, measured_low), (high, measured_high) = ((each.index, each.tuning) for each in (built_low, built_high))
    assert measured_low.low >= 0.5
    assert measured_high.low >= 0.97
    assert get_effort(low) == measured_low.value < measured_high.value == get_effort(high)
    assert "recall@10" in caplog.text
    assert high.ntotal == 6000
    queries = unit_rows(centres[generator.integers(0, 100, 300)] + 0.7 * generator.normal(size=(300, 24)))
    _, expected = exact_search(vectors[built_high.order], queries, 10)
    found = high.search(queries, 10)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, expected, strict=True)])
    assert recall == pytest.approx(measured_high.recall, abs=0.02)


def test_a_recall_out_of_reach_is_told(caplog):
    vectors = unit_rows(np.random.default_rng(0).normal(size=(3000, 32)))
    measured = build_faiss(vectors, "IVF4,PQ4x4np", recall_target=0.99).tuning
    assert measured.recall < 0.9
    assert "below 0.990" in caplog.text


def test_sizes_for_people():
    assert [size_text(each) for each in (12, 1536, 3 << 30, 5 << 40)] == ["12 bytes", "1.5 KiB", "3.0 GiB", "5.0 TiB"]
