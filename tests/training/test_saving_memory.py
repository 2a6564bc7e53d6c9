"""Gradient accumulation and gradient checkpointing: the same gradients in parts, or computed twice."""

import shutil
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset, DatasetDict
from encoders import ENCODERS, make_encoder
from helpers import gradients, without_dropout
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformerTrainingArguments
from small_runs import options, write_data
from transformers import XLNetConfig, XLNetModel, set_seed

from st_kdmcse import CachedKDMCSELoss, KDMCSEConfig, KDMCSELoss, KDMCSETrainer, build_student, unpadded
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run import train
from st_kdmcse.training.student import enable_checkpointing

LOSSES = {"plain": (KDMCSELoss, {}), "cached": (CachedKDMCSELoss, {"mini_batch_size": 5})}


def make_loss(kind, student, store):
    loss, given = LOSSES[kind]
    set_seed(1)
    return loss(student, KDMCSEConfig(multimodal_weight=0.5), features=store, **given)


@pytest.fixture
def uneven(sentences):
    """Sentences of 1 to 12 words."""
    words = " ".join(sentences).split()
    return [" ".join(words[start : start + 1 + start % 12]) for start in range(40)]


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_checkpointing_changes_neither_loss_nor_gradients(student, uneven, store, kind, unpad):
    student.train()  # with dropout, which is drawn again in the backward pass
    loss = make_loss(kind, student, store)
    features = student.preprocess(uneven[:12])
    seen = []
    student[0].auto_model.encoder.layer[0].attention.self.query.register_forward_hook(lambda *_: seen.append(1))
    found = []
    with unpadded(student) if unpad else nullcontext():
        for checkpointed in (False, True):
            if checkpointed:
                enable_checkpointing(student)
            seen.clear()
            set_seed(5)
            value = loss([dict(features)], torch.arange(12)).total
            found.append((value.detach(), gradients(loss, value), len(seen)))
    (expected, expected_gradients, calls), (value, actual_gradients, more_calls) = found
    assert more_calls > calls  # layers are computed again
    assert torch.equal(value, expected)
    assert actual_gradients.keys() == expected_gradients.keys()
    assert all(torch.equal(actual_gradients[name], each) for name, each in expected_gradients.items())


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_have_checkpointing_or_are_refused(kind, uneven, store, tmp_path):
    student = build_student(str(make_encoder(kind, tmp_path))).to("cpu").train()
    if kind in ("mpnet", "albert"):
        with pytest.raises(ValueError, match=f"`gradient_checkpointing`: transformers has none for .*{kind}"):
            enable_checkpointing(student)
        return
    loss = make_loss("plain", student, store)
    features, found = student.preprocess(uneven[:12]), []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(student)
        set_seed(5)
        found.append(gradients(loss, loss([dict(features)], torch.arange(12)).total))
    assert all(torch.equal(found[1][name], each) for name, each in found[0].items())


@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_takes_the_mean_of_the_gradients_of_its_batches(student, sentences, store, kind, tmp_path):
    without_dropout(student)
    loss = make_loss(kind, student, store)
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=3,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1e9,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    batches, forward = [], loss.forward
    loss.forward = lambda columns, labels=None: batches.append((list(columns), labels)) or forward(columns, labels)
    data = DatasetDict(text=Dataset.from_dict({"sentence": sentences}), pairs=store.dataset())
    trainer = KDMCSETrainer(student, arguments, data, loss=loss, pair_every=2, unpad=False)
    states = [{name: value.detach().clone() for name, value in loss.named_parameters()}]
    trainer.train()
    states.append({name: value.detach().clone() for name, value in loss.named_parameters()})
    assert [labels is not None for _, labels in batches] == [False] * 3 + [True] * 3  # a step is of one kind

    loss.load_state_dict(states[0], strict=False)
    loss.heads_fit()
    totals = []
    for start in (0, 3):
        terms = [
            forward([dict(column) for column in columns], labels) for columns, labels in batches[start : start + 3]
        ]
        totals.append(torch.stack([term.total for term in terms]).mean())
        found = gradients(loss, totals[-1])
        with torch.no_grad():
            for name, parameter in loss.named_parameters():
                parameter -= 0.5 * found.get(name, torch.zeros(()))
    for name, parameter in loss.named_parameters():
        torch.testing.assert_close(parameter, states[1][name], rtol=1e-4, atol=1e-5, msg=name)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logs] == pytest.approx([total.item() for total in totals], abs=2e-3)
    assert logs[1]["text"] + logs[1]["image"] + logs[1]["caption"] == pytest.approx(logs[1]["loss"], abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_a_run_with_both_goes_on_exactly(tiny_bert, sentences, store, tmp_path, mini_batch_size):
    data = write_data(tmp_path, sentences, store)
    given = {
        "mini_batch_size": mini_batch_size,
        "gradient_accumulation_steps": 2,
        "config": {"multimodal_weight": "auto"},
        "max_steps": 6,
        "save_steps": 3,
        "lr": 1e-3,
        "bf16": False,
    }
    summaries, weights = [], []
    for name, checkpointed in (("whole", True), ("plain", False)):
        run = TrainingOptions(
            **options(data, tiny_bert, output_dir=tmp_path / name, gradient_checkpointing=checkpointed, **given)
        )
        summaries.append(train(run))
    shutil.copytree(tmp_path / "plain", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "checkpoint-6")
    for lost in ("training_summary.json", "model.safetensors"):
        (tmp_path / "resumed" / lost).unlink()
    # Memory may turn out to be short: a run may go on with checkpointing.
    run = options(data, tiny_bert, output_dir=tmp_path / "resumed", resume=True, gradient_checkpointing=True, **given)
    summaries.append(train(TrainingOptions(**run)))
    for summary in summaries:
        assert summary["steps"] == 6
        assert summary["sts_dev_curve"] == summaries[0]["sts_dev_curve"]
    for name in ("model.safetensors", "last/model.safetensors", "heads/heads.safetensors"):
        weights = [load_file(tmp_path / each / name) for each in ("whole", "plain", "resumed")]
        for other in weights[1:]:
            assert all(torch.equal(value, other[key]) for key, value in weights[0].items()), name
    (tmp_path / "resumed" / "training_summary.json").unlink()
    with pytest.raises(ValueError, match="gradient_accumulation_steps was 2, is 1"):
        train(TrainingOptions(**{**run, "gradient_accumulation_steps": 1}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be positive, got 0"),
        ({"gradient_accumulation_steps": 2, "compile": "reduce-overhead"}, "overwrites gradients"),
    ],
)
def test_options_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(text=tmp_path, method="simcse", **changes)


def test_a_source_smaller_than_a_batch_is_refused_before_a_model_is_loaded(tiny_bert, sentences, store, tmp_path):
    data = write_data(tmp_path, sentences, store)
    given = {"gradient_accumulation_steps": 2, "batch_size": 100, "output_dir": tmp_path / "run"}
    with pytest.raises(ValueError, match="`features` has 72 sentences to train on, and a step takes 2 batches of 100"):
        train(TrainingOptions(**options(data, tiny_bert, **given)))
    assert not (tmp_path / "run").exists()


def test_an_encoder_without_checkpointing_is_refused(tiny_bert, sentences, store, tmp_path):
    data = write_data(tmp_path, sentences, store)
    folder = tmp_path / "xlnet"
    size = build_student(tiny_bert).tokenizer.vocab_size
    XLNetModel(XLNetConfig(vocab_size=size, d_model=16, n_layer=1, n_head=2, d_inner=16)).save_pretrained(folder)
    build_student(tiny_bert).tokenizer.save_pretrained(folder)
    given = options(data, folder, output_dir=tmp_path / "run", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="`gradient_checkpointing`: transformers has none for a xlnet"):
        train(TrainingOptions(**given))
    assert not (tmp_path / "run" / "run.json").exists()
