"""The model card of a run tells about the weights that were saved."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from small_runs import options, write_data

from st_kdmcse import FeatureStore, KDMCSEConfig, KDMCSELoss
from st_kdmcse.data import load_sts_benchmark
from st_kdmcse.evaluation.similarity import spearman, sts_evaluator
from st_kdmcse.training import TrainingOptions, train
from st_kdmcse.training.card import describe_training

SPEARMAN = "spearman_cosine"


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences, store):
    return write_data(tmp_path_factory.mktemp("card"), sentences, store)


def score(card, name):
    """A metric of the card's metadata, as a number."""
    results = ModelCard(card).data.eval_results
    return next(each.metric_value for each in results if (each.dataset_name, each.metric_type) == (name, SPEARMAN))


@pytest.mark.parametrize("method", ["kdmcse", "mcse-clip-text", "simcse"])
def test_scores_teacher_and_heads_are_those_of_the_saved_weights(data, tiny_bert, tmp_path, monkeypatch, method):
    config = {} if method == "simcse" else {"projection_dim": 24}
    changes = {"max_steps": 12, "eval_steps": 1, "lr": 0.02, "seed": 3, "config": config}
    run = TrainingOptions(**options(data, tiny_bert, method=method, output_dir=tmp_path / "out", **changes))
    summary = train(run)
    best, last = summary["sts_dev_best"], summary["sts_dev_last"]
    assert best["step"] != last["step"], "the best step must not be the last one, or this test shows nothing"
    assert abs(best["spearman"] - last["spearman"]) > 0.01

    text = (tmp_path / "out/README.md").read_text()
    saved = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    for split, expected in (("dev", summary["sts_dev_of_best"]), ("test", summary["sts_test_of_best"])):
        measured = spearman(sts_evaluator(load_sts_benchmark(str(data), split), f"sts-{split}"), saved)
        assert expected == pytest.approx(measured, abs=1e-9)
        assert score(text, f"sts {split}") == pytest.approx(measured, abs=1e-4)
    bold = re.findall(r"^\| \*\*[\d.]+\*\* +\| \*\*(\d+)\*\*", text, re.MULTILINE)
    assert bold == [str(best["step"])]

    store = FeatureStore.open(data / "features")
    assert (f"Teacher: `{store.teacher}`" in text) == (store.checksum in text) == (method != "simcse")
    assert "ViT-B-32" not in text
    section = text[text.index("### Projection Heads") :]
    program = re.search("```python\n(.*?)```", section, re.DOTALL)[1]
    names: dict = {}
    monkeypatch.chdir(tmp_path / "out")
    exec(program, names)
    saved_heads = load_file(tmp_path / "out/heads/heads.safetensors")
    loaded = names["loss"].heads.state_dict()
    assert loaded.keys() == saved_heads.keys()
    assert all(torch.equal(loaded[key].cpu(), value) for key, value in saved_heads.items())


def test_features_by_value_have_no_teacher(student, tmp_path):
    (tmp_path / "README.md").write_text("# Card\n\n### Framework Versions\n")
    describe_training(tmp_path, [KDMCSELoss(student, KDMCSEConfig(), teacher_dim=8)])
    text = (tmp_path / "README.md").read_text()
    assert "Teacher" not in text
    assert "teacher_dim=8" in text
    assert text.index("### Projection Heads") < text.index("### Framework Versions")


@pytest.mark.parametrize("options", [{}, {"multimodal_weight": 0}, {"multimodal_weight": "auto", "projection_dim": 24}])
def test_the_heads_are_loaded_as_the_card_says(student, tmp_path, options):
    (tmp_path / "README.md").write_text("# Card\n\n### Framework Versions\n")
    loss = KDMCSELoss(student, KDMCSEConfig(**options), teacher_dim=8)
    student.save(str(tmp_path), create_model_card=False)
    loss.save_heads(tmp_path / "heads")
    describe_training(tmp_path, [loss])
    program = re.search("```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(program.replace('folder = "."', f'folder = "{tmp_path}"'), names)
    assert names["loss"].heads.state_dict().keys() == loss.heads.state_dict().keys()
