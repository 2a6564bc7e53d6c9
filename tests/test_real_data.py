"""A short run on real sentences, captions, features and STS-B, from a real encoder with real weights."""

import json

import pytest

from st_kdmcse.data import FeatureStore
from st_kdmcse.demo import run as demo
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run import train


def test_training_on_the_real_formats(shared_data, minilm, tmp_path):
    (tmp_path / "text.txt").write_text(
        "".join((shared_data / "wiki" / "wiki_sentences.txt").open(encoding="utf-8").readlines()[:400]),
        encoding="utf-8",
    )
    summary = train(
        TrainingOptions(
            model=minilm,
            text=tmp_path / "text.txt",
            features=shared_data / "flickr8k_features" / "released_format_60.json",
            config={"image_threshold": "auto", "text_threshold": "auto"},
            eval_steps=0,
            max_steps=4,
            batch_size=8,
            pair_every=2,
            output_dir=tmp_path / "out",
        )
    )
    assert summary["steps"] == 4
    assert summary["config"]["teacher_dim"] == 512
    # The two scales of the teacher: captions of one image against each other, and against their image.
    assert 0.2 < summary["config"]["image_threshold"] < 0.4 < summary["config"]["text_threshold"] < 0.6
    assert FeatureStore.open(tmp_path / "out" / "features", verify=True).num_images == 60
    assert json.loads((tmp_path / "out" / "training_summary.json").read_text())["data_sha256"].keys() == {
        "text",
        "features",
    }


def test_the_demo_in_small(minilm, tmp_path, capsys, monkeypatch):
    pytest.importorskip("open_clip")
    monkeypatch.setattr(
        demo, "QUICK", demo.Size(scenes=30, sentences=60, steps=4, batch_size=8, dev_pairs=20, test_pairs=40)
    )
    scores = demo.run_demo(tmp_path / "demo", quick=True)
    output = capsys.readouterr().out
    assert list(scores) == ["before", "simcse", "kdmcse"]
    for score in scores.values():
        assert f"{100 * score:6.2f}" in output
    assert "encode(3 sentences) -> float32 (3, 384)" in output
    with pytest.raises(ValueError, match="not empty"):
        demo.run_demo(tmp_path / "demo", quick=True)
