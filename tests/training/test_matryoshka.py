"""Embeddings that can be cut to smaller sizes."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from helpers import load_command
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from small_runs import flags, options, write_data

from st_kdmcse.cli.main import main
from st_kdmcse.data import load_sts_benchmark
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run import train

DIMS = (32, 16, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences, store):
    return write_data(tmp_path_factory.mktemp("matryoshka"), sentences, store)


@pytest.fixture(scope="module", params=[0, 3])
def finished(request, data, tiny_bert, tmp_path_factory):
    """A run of several sizes, with and without gradient caching; checkpoints at 4 and 8, scores at 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    changes = {"max_steps": 8, "eval_steps": 3, "save_steps": 4, "lr": 0.005, "mini_batch_size": request.param}
    dims = ",".join(map(str, reversed(DIMS)))
    arguments = flags(data, tiny_bert, output_dir=folder, matryoshka_dims=dims, **changes)
    result = CliRunner().invoke(main, ["train", *arguments])
    assert result.exit_code == 0, result.output
    return folder, arguments, result.output


def test_each_size_is_scored_and_the_card_says_how_to_take_it(finished, data):
    folder, _, output = finished
    summary = json.loads((folder / "training_summary.json").read_text())
    assert [scores["size"] for scores in summary["sts_by_size"]] == list(DIMS)
    card = ModelCard((folder / "README.md").read_text())
    results = {
        each.dataset_name: each.metric_value for each in card.data.eval_results if "spearman" in each.metric_type
    }
    for scores in summary["sts_by_size"]:
        model = SentenceTransformer(str(folder), device="cpu", truncate_dim=scores["size"])
        for split in ("dev", "test"):
            pairs = load_sts_benchmark(str(data), split)
            stock = EmbeddingSimilarityEvaluator(pairs.sentences1, pairs.sentences2, pairs.scores)
            assert scores[split] == pytest.approx(stock(model)["spearman_cosine"], abs=1e-6)
            assert results[f"sts {split} {scores['size']}"] == pytest.approx(scores[split], abs=1e-4)
        line = f"cut to {scores['size']} dimensions: {100 * scores['dev']:.2f} dev, {100 * scores['test']:.2f} test"
        assert line in output
    assert summary["sts_by_size"][0]["test"] == pytest.approx(summary["sts_test_of_best"], abs=1e-6)
    assert "trained with 32, 16, 4:" in card.text
    assert "truncate_dim=4)" in card.text
    assert "MatryoshkaLoss" in card.text


def test_a_run_is_resumed_exactly(finished, tmp_path):
    folder, arguments, _ = finished
    again = shutil.copytree(folder, tmp_path / "again")
    for lost in ("checkpoints/checkpoint-8", "last"):
        shutil.rmtree(again / lost)
    (again / "training_summary.json").unlink()
    arguments = [str(again) if each == str(folder) else each for each in arguments]
    result = CliRunner().invoke(main, ["train", *arguments, "--resume"])
    assert result.exit_code == 0, result.output
    for name in ("model.safetensors", "heads/heads.safetensors", "last/model.safetensors"):
        expected, found = (load_file(run / name) for run in (folder, again))
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
    before, after = (json.loads((run / "training_summary.json").read_text()) for run in (folder, again))
    assert before["sts_by_size"] == after["sts_by_size"]
    (again / "training_summary.json").unlink()
    arguments = ["32,8" if each == "4,16,32" else each for each in arguments]
    result = CliRunner().invoke(main, ["train", *arguments, "--resume"])
    assert result.exit_code == 2
    assert "matryoshka_dims was [32, 16, 4], is [32, 8]" in result.output


def test_the_loss_is_that_of_each_size(data, tiny_bert, tmp_path, monkeypatch):
    seen = []
    forward = MatryoshkaLoss.forward
    monkeypatch.setattr(
        MatryoshkaLoss, "forward", lambda loss, *inputs: seen.append(loss.matryoshka_dims) or forward(loss, *inputs)
    )
    run = options(data, tiny_bert, output_dir=tmp_path / "out", matryoshka_dims=[16, 32], eval_steps=0, max_steps=3)
    summary = train(TrainingOptions(**run))
    assert seen == [(32, 16)] * 3
    assert summary["sts_by_size"] == []
    assert summary["options"]["matryoshka_dims"] == [32, 16]


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ("64,32", "--matryoshka-dims must not exceed 32, the embedding size of --model: give 32 and smaller sizes"),
        ("16,8", "--matryoshka-dims must contain 32, the embedding size of --model"),
        ("32,0", "--matryoshka-dims must be different whole numbers from 1 on, got [32, 0]"),
        ("32,32", "--matryoshka-dims must be different whole numbers"),
        (",", "--matryoshka-dims must be different whole numbers"),
        ("32,half", "'32,half'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_training(data, tiny_bert, tmp_path, dims, message):
    for command in ("train_flickr.py", "../evaluation/ablation.py"):
        arguments = flags(data, tiny_bert, matryoshka_dims=dims)
        place = [str(tmp_path / "out")] if "ablation" in command else ["--output-dir", str(tmp_path / "out")]
        result = CliRunner().invoke(load_command(f"training/{command}"), [*place, *arguments])
        assert result.exit_code == 2
        assert message in result.output
        assert not list((tmp_path / "out").glob("*.json"))
