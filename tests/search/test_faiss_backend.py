"""Tests of st_kdmcse.search.faiss_backend and .table."""

import re
import sys
from dataclasses import replace

import numpy as np
import pytest

from st_kdmcse.search.base import NewRows, unit_rows
from st_kdmcse.search.factory import new_index
from st_kdmcse.search.faiss_backend import FaissBackend, exact_scores, search_index, try_factory
from st_kdmcse.search.table import RowTable

DIM = 16
TYPES = [
    "Flat",
    "SQ8",
    "SQfp16",
    "HNSW32",
    "HNSW32_SQ8",
    "IVF16,Flat",
    "IVF16,PQ8np",
    "PCA12,HNSW32",
    "IVF16,SQ8,RFlat",
    "IVF16,PQ8x4fs,RFlat",
    "IVF16,PQ8x4fs,Refine(SQfp16)",
]


def make_rows(count, start=0, seed=0, centres=99):
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(centres).normal(size=(20, DIM))
    vectors = centres[generator.integers(0, 20, count)] + 0.4 * generator.normal(size=(count, DIM))
    numbers = range(start, start + count)
    metadata = [{"n": number, "odd": bool(number % 2), "word": f"w{number % 5}"} for number in numbers]
    return NewRows.checked(
        [f"id{number}" for number in numbers], [f"text {number}" for number in numbers], vectors, metadata
    )


ROWS = make_rows(1500)
QUERIES = make_rows(20, seed=5).embeddings


def nearest(rows, queries, k, mask=None):
    """Ids of the k nearest by brute force."""
    scores = queries.astype(np.float64) @ rows.embeddings.T.astype(np.float64)
    if mask is not None:
        scores[:, ~mask] = -2
    return [[rows.ids[row] for row in order[:k]] for order in np.argsort(-scores, axis=1)]


def ids(found):
    return [[hit.id for hit in hits] for hits in found]


def recall(found, wanted):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, wanted, strict=True)])


def test_flat_is_exact_with_scores_texts_and_metadata():
    backend = FaissBackend.build(ROWS)
    found = backend.search(QUERIES, 10)
    assert ids(found) == nearest(ROWS, QUERIES, 10)
    hit, row = found[3][2], ROWS.ids.index(found[3][2].id)
    assert hit.score == pytest.approx(float(QUERIES[3] @ ROWS.embeddings[row]), abs=1e-6)
    assert (hit.text, hit.metadata) == (ROWS.texts[row], ROWS.metadata[row])


@pytest.mark.parametrize("factory", TYPES)
def test_every_type_fills_k_with_filters_and_after_removals(factory):
    backend = FaissBackend.build(ROWS, factory, recall_target=0.99)
    compressed = 0.5 if factory in ("IVF16,PQ8np", "PCA12,HNSW32") else 0.9
    numbers = np.arange(len(ROWS))
    assert recall(ids(backend.search(QUERIES, 10)), nearest(ROWS, QUERIES, 10)) >= compressed

    for where, mask in [
        ({"odd": True}, numbers % 2 == 1),
        ({"n": {"gte": 700, "lt": 712}}, (numbers >= 700) & (numbers < 712)),
    ]:
        found = ids(backend.search(QUERIES, 10, where))
        assert all(len(hits) == 10 for hits in found)
        assert {each for hits in found for each in hits} <= {ROWS.ids[row] for row in np.flatnonzero(mask)}
        assert recall(found, nearest(ROWS, QUERIES, 10, mask)) >= compressed

    gone = [ROWS.ids[row] for row in numbers[::3]]
    backend.remove(gone)
    found = ids(backend.search(QUERIES, 10))
    assert recall(found, nearest(ROWS, QUERIES, 10, numbers % 3 != 0)) >= compressed
    assert not {each for hits in found for each in hits} & set(gone)
    everything = backend.search(QUERIES[:2], 5000)
    assert [len(hits) for hits in everything] == [1000, 1000]
    assert {hit.id for hit in everything[0]} == set(ROWS.ids) - set(gone)


@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF16,Flat", "IVF16,PQ8x4fs,RFlat"])
def test_compaction_keeps_what_is_there(factory):
    backend = FaissBackend.build(ROWS, factory, recall_target=0.999)
    backend.remove(ROWS.ids[:700])
    assert backend.info()["removed"] == 700
    backend.remove(ROWS.ids[700:1300])  # more than a quarter, and more than 1,000
    assert backend.info()["removed"] == 0
    assert backend.index.ntotal == len(backend) == 200
    mask = np.arange(len(ROWS)) >= 1300
    assert recall(ids(backend.search(QUERIES, 10)), nearest(ROWS, QUERIES, 10, mask)) >= 0.95
    backend.add(make_rows(5, start=5000, seed=8))
    assert backend.get(["id5004"])[0].text == "text 5004"
    assert backend.search(make_rows(5, seed=8).embeddings[4:], 1)[0][0].id == "id5004"


def test_add_replace_remove_get():
    backend = FaissBackend.empty(DIM)
    assert backend.search(QUERIES, 3) == [[]] * len(QUERIES)
    backend.add(make_rows(10))
    other = make_rows(10, seed=3)
    backend.replace(
        replace(other, ids=other.ids[:4], texts=["new"] * 4, embeddings=other.embeddings[:4], metadata=[{}] * 4)
    )
    assert len(backend) == 10
    assert backend.search(other.embeddings[2:3], 1)[0][0].id == "id2"
    assert [(hit.text, hit.score, hit.metadata) for hit in backend.get(["id2", "id2"])] == [("new", 1.0, {})] * 2
    backend.remove(["id2"])
    assert "id2" not in ids(backend.search(other.embeddings[2:3], 10))[0]


def test_changes_are_all_or_none():
    backend = FaissBackend.build(make_rows(10))
    before = ids(backend.search(QUERIES, 10))
    with pytest.raises(ValueError, match="'id9' is there already"):
        backend.add(make_rows(5, start=9, seed=2))
    with pytest.raises(KeyError, match="id10"):
        backend.replace(make_rows(5, start=6, seed=2))
    with pytest.raises(KeyError, match="nobody"):
        backend.remove(["id1", "nobody"])
    with pytest.raises(KeyError, match="nobody"):
        backend.get(["nobody"])
    with pytest.raises(ValueError, match="width 3"):
        backend.add(NewRows.checked(["x"], ["x"], [[1.0, 0, 0]]))
    assert ids(backend.search(QUERIES, 10)) == before
    assert len(backend) == 10


def test_an_untrained_index_is_trained_on_the_first_rows():
    backend = FaissBackend.empty(DIM, "IVF16,Flat")
    with pytest.raises(ValueError, match="too few to train the index IVF16,Flat"):
        backend.add(make_rows(5))
    assert len(backend) == 0
    backend.add(ROWS)
    assert len(backend.search(QUERIES, 1500)[0]) == 1500


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"a": 1}, {"0", "1"}),
        ({"a": True}, {"2"}),
        ({"a": "1"}, {"3"}),
        ({"a": [1, "1"]}, {"0", "1", "3"}),
        ({"a": []}, set()),
        ({"a": {"ne": 1}}, {"2", "3"}),
        ({"a": {"gt": 0}}, {"0", "1"}),
        ({"a": {"gte": 1, "lt": 1}}, set()),
        ({"a": 1, "é \"q'": "x"}, {"1"}),
        ({"missing": {"ne": 1}}, set()),
    ],
)
def test_filters_do_not_mix_types(where, expected):
    metadata = [{"a": 1}, {"a": 1.0, "é \"q'": "x"}, {"a": True}, {"a": "1"}, {"a": None}, {}]
    backend = FaissBackend.build(NewRows.checked([*"012345"], [*"012345"], np.eye(6), metadata))
    assert {hit.id for hit in backend.search(np.ones((1, 6)) / np.sqrt(6), 10, where)[0]} == expected


def test_a_remembered_filter_sees_changes():
    backend = FaissBackend.build(make_rows(10))
    assert len(backend.search(QUERIES, 20, {"odd": True})[0]) == 5
    backend.add(make_rows(4, start=10, seed=1))
    assert len(backend.search(QUERIES, 20, {"odd": True})[0]) == 7
    backend.remove(["id1"])
    assert len(backend.search(QUERIES, 20, {"odd": True})[0]) == 6


def test_refusals():
    backend = FaissBackend.build(make_rows(10))
    with pytest.raises(ValueError, match="k is 0"):
        backend.search(QUERIES, 0)
    with pytest.raises(ValueError, match="width 16"):
        backend.search(QUERIES[:, :5], 1)
    with pytest.raises(ValueError, match="unknown comparison"):
        backend.search(QUERIES, 1, {"n": {"like": 3}})
    with pytest.raises(ValueError, match="do not belong together"):
        FaissBackend(new_index(DIM, "Flat"), backend.table, "Flat")


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"st-kdmcse\[search\].*st-kdmcse\[faiss-gpu\]"):
        FaissBackend.empty(DIM)


def test_a_read_only_table_is_copied_before_its_first_change(tmp_path):
    table = RowTable.temporary()
    with table.transaction():
        table.insert([0, 1], ["a", "b"], ["A", "B"], [{}, {"x": "ü"}])
    table.write(tmp_path / "rows.sqlite")
    content = (tmp_path / "rows.sqlite").read_bytes()
    opened = RowTable.open(tmp_path / "rows.sqlite")
    with opened.transaction():
        opened.delete(["a"])
    assert (len(opened), opened.known(["a", "b"])) == (1, {"b": 1})
    assert opened.rows([1]) == {1: ("b", "B", {"x": "ü"})}
    assert (tmp_path / "rows.sqlite").read_bytes() == content
    (tmp_path / "rows.sqlite").write_bytes(b"not a database, but as long as one may be" * 100)
    with pytest.raises(ValueError, match=r"rows\.sqlite is not the table"):
        RowTable.open(tmp_path / "rows.sqlite")


def test_search_index_without_effort_is_exhaustive():
    vectors = unit_rows(np.random.default_rng(0).normal(size=(800, DIM)))
    for factory in ("HNSW4", "IVF16,Flat"):
        index = new_index(DIM, factory)
        index.train(vectors)
        index.add(vectors)
        _, found = search_index(index, QUERIES, 10)
        assert (np.sort(found) == np.sort(np.argsort(-(QUERIES @ vectors.T), axis=1)[:, :10])).all()


def test_which_types_keep_the_vectors():
    assert all(exact_scores(each) for each in ("Flat", "HNSW32", "HNSW32,Flat", "IVF64_HNSW32,Flat", "IVF8,PQ4,RFlat"))
    assert not any(
        exact_scores(each) for each in ("SQ8", "HNSW32_SQ8", "IVF8,PQ4", "PCA8,Flat", "IVF8,Flat,Refine(SQfp16)")
    )


@pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF64,PQ8x4fs,RFlat", "IVF64,SQ8,Refine(SQfp16)"])
def test_an_index_whose_rows_are_replaced_by_others_is_trained_and_tuned_on_those(factory, caplog):
    others, wanted = make_rows(3000, 3000, seed=7, centres=98), make_rows(40, seed=8, centres=98).embeddings
    expected = nearest(others, wanted, 10)
    emptied, gradual, grown = (FaissBackend.build(make_rows(3000), factory) for _ in range(3))
    emptied.remove(make_rows(3000).ids)
    emptied.add(others)
    for start in range(0, 3000, 500):
        gradual.add(others[start : start + 500])
        gradual.remove(make_rows(3000).ids[start : start + 500])
    assert gradual.compact()
    grown.add(others)
    assert "trained on 3,000 rows, and 3,000 were added since" in caplog.text
    never_filled = FaissBackend.empty(DIM, factory)
    never_filled.add(others)
    built = recall(ids(FaissBackend.build(others, factory).search(wanted, 10)), expected)
    assert built >= 0.85  # codes of 8 x 4 bits cannot do better
    for backend in (emptied, gradual, never_filled):
        assert len(backend) == backend.index.ntotal == 3000
        assert recall(ids(backend.search(wanted, 10)), expected) == pytest.approx(built, abs=0.03)
        assert backend.tuning.rows == 3000
        assert [hit.text for hit in backend.get(others.ids)] == list(others.texts)
        itself = backend.search(others.embeddings, 1)
        assert recall(ids(itself), [[each] for each in others.ids]) > 0.95, "vectors and rows belong together"


@pytest.mark.parametrize("factory", ["IVF64,PQ8x4fs,RFlat", "HNSW16"])
def test_the_recall_that_was_promised_holds_after_a_tenth_of_updates_and_after_compaction(factory):
    rows, others, wanted = make_rows(8000), make_rows(1000, 8000, seed=7), make_rows(500, seed=8).embeddings
    backend = FaissBackend.build(rows, factory, recall_target=0.9)
    assert backend.tuning.met
    backend.replace(replace(others[:400], ids=rows.ids[:400]))
    backend.remove(rows.ids[400:800])
    backend.add(others[400:800])
    assert backend.info()["removed"] == 800
    kept = NewRows(
        [*rows.ids[800:], *rows.ids[:400], *others.ids[400:800]],
        [],
        np.concatenate([rows.embeddings[800:], others.embeddings[:800]]),
        [],
    )
    expected = nearest(kept, wanted, 10)
    assert recall(ids(backend.search(wanted, 10)), expected) >= 0.9
    assert backend.compact()
    assert backend.index.ntotal == len(backend) == 8000
    assert recall(ids(backend.search(wanted, 10)), expected) >= 0.9
    assert backend.get(["id3"])[0].text == "text 8003"


def test_too_few_rows_to_train_an_emptied_index_are_told(caplog):
    backend = FaissBackend.build(ROWS, "IVF64,Flat")
    backend.remove(ROWS.ids)
    backend.add(make_rows(3, 2000))
    assert "3 rows are too few to train the index IVF64,Flat" in caplog.text
    assert {hit.id for hit in backend.search(QUERIES[:1], 10)[0]} == {"id2000", "id2001", "id2002"}
    with pytest.raises(ValueError, match="too few to train"):
        FaissBackend.empty(DIM, "IVF64,Flat").add(make_rows(3))


@pytest.mark.parametrize("factory", ["IVF16,PQ8x4fs,RFlat", "HNSW8"])
def test_the_nearest_alone_is_the_first_of_ten(factory):
    backend = FaissBackend.build(ROWS, factory)
    assert ids(backend.search(QUERIES, 1)) == [each[:1] for each in ids(backend.search(QUERIES, 10))]


@pytest.mark.parametrize("factory", [*TYPES, "IVF65536_HNSW32,PQ8np", "IVF4096,PQ8x4fs,RFlat", "OPQ8,IVF16,PQ8"])
def test_types_that_can_be_used_pass_the_trial(factory):
    try_factory(DIM, factory)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("IVF16,FlatDedup", "it finds other rows than are there"),
        ("RQ2x4", "search params not supported"),
        ("IVF16,RQ2x4", "id selector not supported"),
        ("HNSW16_2+PQ8", "search params not supported"),
        ("PCA8,IVF16,Flat,Refine(SQ8)", "params have incorrect type"),
        ("RCQ2x4", "failed"),
        ("nonsense", "could not parse"),
    ],
)
def test_types_that_forget_or_fail_are_refused_by_name(factory, message):
    with pytest.raises(ValueError, match=f"{re.escape(repr(factory))}.*{message}"):
        FaissBackend.build(ROWS, factory)
