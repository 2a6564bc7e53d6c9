"""Tests of st_kdmcse.data.tokens."""

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset

from st_kdmcse.data.tokens import TokenTable


@pytest.fixture
def make(student, sentences, tmp_path):
    """Makes, or finds, the tokens of the sentences."""

    def make(texts=sentences, model=student):
        dataset = Dataset.from_dict({"sentence": texts})
        tokenizer = model[0].tokenizer
        return TokenTable.of(dataset, "sentence", model.preprocess, tokenizer, model.max_seq_length, tmp_path / "cache")

    return make


@pytest.mark.parametrize("count", [1, 7, 64])
def test_batches_are_those_of_the_model(make, student, sentences, count):
    table = make([f"{text} dog" * (number % 5 + 1) for number, text in enumerate(sentences)])
    assert len(table) == len(sentences)
    rows = np.random.default_rng(0).integers(0, len(sentences), count)
    ids, mask = table.batch(rows, student[0].tokenizer.pad_token_id)
    wanted = student.preprocess([f"{sentences[row]} dog" * (row % 5 + 1) for row in rows])
    assert torch.equal(ids, wanted["input_ids"])
    assert torch.equal(mask, wanted["attention_mask"])
    assert ids.dtype == mask.dtype == torch.int64


def test_what_was_tokenized_is_found_again(make, student, monkeypatch):
    made = make()
    monkeypatch.setattr(type(student), "preprocess", None)  # cannot be called any more
    assert make().path == made.path
    assert pickle.loads(pickle.dumps(made)).path == made.path


def test_other_sentences_or_lengths_have_tokens_of_their_own(make, student, sentences):
    paths = {make().path, make(sentences[::-1]).path, make(sentences[:-1]).path}
    student.max_seq_length = 5
    shorter = make()
    assert len({*paths, shorter.path}) == 4
    assert shorter.batch([0, 1], 0)[0].shape[1] <= 5


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "manifest.json"])
def test_a_damaged_file_is_written_again(make, name, caplog):
    path = make().path
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        TokenTable(path)
    assert make().path == path
    assert (path / name).read_bytes() == whole
    assert "is written again" in caplog.text


def test_an_interruption_leaves_nothing(make, student, monkeypatch, tmp_path):
    def stop(model, texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(student), "preprocess", stop)
    with pytest.raises(KeyboardInterrupt):
        make()
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_named(make, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="cannot be written to .*cache"):
        make()


def test_lengths_are_rounded_up(make, student):
    table = make()
    ids, mask = table.batch([0, 1, 2], 0)
    wider, wider_mask = table.batch([0, 1, 2], 0, multiple_of=7)
    assert wider.shape[1] == wider_mask.shape[1] == -(-ids.shape[1] // 7) * 7 > ids.shape[1]
    assert torch.equal(wider[:, : ids.shape[1]], ids)
    assert torch.equal(wider_mask[:, : ids.shape[1]], mask)
    assert not wider_mask[:, ids.shape[1] :].any()
    assert not wider[:, ids.shape[1] :].any()


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin"])
def test_a_flipped_bit_is_noticed(make, name, caplog):
    path = make().path
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    make()
    assert (path / name).read_bytes() == whole
    assert "is written again" in caplog.text


def test_a_forged_manifest_is_damaged(make):
    path = make().path
    for content in ("[]", "{}", '{"dtype": [], "tokens": {}, "sentences": null}', "[" * 60_000):
        (path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="are damaged"):
            TokenTable(path)
        make()
