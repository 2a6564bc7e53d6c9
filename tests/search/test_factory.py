"""Tests of st_kdmcse.search.factory."""

import logging

import numpy as np
import pytest

from st_kdmcse.search.base import unit_rows
from st_kdmcse.search.factory import (
    build_faiss,
    choose_factory,
    held_out_count,
    held_out_swaps,
    new_index,
    size_text,
    train,
)
from st_kdmcse.search.tuning import exact_search, get_effort

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


def test_held_out_rows_are_drawn_from_all():
    swaps = held_out_swaps(1000)
    order = np.array([swaps.get(row, row) for row in range(1000)])
    assert sorted(order) == list(range(1000))
    assert (order[order] == np.arange(1000)).all()
    drawn = order[-held_out_count(1000) :]
    assert len(drawn) == 100
    assert 300 < drawn.mean() < 700
    assert held_out_swaps(9) == {}


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
        low, measured_low = build_faiss(vectors, factory, recall_target=0.5)
        high, measured_high = build_faiss(vectors, factory, recall_target=0.98)
    assert measured_low.recall >= 0.5
    assert measured_high.recall >= 0.98
    assert get_effort(low) == measured_low.value < measured_high.value == get_effort(high)
    assert "measured recall@10" in caplog.text
    assert high.ntotal == 6000
    queries = unit_rows(centres[generator.integers(0, 100, 300)] + 0.7 * generator.normal(size=(300, 24)))
    _, expected = exact_search(vectors, queries, 10)
    found = high.search(queries, 10)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, expected, strict=True)])
    assert recall == pytest.approx(measured_high.recall, abs=0.02)


def test_a_recall_out_of_reach_is_told(caplog):
    vectors = unit_rows(np.random.default_rng(0).normal(size=(3000, 32)))
    _, measured = build_faiss(vectors, "IVF4,PQ4x4np", recall_target=0.99)
    assert measured.recall < 0.9
    assert "below 0.990" in caplog.text


def test_sizes_for_people():
    assert [size_text(each) for each in (12, 1536, 3 << 30, 5 << 40)] == ["12 bytes", "1.5 KiB", "3.0 GiB", "5.0 TiB"]
