"""Tests of st_kdmcse.evaluation.similarity."""

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from st_kdmcse import build_student
from st_kdmcse.evaluation.similarity import TokenizedSimilarityEvaluator


@pytest.fixture
def pairs(sentences):
    """Two columns of sentences of many lengths, and scores."""
    long = [f"{text} {'dog ' * (number % 9)}" for number, text in enumerate(sentences)]
    return long[:100], long[100:], np.random.default_rng(0).random(100).tolist()


def test_scores_are_those_of_the_stock_evaluator(student, pairs):
    evaluator = TokenizedSimilarityEvaluator(*pairs, name="dev")
    stock = EmbeddingSimilarityEvaluator(*pairs, name="dev")
    for scale in (1, 3):  # a second time, after a step of training
        with torch.no_grad():
            student[0].auto_model.encoder.layer[0].output.dense.weight.mul_(scale)
        for sentences in pairs[:2]:
            made, wanted = (each.embed_inputs(student, sentences) for each in (evaluator, stock))
            np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5)
        assert evaluator(student) == pytest.approx(stock(student), abs=0.01)  # rounding changes a few ranks
    assert evaluator.primary_metric == stock.primary_metric == "dev_spearman_cosine"


def test_the_second_time_nothing_is_tokenized(student, pairs, monkeypatch):
    evaluator = TokenizedSimilarityEvaluator(*pairs)
    first = evaluator(student)
    monkeypatch.setattr(type(student), "preprocess", None)  # cannot be called any more
    student.train()
    assert evaluator(student) == first
    assert student.training, "as it was before"


def test_another_model_or_length_is_tokenized_again(student, tiny_bert, pairs):
    evaluator, stock = TokenizedSimilarityEvaluator(*pairs), EmbeddingSimilarityEvaluator(*pairs)
    evaluator(student)
    student.max_seq_length = 5
    assert evaluator(student) == pytest.approx(stock(student), abs=0.01)
    other = build_student(str(tiny_bert), max_seq_length=12).to("cpu")
    assert evaluator(other) == pytest.approx(stock(other), abs=0.01)


def test_options_of_the_stock_evaluator(student, pairs):
    for options in ({"truncate_dim": 8}, {"precision": "int8"}, {"similarity_fn_names": ["cosine", "dot"]}):
        made = TokenizedSimilarityEvaluator(*pairs, **options)(student)
        assert made == pytest.approx(EmbeddingSimilarityEvaluator(*pairs, **options)(student), abs=0.01)
