"""Heads that start aligned."""

import json

import numpy as np
import pytest
import torch
from small_runs import options, write_data

from st_kdmcse import FeatureStore, KDMCSEConfig, KDMCSELoss, MCSELoss
from st_kdmcse.training.head_init import align_heads
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run import train


@pytest.fixture
def learnable(student, sentences, tmp_path):
    """A store whose features follow from the embeddings of the student, with a mean and some noise."""
    generator = np.random.default_rng(0)
    embeddings = student.encode(sentences)
    embeddings = (embeddings - embeddings.mean(axis=0)) / embeddings.std(axis=0)
    texts = embeddings @ generator.normal(size=(32, 8)) / 32 + 3 + 0.01 * generator.normal(size=(200, 8))
    rows = np.arange(len(texts))
    ids = list(map(str, rows))
    return FeatureStore.from_arrays(tmp_path / "learnable", texts - 5, texts, sentences, rows, ids, "teacher")


def cosines(one, other):
    return torch.nn.functional.normalize(one) @ torch.nn.functional.normalize(other).T


def heads_of(loss, store, sentences):
    with torch.no_grad():
        student = loss.heads["grounding"](torch.from_numpy(loss.model.encode(sentences)))
        batch = store.gather(np.arange(len(sentences)))
        image = loss.heads["teacher_image"](torch.from_numpy(batch.image_features).float())
        text = loss.heads["teacher_text"](torch.from_numpy(batch.text_features).float())
    return student, image, text


@pytest.mark.parametrize("width", [6, 8, 20])
def test_captions_begin_beside_their_images_and_texts(student, sentences, learnable, width):
    loss = KDMCSELoss(student, KDMCSEConfig(projection_dim=width), features=learnable)
    align_heads(loss)
    anchors, *teachers = heads_of(loss, learnable, sentences)
    for candidates in teachers:
        found = cosines(anchors, candidates)
        assert found.diagonal().mean() > (0.9 if width <= 8 else 0.7)
        assert (found.argmax(dim=1) == torch.arange(200)).float().mean() > 0.5
    outputs = torch.cat(heads_of(loss, learnable, sentences))
    assert outputs[:, :8].abs().max() <= 0.55  # where tanh is nearly linear


def test_teacher_heads_keep_the_similarities_of_the_teacher(student, sentences, learnable):
    loss = KDMCSELoss(student, KDMCSEConfig(projection_dim=8), features=learnable)
    align_heads(loss)
    text = heads_of(loss, learnable, sentences)[2]
    features = torch.from_numpy(np.array(learnable.text_features)).float()
    expected = cosines(features - features.mean(dim=0), features - features.mean(dim=0))
    torch.testing.assert_close(cosines(text, text), expected, rtol=0, atol=0.05)
    weight = loss.heads["teacher_text"].dense.weight.double()
    torch.testing.assert_close(weight @ weight.T / (weight @ weight.T)[0, 0], torch.eye(8).double(), rtol=0, atol=1e-6)


def test_it_depends_on_student_and_features_alone(student, store):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loss = MCSELoss(student, features=store)
        state = torch.get_rng_state()
        student.train()
        align_heads(loss)
        assert torch.equal(torch.get_rng_state(), state)
        assert student.training
        found.append(loss.heads["grounding"].state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_two_teachers(student, sentences, learnable, tmp_path, monkeypatch):
    monkeypatch.setattr(FeatureStore, "shared_space", False)
    config = KDMCSEConfig(projection_dim=8, image_soft_label="image-image", image_filter="image-image")
    loss = KDMCSELoss(student, config, features=learnable)
    align_heads(loss)
    _, image, text = heads_of(loss, learnable, sentences)
    assert cosines(text, image).diagonal().mean() > 0.9


def test_what_cannot_be_aligned(student, store):
    with pytest.raises(ValueError, match="no feature store"):
        align_heads(KDMCSELoss(student))
    with pytest.raises(ValueError, match="at least two captions, got 1"):
        align_heads(KDMCSELoss(student, features=store), np.array([3]))


def test_a_run_begins_with_aligned_heads_and_goes_on_from_its_checkpoint(
    tmp_path, tiny_bert, sentences, store, monkeypatch
):
    data = write_data(tmp_path, sentences, store)
    aligned = []
    monkeypatch.setattr(
        "st_kdmcse.training.run.align_heads", lambda loss, rows: aligned.append(len(rows)) or align_heads(loss, rows)
    )
    run = TrainingOptions(**options(data, tiny_bert, head_init="ridge", save_steps=2, output_dir=tmp_path / "run"))
    train(run)
    assert aligned == [72]
    (tmp_path / "run/training_summary.json").unlink()
    train(TrainingOptions(**{**vars(run), "resume": True}))
    assert aligned == [72]
    assert json.loads((tmp_path / "run/run.json").read_text())["options"]["head_init"] == "ridge"
    with pytest.raises(ValueError, match="method simcse has no heads that `head_init` could align"):
        TrainingOptions(**options(data, tiny_bert, head_init="ridge", method="simcse"))
    with pytest.raises(ValueError, match="`head_init` must be one of random, ridge, got 'zero'"):
        TrainingOptions(**options(data, tiny_bert, head_init="zero"))
