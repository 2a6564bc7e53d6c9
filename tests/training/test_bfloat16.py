"""Runs in bfloat16: what is computed in it, what is not, and resuming on a machine that has none."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import cpu_with_bfloat16, load_command
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from small_runs import flags, options, write_data

from st_kdmcse.data import load_sts_benchmark
from st_kdmcse.evaluation.similarity import spearman, sts_evaluator
from st_kdmcse.losses.base import TwoViewLoss
from st_kdmcse.training import TrainingOptions, train

STEPS = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "lr": 0.003}


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences, store):
    return write_data(tmp_path_factory.mktemp("bfloat16"), sentences, store)


@pytest.fixture(scope="module")
def whole(data, tiny_bert, tmp_path_factory):
    """A finished run in bfloat16."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with cpu_with_bfloat16(True):
        train(TrainingOptions(**options(data, tiny_bert, output_dir=folder, **STEPS)))
    return folder


@pytest.fixture
def half(whole, data, tiny_bert, tmp_path):
    """Options that resume the same run, whose second half was lost."""
    folder = Path(shutil.copytree(whole, tmp_path / "half"))
    for name in ("checkpoints/checkpoint-6", "last"):
        shutil.rmtree(folder / name)
    for path in (folder / "checkpoints").glob("best-6"):
        shutil.rmtree(path)
    for name in ("training_summary.json", "model.safetensors"):
        (folder / name).unlink()
    return TrainingOptions(**options(data, tiny_bert, output_dir=folder, resume=True, **STEPS))


def summary_of(folder):
    return json.loads((folder / "training_summary.json").read_text())


def test_it_is_the_default_where_it_is_faster_and_scores_are_float32(whole, data):
    summary = summary_of(whole)
    assert summary["bf16"] is True
    assert summary["precision"] == {"training": "bfloat16", "sts_dev_curve": "bfloat16", "scores_of_best": "float32"}
    assert {value.dtype for value in load_file(whole / "model.safetensors").values()} == {torch.float32}
    saved = SentenceTransformer(str(whole), device="cpu")
    for split in ("dev", "test"):
        measured = spearman(sts_evaluator(load_sts_benchmark(str(data), split), f"sts-{split}"), saved)
        assert summary[f"sts_{split}_of_best"] == pytest.approx(measured, abs=1e-9)


def test_the_student_computes_in_it_and_the_loss_does_not(data, tiny_bert, tmp_path, bfloat16, monkeypatch):
    seen = {}
    text_loss = TwoViewLoss.compute_loss_from_embeddings

    def watched(self, views, **teacher):
        layer = self.model[0].auto_model.encoder.layer[0].output.dense
        layer.register_forward_hook(lambda each, _, output: seen.update({f"layer {each.training}": output.dtype}))
        terms = text_loss(self, views, **teacher)
        seen.update(view=views[0].dtype, loss=terms.total.dtype)
        return terms

    monkeypatch.setattr(TwoViewLoss, "compute_loss_from_embeddings", watched)
    run = options(data, tiny_bert, method="simcse", output_dir=tmp_path / "out", **{**STEPS, "max_steps": 2})
    train(TrainingOptions(**run))
    assert seen.pop("layer True") == torch.bfloat16
    assert seen.pop("layer False") == torch.float32  # the last evaluation is that of the result
    assert seen == {"view": torch.float32, "loss": torch.float32}


def test_resuming_ends_with_the_same_weights(whole, half, bfloat16):
    train(half)
    assert (half.output_dir / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    resumed, expected = summary_of(half.output_dir), summary_of(whole)
    for name in ("sts_dev_before", "sts_dev_curve", "sts_test_of_best", "precision", "bf16_until_step"):
        assert resumed[name] == expected[name]


def test_a_machine_without_it_refuses_to_resume_and_goes_on_in_float32_when_told_to(half, whole, data, tiny_bert):
    before = (half.output_dir / "run.json").read_bytes()
    command = load_command("training/train_flickr.py")
    arguments = flags(data, tiny_bert, output_dir=half.output_dir, **STEPS)
    result = CliRunner().invoke(command, [*arguments, "--resume"])
    assert result.exit_code == 2
    assert "was begun in bfloat16, and this CPU has no instructions for bfloat16" in result.output
    assert "set --no-bf16 to go on in float32" in result.output
    assert (half.output_dir / "run.json").read_bytes() == before
    result = CliRunner().invoke(command, [*arguments, "--resume", "--no-bf16"])
    assert result.exit_code == 0, result.output
    summary = summary_of(half.output_dir)
    assert (summary["bf16"], summary["bf16_until_step"]) == (False, 3)
    assert summary["sts_dev_curve"][0] == summary_of(whole)["sts_dev_curve"][0]


def test_a_run_in_float32_goes_on_in_float32(data, tiny_bert, tmp_path):
    run = TrainingOptions(**options(data, tiny_bert, output_dir=tmp_path / "out", **STEPS))
    train(run)
    weights = (tmp_path / "out/model.safetensors").read_bytes()
    for name in ("checkpoints/checkpoint-6", "last"):
        shutil.rmtree(tmp_path / "out" / name)
    (tmp_path / "out/training_summary.json").unlink()
    with cpu_with_bfloat16(True):
        with pytest.raises(ValueError, match="bf16 was False, is True"):
            train(replace(run, resume=True, bf16=True))
        assert train(replace(run, resume=True))["bf16"] is False
    assert (tmp_path / "out/model.safetensors").read_bytes() == weights


def test_it_is_refused_where_it_is_slower():
    with pytest.raises(ValueError, match="`bf16`: this CPU has no instructions for bfloat16.*leave it out"):
        TrainingOptions(text=Path("text.txt"), method="simcse", bf16=True)
