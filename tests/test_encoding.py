import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from st_kdmcse.encoding import encode_distinct, encode_distinct_each, load_model

SENTENCES = ["a dog", "the man sits on a small red ball in snow", "a dog", "snow", "women of the beach", "snow"]


def test_embeddings_equal_encode(student):
    embeddings = encode_distinct(student, SENTENCES)
    assert len(embeddings) == 4
    assert embeddings.matrix.dtype == np.float32
    expected = student.encode(SENTENCES, batch_size=1)
    np.testing.assert_allclose(embeddings(SENTENCES), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(embeddings(["snow", "a dog"]), embeddings(SENTENCES)[[3, 0]])


@pytest.mark.parametrize("batch_tokens", [1, 16, 10_000])
def test_batches_hold_that_many_tokens(student, monkeypatch, sentences, batch_tokens):
    sizes = []
    forward = student.forward

    def spy(features, **options):
        sizes.append((features["input_ids"].numel(), len(features["input_ids"]), int(features["attention_mask"].sum())))
        return forward(features, **options)

    monkeypatch.setattr(student, "forward", spy)
    texts = [*SENTENCES, *sentences[:50]]
    embeddings = encode_distinct(student, texts, batch_tokens=batch_tokens)
    np.testing.assert_allclose(embeddings(texts), student.encode(texts, batch_size=1), rtol=1e-4, atol=1e-5)
    ours = sizes[: -len(texts)]
    assert all(tokens <= batch_tokens or rows == 1 for tokens, rows, _ in ours)
    # Sentences of similar length are together: hardly anything is padded.
    assert batch_tokens == 10_000 or sum(tokens for tokens, _, _ in ours) < 1.1 * sum(real for _, _, real in ours) + 20


def test_dropout_is_off_and_comes_back(student):
    student.train()
    first, second = (encode_distinct(student, SENTENCES).matrix for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert student.training


def test_prompt_and_truncation_are_the_model_s(tiny_bert):
    model = SentenceTransformer(
        str(tiny_bert), prompts={"query": "the red dog "}, default_prompt_name="query", truncate_dim=8, device="cpu"
    )
    embeddings = encode_distinct(model, SENTENCES)(SENTENCES)
    assert embeddings.shape == (6, 8)
    np.testing.assert_allclose(embeddings, model.encode(SENTENCES), rtol=1e-4, atol=1e-5)
    plain = SentenceTransformer(str(tiny_bert), truncate_dim=8, device="cpu").encode(SENTENCES)
    assert np.abs(embeddings - plain).max() > 1e-3


def test_a_model_without_transformer(student):
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[StaticEmbedding(student.tokenizer.backend_tokenizer, embedding_dim=5)])
    np.testing.assert_allclose(encode_distinct(model, SENTENCES)(SENTENCES), model.encode(SENTENCES), rtol=1e-5)


def test_several_embeddings_from_one_pass(student):
    found = encode_distinct_each(
        student,
        SENTENCES,
        lambda output: {"double": 2 * output["sentence_embedding"], "first": output["sentence_embedding"]},
    )
    np.testing.assert_array_equal(found["double"].matrix, 2 * found["first"].matrix)


def test_errors(student, tmp_path):
    with pytest.raises(ValueError, match="no sentences"):
        encode_distinct(student, [])
    row = student.tokenizer.convert_tokens_to_ids("snow")
    student[0].auto_model.embeddings.word_embeddings.weight.data[row] = torch.inf
    with pytest.raises(ValueError, match=r"embedding of 'snow' \(line 4\) is not finite, and so for 1 of 3 sentences"):
        encode_distinct(student, ["a", "dog", "a", "snow", "snow"], where=lambda number: f"line {number + 1}")
    with pytest.raises(ValueError, match=r"embedding of 'snow' is not finite"):
        encode_distinct(student, ["snow"])
    with pytest.raises(FileNotFoundError, match=r"no model folder \./typo"):
        load_model("./typo")
    with pytest.raises(ValueError, match=r"neither modules\.json nor config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="typo is neither the folder of a model nor a name that the hub knows"):
        load_model("typo")
