"""LoRA: few weights learn, and what is saved is a stock model."""

import json
import shutil

import numpy as np
import pytest
import torch
from encoders import make_encoder
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from small_runs import options, write_data
from transformers import AutoModel

from st_kdmcse import build_student
from st_kdmcse.data import load_sts_benchmark
from st_kdmcse.evaluation.similarity import spearman, sts_evaluator
from st_kdmcse.training import lora
from st_kdmcse.training.inputs import check_inputs
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run import train

pytest.importorskip("peft")

GIVEN = {"lora": 2, "lr": 1e-2, "bf16": False, "max_steps": 6, "save_steps": 3}


@pytest.fixture
def data(sentences, store, tmp_path):
    return write_data(tmp_path, sentences, store)


def model_with_dense(folder):
    """A sentence-transformers model in bfloat16 with a Dense module."""
    encoder = make_encoder("roberta", folder / "encoder")
    AutoModel.from_pretrained(encoder).bfloat16().save_pretrained(encoder)
    modules = [Transformer(str(encoder)), Pooling(16), Dense(16, 12)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.mark.parametrize("make", [lambda folder: make_encoder("bert", folder / "bert"), model_with_dense])
def test_what_is_saved_is_a_stock_model_that_differs_by_updates_of_low_rank(make, data, tmp_path, caplog):
    model = make(tmp_path)
    with caplog.at_level("INFO", "st_kdmcse"):
        summary = train(TrainingOptions(**options(data, model, output_dir=tmp_path / "run", **GIVEN)))
    assert "LoRA trains 256 parameters of an encoder" in caplog.text  # 2 layers x 2 matrices x 2 x 16 x 2
    assert summary["options"]["lora"] == 2
    start = build_student(str(model)).to("cpu")
    for folder in (tmp_path / "run", tmp_path / "run" / "last"):
        assert not list(folder.glob("*adapter*")) + list(folder.glob("*lora*"))
        loaded = SentenceTransformer(str(folder), device="cpu")
        before, after = start.state_dict(), loaded.state_dict()
        assert after.keys() == before.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        in_encoder = {name for name in changed if name.startswith("0.")}
        assert len(in_encoder) == 4
        assert changed - in_encoder == {name for name in before if name.startswith("2.")}
        for name in in_encoder:
            assert ".query.weight" in name or ".value.weight" in name
            assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2
    best = SentenceTransformer(str(tmp_path / "run"), device="cpu")
    score = spearman(sts_evaluator(load_sts_benchmark(str(data), "dev"), "dev"), best)
    assert score == pytest.approx(summary["sts_dev_of_best"], abs=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mini_batch_size": 3, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"config": {"retention_weight": 1.0, "multimodal_weight": "auto"}, "head_learning_rate": 1e-2},
    ],
)
def test_a_run_goes_on_exactly(changes, data, tmp_path):
    model = model_with_dense(tmp_path)
    given = options(data, model, **{**GIVEN, **changes})
    whole = train(TrainingOptions(**given, output_dir=tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for lost in ("training_summary.json", "model.safetensors"):
        (tmp_path / "resumed" / lost).unlink()
    for lost in ("checkpoints/checkpoint-6", "last"):
        shutil.rmtree(tmp_path / "resumed" / lost)
    resumed = train(TrainingOptions(**given, output_dir=tmp_path / "resumed", resume=True))
    assert resumed["sts_dev_curve"] == whole["sts_dev_curve"]
    assert len({point["spearman"] for point in whole["sts_dev_curve"]}) > 1
    names = ["model.safetensors", "2_Dense/model.safetensors", "heads/heads.safetensors"]
    for name in [*names, *(f"last/{name}" for name in names), "checkpoints/checkpoint-6/lora.safetensors"]:
        first, second = (load_file(tmp_path / run / name) for run in ("whole", "resumed"))
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name


def test_a_run_that_was_killed_while_finishing_is_finished_by_resuming(data, tmp_path):
    model = make_encoder("bert", tmp_path / "bert")
    given = options(data, model, output_dir=tmp_path / "run", **GIVEN)
    train(TrainingOptions(**given))
    weights = load_file(tmp_path / "run" / "model.safetensors")
    for lost in ("training_summary.json", "model.safetensors"):
        (tmp_path / "run" / lost).unlink()
    train(TrainingOptions(**given, resume=True))
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_a_damaged_checkpoint_is_passed_over(data, tmp_path, caplog):
    given = options(data, make_encoder("bert", tmp_path / "bert"), output_dir=tmp_path / "run", **GIVEN)
    train(TrainingOptions(**given))
    (tmp_path / "run" / "training_summary.json").unlink()
    (tmp_path / "run" / "checkpoints" / "checkpoint-6" / "lora.safetensors").unlink()
    assert train(TrainingOptions(**given, resume=True))["steps"] == 6
    assert "lora.safetensors is missing" in caplog.text


def test_updates_of_another_rank_are_not_loaded(student, tmp_path):
    lora.add_lora(student, 2)
    lora.save_lora(student, tmp_path)
    other = build_student(str(make_encoder("bert", tmp_path / "bert")))
    lora.add_lora(other, 3)
    with pytest.raises(ValueError, match="holds the updates of another encoder or rank"):
        lora.load_lora(other, tmp_path)


def test_inside_the_block_the_encoder_is_a_stock_one_with_the_same_embeddings(student, sentences, tmp_path):
    lora.add_lora(student, 4)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted, expected = student[0].model, student.encode(sentences[:8])
    with lora.lora_merged(student):
        student.save_pretrained(str(tmp_path / "model"))
        np.testing.assert_allclose(student.encode(sentences[:8]), expected, rtol=1e-4, atol=1e-5)
    assert student[0].model is adapted
    assert lora.has_lora(student)
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert not lora.has_lora(loaded)
    np.testing.assert_allclose(loaded.encode(sentences[:8]), expected, rtol=1e-4, atol=1e-5)
    assert "lora" not in json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()))


@pytest.mark.parametrize("kind", ["distilbert", "mpnet", "albert", "modernbert"])
def test_encoders_of_unknown_layers_are_refused_before_anything_is_read(kind, data, tmp_path):
    given = TrainingOptions(**options(data, make_encoder(kind, tmp_path / kind), output_dir=tmp_path / "run", **GIVEN))
    (data / "text.txt").write_text("")
    for act in (train, check_inputs):
        with pytest.raises(ValueError, match=f"`lora`: peft knows no target modules of the encoder, a {kind}"):
            act(given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["xlm-roberta", "electra", "deberta-v2"])
def test_encoders_of_known_layers_are_trained(kind, data, tmp_path):
    given = {**GIVEN, "max_steps": 2, "eval_steps": 0}
    model = make_encoder(kind, tmp_path / kind)
    train(TrainingOptions(**options(data, model, output_dir=tmp_path / "run", **given)))
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "run"))
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert len(changed) == 4


def test_without_peft_it_says_what_to_install(data, tmp_path, monkeypatch):
    given = TrainingOptions(
        **options(data, make_encoder("bert", tmp_path / "bert"), output_dir=tmp_path / "run", **GIVEN)
    )
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "st-kdmcse\[lora\]"'):
        train(given)
    assert not (tmp_path / "run").exists()


def test_a_negative_rank_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`lora` must not be negative, got -1"):
        TrainingOptions(text=tmp_path, method="simcse", lora=-1)
