"""The schedule through stock SentenceTransformer.fit."""

import numpy as np
import pytest
import torch
from sentence_transformers import InputExample
from torch.utils.data import DataLoader

from st_kdmcse import KDMCSEConfig, KDMCSELoss, MultimodalInputExample, build_student, fit_objectives


def loader(examples, batch_size=8):
    return DataLoader(examples, batch_size=batch_size, shuffle=True)


def pairs_by_row(store, count=72):
    return [MultimodalInputExample(texts=[store.caption(row)], row=row) for row in range(count)]


def pairs_by_value(store, count=72):
    batch = store.gather(range(count))
    return [
        MultimodalInputExample(texts=[store.caption(row)], image_features=image, text_features=text)
        for row, image, text in zip(range(count), batch.image_features, batch.text_features, strict=True)
    ]


class Recorder(KDMCSELoss):
    """Notes which terms each batch had, and what it was made of."""

    def forward(self, sentence_features, labels=None):
        components = super().forward(sentence_features, labels)
        self.seen.append((list(components), len(sentence_features[0]["input_ids"]), labels))
        return components


@pytest.mark.parametrize("make_pairs", [pairs_by_row, pairs_by_value])
def test_fit_follows_the_schedule_and_trains_the_heads(student, store, sentences, make_pairs, tmp_path):
    loss = Recorder(student, KDMCSEConfig(multimodal_weight=1.0), features=store)
    loss.seen = []
    before = {name: value.clone() for name, value in loss.heads.state_dict().items()}
    texts = [InputExample(texts=[sentence]) for sentence in sentences]
    objectives = fit_objectives(loader(texts), loader(make_pairs(store)), loss)
    assert len(objectives) == 3  # ceil(200 / 72)
    student.fit(
        train_objectives=objectives,
        epochs=1,
        warmup_steps=0,
        weight_decay=0.0,
        show_progress_bar=False,
        checkpoint_path=str(tmp_path),
        optimizer_params={"lr": 1e-3},
    )
    kinds = "".join("P" if len(terms) == 3 else "T" for terms, _, _ in loss.seen)
    assert kinds == "TTP" * 13  # 100 of 200 sentences a loader, in batches of 8
    assert {size for _, size, _ in loss.seen} == {8}
    expected_shape = (8, 1) if make_pairs is pairs_by_row else (8, 2 * store.dim)
    assert {tuple(labels.shape) for terms, _, labels in loss.seen if len(terms) == 3} == {expected_shape}
    for name, value in loss.heads.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_a_run_that_would_go_on_with_random_heads_is_refused(tiny_bert, store, sentences, tmp_path):
    def fit(epochs, resume):
        model = build_student(str(tiny_bert)).to("cpu")
        loss = KDMCSELoss(model, features=store)
        texts = [InputExample(texts=[sentence]) for sentence in sentences]
        model.fit(
            train_objectives=fit_objectives(loader(texts), loader(pairs_by_row(store)), loss),
            epochs=epochs,
            show_progress_bar=False,
            checkpoint_path=str(tmp_path),
            checkpoint_save_steps=20,
            resume_from_checkpoint=resume,
        )

    fit(1, resume=False)
    with pytest.raises(ValueError, match="its heads are random still"):
        fit(2, resume=True)


def test_the_ratio_can_be_given(student, store, sentences):
    loss = KDMCSELoss(student, features=store)
    texts = [InputExample(texts=[sentence]) for sentence in sentences]
    objectives = fit_objectives(loader(texts), loader(pairs_by_row(store)), loss, pair_every=6)
    sizes = [len(one.dataset) for one, _ in objectives]
    assert sizes == [72] * 6  # five loaders of 40 sentences are repeated up to the 72 pairs
    drawn = {example.texts[0] for one, _ in objectives[:5] for example in one.dataset}
    assert drawn == set(sentences)


def test_what_cannot_be_trained_is_refused(student, store, sentences):
    loss = KDMCSELoss(student, features=store)
    texts = [InputExample(texts=[sentence]) for sentence in sentences]
    pairs = pairs_by_row(store)
    with pytest.raises(ValueError, match="one batch size"):
        fit_objectives(loader(texts, 4), loader(pairs, 8), loss)
    with pytest.raises(ValueError, match="text example 1 "):
        fit_objectives(loader([texts[0], InputExample(texts=["a", "b"])]), loader(pairs), loss)
    for labelled in (InputExample(texts=["a dog"], label=1), pairs[0]):
        with pytest.raises(ValueError, match="text example 200 has a label"):
            fit_objectives(loader([*texts, labelled]), loader(pairs), loss)
    with pytest.raises(ValueError, match="leave 5 pairs for a loader"):
        fit_objectives(loader(texts), loader(pairs[:5]), loss, pair_every=3)
    with pytest.raises(ValueError, match="example 3 .*mixes"):
        fit_objectives(loader(texts), loader([*pairs[:3], pairs_by_value(store, 1)[0]]), loss)
    wrong = MultimodalInputExample(["a"], np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="example 1 .*expected 8"):
        fit_objectives(loader(texts), loader([pairs_by_value(store, 1)[0], wrong]), loss)
