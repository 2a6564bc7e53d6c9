"""Raw students, made of a small encoder."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from file_events import at_path, interrupt
from helpers import load_command
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForMaskedLM, BertTokenizerFast, Trainer, TrainingArguments

from st_kdmcse import build_student
from st_kdmcse.training.mlm import _MaskedTrainer, _Masking


@pytest.fixture
def text(tmp_path, sentences):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(sentences) + "\n")
    return path


@pytest.fixture
def make(tiny_bert, text):
    def invoke(output, **changes):
        values = {"model": tiny_bert, "text": text, "output-dir": output, "max-steps": 40, "batch-size": 16, **changes}
        resume = ["--resume"] if values.pop("resume", False) else []
        flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
        return CliRunner().invoke(load_command("training/make_raw_student.py"), flags + resume)

    return invoke


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_it_learns_to_predict_and_is_a_stock_model(make, tiny_bert, tmp_path, sentences):
    result = make(tmp_path / "raw", **{"max-steps": 150, "lr": 5e-3})
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "raw/training_summary.json").read_text())
    losses = [entry["loss"] for entry in summary["losses"]]
    assert losses[-1] < losses[0] - 0.1
    assert summary["steps"] == 150
    assert not (tmp_path / "raw/checkpoints").exists()
    model = SentenceTransformer(str(tmp_path / "raw"), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling"]
    assert (model.max_seq_length, model[1].pooling_mode) == (32, "cls")
    before = build_student(str(tiny_bert)).to("cpu")
    assert abs(model.encode(sentences[:4]) - before.encode(sentences[:4])).max() > 0.01
    again = build_student(str(tmp_path / "raw")).to("cpu")
    assert (again.encode(sentences[:4]) == model.encode(sentences[:4])).all()


def test_the_loss_is_that_of_the_stock_trainer(tiny_bert, tmp_path, sentences):
    network = AutoModelForMaskedLM.from_pretrained(tiny_bert).double().eval()
    tokenizer = BertTokenizerFast.from_pretrained(tiny_bert)
    tokens = [tokenizer(sentence) for sentence in sentences[:16]]
    batch = dict(_Masking(tokenizer, mlm_probability=0.3)(tokens))
    losses, gradients = [], []
    for kind in (Trainer, _MaskedTrainer):
        network.zero_grad()
        trainer = kind(network, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
        losses.append(trainer.compute_loss(network, dict(batch)))
        losses[-1].backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_seeds_decide_everything(make, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert make(tmp_path / name, seed=seed).exit_code == 0
    one, same, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_ctrl_c_and_resume_give_the_same_model(make, tmp_path):
    assert make(tmp_path / "whole", **{"save-steps": 15}).exit_code == 0
    at_path("parts/checkpoints/checkpoint-15/trainer_state.json", interrupt)
    first = make(tmp_path / "parts", **{"save-steps": 15})
    assert first.exit_code == 130, first.output
    assert "with --resume to go on" in first.output
    torch.rand(7)
    second = make(tmp_path / "parts", **{"save-steps": 15}, resume=True)
    assert second.exit_code == 0, second.output
    whole, parts = (weights(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_that_was_killed_while_it_saved_is_saved(make, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("st_kdmcse.training.mlm._save", lambda *_: 1 / 0)
        assert isinstance(make(tmp_path / "raw").exception, ZeroDivisionError)
    shutil.copytree(tmp_path / "raw", tmp_path / "copy")
    for name in ("raw", "copy"):
        assert make(tmp_path / name, resume=True).exit_code == 0
    assert make(tmp_path / "whole").exit_code == 0
    resumed, whole = (weights(tmp_path / name) for name in ("copy", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "nowhere.txt"}, "--text nowhere.txt does not exist"),
        ({"model": "bert-bse"}, "--model bert-bse is neither"),
        ({"max-steps": 0}, "--max-steps must be positive"),
        ({"masked": 1.5}, "--masked must be between 0 and 1"),
    ],
)
def test_bad_input_is_one_line(make, tmp_path, changes, message):
    result = make(tmp_path / "raw", **changes)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "raw").exists()


def test_other_options_are_refused(make, tmp_path):
    at_path("raw/checkpoints/checkpoint-15/trainer_state.json", interrupt)
    make(tmp_path / "raw", **{"save-steps": 15})
    result = make(tmp_path / "raw", lr=1e-3, resume=True)
    assert result.exit_code == 2
    assert "lr was 0.0003, is 0.001" in result.output


def test_an_encoder_without_a_mask_is_refused(make, tmp_path, tiny_bert):
    folder = shutil.copytree(tiny_bert, tmp_path / "no-mask")
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder)
    result = make(tmp_path / "raw", model=folder)
    assert result.exit_code == 2
    assert "has no mask token" in result.output
