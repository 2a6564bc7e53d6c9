"""Near-duplicate pairs against a slow loop over all pairs."""

import sys
from itertools import combinations

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from st_kdmcse.search import duplicates
from st_kdmcse.search.duplicates import DUPLICATE_COLUMNS, Duplicate, find_duplicates
from st_kdmcse.search.records import TextRecord
from st_kdmcse.search.results import write_rows

pytest.importorskip("faiss")


@pytest.fixture
def student(tiny_bert):
    """The tiny encoder with larger embeddings of words, pooled by their mean: sentences differ by their words."""
    encoder = Transformer(str(tiny_bert))
    model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension(), "mean")], device="cpu")
    weights = dict(model.named_parameters())
    next(weights[name] for name in weights if name.endswith("word_embeddings.weight")).data.mul_(50)
    return model


@pytest.fixture
def records(sentences):
    return [TextRecord(f"r{number}", text) for number, text in enumerate(sentences)]


def slow_pairs(model, records, threshold):
    vectors = model.encode([record.text for record in records], normalize_embeddings=True).astype(np.float64)
    return {
        (records[left].id, records[right].id): float(vectors[left] @ vectors[right])
        for left, right in combinations(range(len(records)), 2)
        if vectors[left] @ vectors[right] >= threshold
    }


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_all_pairs_above_the_threshold_once(student, records, threshold):
    expected = slow_pairs(student, records, threshold)
    assert 10 < len(expected) < 10_000
    result = find_duplicates(records, student, threshold=threshold)
    assert {(pair.id1, pair.id2): pair.score for pair in result.pairs} == pytest.approx(expected, abs=1e-5)
    scores = [pair.score for pair in result.pairs]
    assert scores == sorted(scores, reverse=True)
    assert (result.records, result.equal, result.found, result.exact) == (200, 0, len(expected), True)
    texts = {record.id: record.text for record in records}
    assert all((pair.text1, pair.text2) == (texts[pair.id1], texts[pair.id2]) for pair in result.pairs)


def test_small_blocks_find_the_same(student, records, monkeypatch):
    whole = find_duplicates(records, student, threshold=0.6)
    monkeypatch.setattr(duplicates, "_BLOCK_SCORES", 200 * 7)
    blocks = find_duplicates(records, student, threshold=0.6)
    assert [pair[:2] for pair in blocks.pairs] == [pair[:2] for pair in whole.pairs]


def test_equal_texts_are_paired_with_the_first_alone(student, records):
    copies = [TextRecord(f"copy{number}", records[4].text) for number in range(50)]
    alone = find_duplicates(records, student, threshold=0.7)
    result = find_duplicates([*records, *copies], student, threshold=0.7)
    assert result.pairs[:50] == [Duplicate("r4", copy.id, 1.0, copy.text, copy.text) for copy in copies]
    assert [pair[:2] for pair in result.pairs[50:]] == [pair[:2] for pair in alone.pairs]
    assert (result.records, result.equal, result.found) == (250, 50, alone.found + 50)


@pytest.mark.parametrize("limit", [1, 20, 55])
def test_a_limit_keeps_the_best_and_counts_all(student, records, limit):
    copies = [TextRecord(f"copy{number}", records[4].text) for number in range(50)]
    whole = find_duplicates([*records, *copies], student, threshold=0.6)
    assert whole.found > 200
    cut = find_duplicates([*records, *copies], student, threshold=0.6, limit=limit)
    assert (cut.pairs, cut.found) == (whole.pairs[:limit], whole.found)


def test_many_texts_are_compared_within_lists(student, records):
    exact = find_duplicates(records, student, threshold=0.7)
    lists = find_duplicates(records, student, threshold=0.7, exact_up_to=100)
    assert (exact.exact, lists.exact) == (True, False)
    found = {pair[:2] for pair in lists.pairs} & {pair[:2] for pair in exact.pairs}
    assert len(found) >= 0.95 * len(exact.pairs)
    assert len(lists.pairs) <= len(exact.pairs)


def test_agrees_with_the_miner_of_sentence_transformers(student, records):
    mined = util.paraphrase_mining(student, [record.text for record in records], top_k=200)
    expected = {(f"r{min(pair)}", f"r{max(pair)}") for score, *pair in mined if score >= 0.7}
    assert {pair[:2] for pair in find_duplicates(records, student, threshold=0.7).pairs} == expected


def test_pairs_are_rows_of_a_table(tmp_path, student, records):
    pairs = find_duplicates(records, student).pairs
    assert write_rows(tmp_path / "pairs.csv", DUPLICATE_COLUMNS, (pair._asdict() for pair in pairs)) == len(pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "the threshold is 0, expected a cosine above 0 and up to 1"),
        ({"threshold": 1.1}, "the threshold is 1.1"),
        ({"threshold": float("nan")}, "the threshold is nan"),
        ({"limit": 0}, "the limit is 0 pairs"),
    ],
)
def test_options_out_of_range(student, records, options, message):
    with pytest.raises(ValueError, match=message):
        find_duplicates(records, student, **options)


def test_a_model_without_direction_or_without_numbers(student, records):
    with pytest.raises(ValueError, match="there are no sentences"):
        find_duplicates([], student)
    for parameter in student.parameters():
        parameter.data.zero_()
    with pytest.raises(ValueError, match=r"the embedding of '.*' is zero"):
        find_duplicates(records, student, threshold=0.6)
    for parameter in student.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        find_duplicates(records, student, threshold=0.6)


def test_without_faiss_the_extra_is_named(student, records, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"st-kdmcse\[search\]"):
        find_duplicates(records, student, threshold=0.6)
