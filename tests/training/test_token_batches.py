"""Tests of st_kdmcse.training.token_batches."""

import pytest
import torch
from datasets import Dataset

from st_kdmcse.training.collator import KDMCSEDataCollator
from st_kdmcse.training.token_batches import TokenBatches


@pytest.fixture
def datasets(sentences, store):
    return [Dataset.from_dict({"sentence": sentences}), store.dataset()]


def collator(model, **options):
    return KDMCSEDataCollator(preprocess_fn=model.preprocess, **options)


def test_batches_of_each_source_are_the_collators(student, datasets, tmp_path):
    batches = TokenBatches.of(datasets, student, collator(student), tmp_path)
    assert len(batches) == sum(map(len, datasets))
    for number, rows in ((0, [5, 190, 3, 3]), (1, [0, 71, 8])):
        start = number * len(datasets[0])
        made = batches.__getitems__([start + row for row in rows])
        wanted = collator(student)([datasets[number][row] for row in rows])
        assert made.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(made[name], value) if isinstance(value, torch.Tensor) else made[name] == value


@pytest.mark.parametrize("options", [{"max_length": 4}, {"prompts": {"sentence": "query: "}}])
def test_a_collator_with_options_is_left_alone(student, datasets, tmp_path, options):
    with pytest.raises(ValueError, match="its own prompts, routes or lengths"):
        TokenBatches.of(datasets, student, collator(student, **options), tmp_path)


def test_padding_on_the_left_is_left_to_the_collator(student, datasets, tmp_path):
    student[0].tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="fills up on the left"):
        TokenBatches.of(datasets, student, collator(student), tmp_path)


def test_another_collator_is_left_alone(student, datasets, tmp_path):
    class Other(KDMCSEDataCollator):
        pass

    with pytest.raises(ValueError, match="not the usual one"):
        TokenBatches.of(datasets, student, Other(student.preprocess), tmp_path)


def test_batches_without_a_mask_are_left_to_the_collator(student, datasets, tmp_path):
    student[0].tokenizer.model_input_names = ["input_ids"]
    with pytest.raises(ValueError, match="its batches hold sentence_input_ids"):
        TokenBatches.of(datasets, student, collator(student), tmp_path)
