"""The training script as a user runs it, on a small real encoder and small real files."""

import gzip
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import WORDS, copy_tree, free_port
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from st_kdmcse import FeatureStore, KDMCSELoss, build_student
from st_kdmcse.data import load_sts_benchmark, true_pair_score
from st_kdmcse.evaluation.similarity import spearman, sts_evaluator
from st_kdmcse.extraction import ExtractionOptions, extract_dataset
from st_kdmcse.files import sha256_file
from st_kdmcse.training.checkpoints import latest_checkpoint
from st_kdmcse.training.methods import METHODS
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run import changes_since_start, train

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "training"))

from train_flickr import main  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences, store):
    """Text, features and STS-B in the formats that a user has."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    copy_tree(store.path, folder / "features")
    generator = np.random.default_rng(5)
    for split in ("dev", "test"):
        lines = []
        for number in range(30):
            words = list(generator.choice(WORDS, size=6))
            changed = int(generator.integers(0, 6))
            other = [*words[: 6 - changed], *generator.choice(WORDS, size=changed)]
            gold = 5 - 5 * changed / 6
            lines.append(f"main\tfile\t2012\t{number}\t{gold:.3f}\t{' '.join(words)}\t{' '.join(other)}")
        target = folder / "STS" / "STSBenchmark"
        target.mkdir(parents=True, exist_ok=True)
        (target / f"sts-{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def arguments(data, tiny_bert, tmp_path):
    def build(**changes):
        options = {
            "model": tiny_bert,
            "text": data / "text.txt",
            "features": data / "features",
            "eval-data": data,
            "output-dir": tmp_path / "out",
            "max-steps": 6,
            "batch-size": 8,
            "eval-steps": 3,
            **changes,
        }
        flags = []
        for name, value in options.items():
            if value is True:
                flags.append(f"--{name}")
            elif value is not None:
                flags += [f"--{name}", str(value)]
        return flags

    return build


@pytest.fixture
def still_bert(tiny_bert, tmp_path):
    """Folder of the tiny encoder without dropout."""
    folder = copy_tree(tiny_bert, tmp_path / "without-dropout")
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(arguments):
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_a_stock_model(arguments, tmp_path, method, sentences):
    result = run(arguments(method=method))
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    summary = json.loads((out / "training_summary.json").read_text())
    assert summary["steps"] == 6
    assert [point["step"] for point in summary["sts_dev_curve"]] == [3, 6]
    assert summary["sts_dev_best"]["spearman"] == max(point["spearman"] for point in summary["sts_dev_curve"])
    assert summary["versions"]["sentence-transformers"].startswith("6.")
    assert set(summary["data_sha256"]) == {"text", "features", "sts-dev", "sts-test"}
    assert summary["precision"] == {"training": "float32", "sts_dev_curve": "float32", "scores_of_best": "float32"}
    for number in (summary["sts_dev_before"], summary["sts_test_of_best"]):
        assert f"{100 * number:.2f}" in result.output
    best, last = (SentenceTransformer(str(path), device="cpu") for path in (out, out / "last"))
    assert best.encode(sentences[:2]).shape == last.encode(sentences[:2]).shape == (2, 32)
    assert (out / "heads" / "heads.safetensors").is_file()
    assert (out / "last" / "heads" / "heads.safetensors").is_file()
    assert not list((out / "last").glob("optimizer*"))
    assert METHODS[method].loss.__name__ in (out / "README.md").read_text()


def test_the_model_gives_the_same_vectors_without_this_package(arguments, tmp_path, sentences):
    assert run(arguments()).exit_code == 0
    here = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(sentences[:5])
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "st_kdmcse":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np
from sentence_transformers import SentenceTransformer
np.save("vectors.npy", SentenceTransformer("out", device="cpu").encode({sentences[:5]!r}))
assert "st_kdmcse" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy"), here)


def test_recipes_and_options_reach_the_loss(arguments, tmp_path):
    flags = arguments(**{"recipe": "released", "margin": 0.2, "image-threshold": "none", "text-threshold": "auto"})
    result = run([*flags, "--filter-negatives", "--text-soft-label", "image-image"])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "training_summary.json").read_text())["config"]
    assert config["margin"] == 0.2
    assert config["text_margin"] == 0.15
    assert config["image_threshold"] is None
    assert isinstance(config["text_threshold"], float)
    assert config["filter_negatives"] is True
    assert config["text_soft_label"] == "image-image"


def test_the_learning_rate_of_the_heads_is_recorded(arguments, tmp_path):
    flags = {
        "method": "simcse",
        "pooling": "mean",
        "head-lr": 1e-2,
        "captions-per-image-in-batch": 2,
        "eval-steps": 0,
        "max-steps": 2,
    }
    assert run(arguments(**flags)).exit_code == 0
    summary = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    assert (summary["learning_rate"], summary["head_learning_rate"]) == (3e-5, 1e-2)
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())["options"]
    assert (recorded["head_learning_rate"], recorded["captions_per_image_in_batch"]) == (1e-2, 2)
    assert SentenceTransformer(str(tmp_path / "out"), device="cpu")[1].pooling_mode == "mean"


def test_images_can_be_left_out(data, tiny_bert, tmp_path, monkeypatch):
    (tmp_path / "list.csv").write_text("image\n3.jpg\n17.jpg\n")
    options = TrainingOptions(
        model=str(tiny_bert),
        features=data / "features",
        exclude_images=tmp_path / "list.csv",
        output_dir=tmp_path / "out",
        max_steps=12,
        batch_size=8,
        eval_steps=0,
    )
    rows = []
    read = KDMCSELoss.teacher_batch
    monkeypatch.setattr(
        KDMCSELoss, "teacher_batch", lambda loss, labels, device: rows.extend(labels) or read(loss, labels, device)
    )
    summary = train(options)
    store = FeatureStore.open(data / "features")
    assert {store.image_id(int(row)) for row in rows} == {f"{image}.jpg" for image in range(24)} - {"3.jpg", "17.jpg"}
    assert summary["excluded"] == {"images": 2, "captions": 6}
    assert summary["data_sha256"]["excluded images"] == sha256_file(tmp_path / "list.csv")
    assert changes_since_start(options) == []
    assert changes_since_start(replace(options, exclude_images=None)) == ["the excluded images data have changed"]
    (tmp_path / "list.csv").write_text("3.jpg\n")
    assert changes_since_start(options) == ["the excluded images data have changed"]


def test_images_that_are_evaluated_on_can_be_left_out(data, tiny_bert, tmp_path, caplog):
    copy_tree(data / "STS", tmp_path / "senteval" / "STS")
    store = FeatureStore.open(data / "features")
    dev = tmp_path / "senteval" / "STS" / "STSBenchmark" / "sts-dev.csv"
    one, two = store.caption(9), store.caption(10)
    dev.write_text(dev.read_text() + f"main\tfile\t2012\t0\t2.5\t{one.upper()} .\t{two}\n")
    (tmp_path / "list.csv").write_text("3.jpg\n5.jpg\n")
    (tmp_path / "text.txt").write_text(f"{one}\n{store.caption(0)}\n{two}.\n")
    options = TrainingOptions(
        model=str(tiny_bert),
        text=tmp_path / "text.txt",
        features=data / "features",
        exclude_images=tmp_path / "list.csv",
        exclude_overlap=tmp_path / "senteval",
        output_dir=tmp_path / "out",
        max_steps=2,
        batch_size=8,
        eval_steps=0,
    )
    summary = train(options)
    assert summary["overlap"] == {"images": 1, "captions": 2, "text": 2}
    assert summary["excluded"] == {"images": 2, "captions": 6}
    assert "2 sentences of `text` stand in the evaluation sets" in caplog.text
    assert changes_since_start(options) == []
    without = replace(options, exclude_overlap=None)
    assert changes_since_start(without) == ["the evaluation sets data have changed"]
    dev.write_text(dev.read_text().replace("2.5", "3.5"))
    assert changes_since_start(options) == ["the evaluation sets data have changed"]


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_a_compiled_student_learns_the_same(arguments, still_bert, tmp_path):
    losses = []
    for number, changes in enumerate(({"compile": "reduce-overhead"}, {"no-unpad": True}, {})):
        output = tmp_path / f"out-{number}"
        result = run(arguments(**{"model": still_bert, "output-dir": output, "max-steps": 30, **changes}))
        assert result.exit_code == 0, result.output
        losses.append([entry["loss"] for entry in json.loads((output / "training_summary.json").read_text())["losses"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("method", ["kdmcse", "mcse", "simcse"])
def test_gradient_caching_trains_the_same_model(arguments, still_bert, tmp_path, method, sentences):
    for name, size in (("plain", 0), ("cached", 3)):
        flags = {"model": still_bert, "method": method, "output-dir": tmp_path / name, "mini-batch-size": size}
        # Adam makes steps of this size even where a gradient is rounding noise.
        result = run(arguments(**flags, lr=1e-5))
        assert result.exit_code == 0, result.output
    plain, cached = (
        json.loads((tmp_path / name / "training_summary.json").read_text()) for name in ("plain", "cached")
    )
    assert cached["config"]["mini_batch_size"] == 3
    assert "mini_batch_size" not in plain["config"]
    before = build_student(str(still_bert)).to("cpu").encode(sentences)
    models = [SentenceTransformer(str(tmp_path / name / "last"), device="cpu") for name in ("plain", "cached")]
    after, after_cached = (model.encode(sentences) for model in models)
    assert abs(after - before).max() > 1e-4
    np.testing.assert_allclose(after_cached, after, rtol=0, atol=1e-5)


def test_threshold_sets_both_branches_apart_from_the_one_that_is_given(arguments, tmp_path):
    flags = arguments(threshold=0.4, **{"max-steps": 2, "eval-steps": 0, "image-threshold": "none"})
    assert run(flags).exit_code == 0
    one = json.loads((tmp_path / "out" / "training_summary.json").read_text())["config"]
    assert (one["image_threshold"], one["text_threshold"]) == (None, 0.4)
    flags = arguments(threshold="auto", **{"max-steps": 2, "eval-steps": 0, "output-dir": tmp_path / "auto"})
    assert run(flags).exit_code == 0
    auto = json.loads((tmp_path / "auto" / "training_summary.json").read_text())["config"]
    store = FeatureStore.open(flags[flags.index("--features") + 1])
    assert auto["image_threshold"] == true_pair_score(store, "text-image")
    assert auto["text_threshold"] == true_pair_score(store, "text-text")


@pytest.mark.parametrize(("encoder", "expected"), [("tiny_bert", (64, 3e-5)), ("tiny_roberta", (128, 1e-5))])
def test_defaults_follow_the_encoder(request, tmp_path, data, encoder, expected):
    model = request.getfixturevalue(encoder)
    options = TrainingOptions(
        model=str(model), text=data / "text.txt", method="simcse", eval_steps=0, max_steps=1, output_dir=tmp_path / "o"
    )
    summary = train(options)
    assert (summary["batch_size"], summary["learning_rate"]) == expected
    assert summary["sts_dev_best"] is None


def test_a_table_of_sentences_and_fewer_of_them_than_a_batch(arguments, tmp_path, caplog):
    table = tmp_path / "nli_for_simcse.csv"
    table.write_text("sent0,sent1,hard_neg\n" + "a dog,an animal,a cat\na man,a person,a car\n" * 2)
    alone = {"text": table, "features": None, "method": "simcse", "max-steps": 1}
    assert "which column holds the sentences is not clear; name one as --text-column" in run(arguments(**alone)).output
    assert run(arguments(**alone, **{"text-column": "sent0"})).exit_code == 0
    assert "`text` has 4 sentences to train on, fewer than the 8 of a batch" in caplog.text


def test_simcse_trains_on_captions_too_and_text_alone_is_enough(arguments, tmp_path):
    assert run(arguments(method="simcse", **{"output-dir": tmp_path / "both"})).exit_code == 0
    assert run(arguments(method="simcse", features=None, **{"output-dir": tmp_path / "text"})).exit_code == 0
    assert run(arguments(text=None, **{"output-dir": tmp_path / "pairs"})).exit_code == 0
    states = [load_file(tmp_path / name / "last" / "model.safetensors") for name in ("both", "text", "pairs")]
    key = "embeddings.word_embeddings.weight"
    assert not torch.equal(states[0][key], states[1][key])


def test_text_may_be_compressed_and_repeat_itself(arguments, tmp_path, sentences):
    with gzip.open(tmp_path / "text.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(sentences[:40] * 5))
    flags = arguments(text=tmp_path / "text.gz", deduplicate=True, features=None, method="simcse", epochs=1)
    flags = [flag for flag in flags if flag not in ("--max-steps", "6")]
    result = run(flags)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "training_summary.json").read_text())["steps"] == 40 // 8


def test_the_authors_json_is_imported(arguments, tmp_path, store):
    features = {}
    for row in range(24):
        entry = features.setdefault(store.image_id(row), {"image_feat": None, "captions": [], "lang_feat": []})
        batch = store.gather([row])
        entry["image_feat"] = batch.image_features[0].tolist()
        entry["captions"].append(store.caption(row))
        entry["lang_feat"].append(batch.text_features[0].tolist())
    (tmp_path / "features.json").write_text(json.dumps(features))
    result = run(arguments(features=tmp_path / "features.json"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "features" / "manifest.json").is_file()


def test_a_failed_start_does_not_cost_the_conversion(arguments, tmp_path, shared_data):
    features = shared_data / "flickr8k_features" / "released_format_60.json"
    result = run(arguments(features=features, model="bert-bse"))
    assert "--model bert-bse" in result.output
    assert not (tmp_path / "out").exists()


def test_a_run_may_be_moved_and_resumed(arguments, tmp_path):
    whole = run(arguments(**{"output-dir": tmp_path / "whole", "max-steps": 9}))
    assert whole.exit_code == 0, whole.output
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    for name in ("training_summary.json", "checkpoints/checkpoint-9/trainer_state.json"):
        (tmp_path / "moved" / name).unlink()
    shutil.rmtree(tmp_path / "whole")
    result = run(arguments(**{"output-dir": tmp_path / "moved", "max-steps": 9}, resume=True))
    assert result.exit_code == 0, result.output
    assert [line for line in whole.output.splitlines() if "STS-B" in line] == [
        line for line in result.output.splitlines() if "STS-B" in line
    ]


def test_without_evaluation_there_is_one_model(arguments, tmp_path):
    result = run(arguments(**{"eval-steps": 0}))
    assert result.exit_code == 0, result.output
    assert "there was no evaluation" in result.output
    assert not (tmp_path / "out" / "last").exists()


def damage(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(bytes(content))


def one_score(path):
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    path.write_text("".join("\t".join([*row[:4], "3", *row[5:]]) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("prepare", "changes", "message"),
    [
        (None, {"text": "nowhere.txt"}, "--text nowhere.txt does not exist"),
        (None, {"features": "nowhere"}, "--features nowhere does not exist"),
        (None, {"features": None}, "give --features"),
        (None, {"features": None, "text": None, "method": "simcse"}, "nothing to train on"),
        (None, {"eval-data": "nowhere"}, "nowhere"),
        (None, {"model": "bert-bse"}, "--model bert-bse is neither"),
        (None, {"margin": -1}, "--margin must be in"),
        (None, {"method": "simcse", "margin": 0.1}, "method simcse has no option --margin"),
        (None, {"method": "kdmcse-without-adapacse", "margin": 0.1}, "has no option --margin"),
        (None, {"max-steps": 0}, "--max-steps must be positive"),
        (None, {"exclude-overlap": "nowhere"}, "--exclude-overlap nowhere does not exist"),
        (None, {"exclude-images": "nowhere.csv"}, "--exclude-images nowhere.csv does not exist"),
        (None, {"exclude-images": "x", "features": None, "method": "simcse"}, "--exclude-images leaves images of"),
        (
            lambda d: (d / "list.txt").write_text("3.jpg\n99.jpg\n"),
            {"exclude-images": "list.txt"},
            "list.txt, line 2: the feature store",
        ),
        (None, {"head-lr": 0}, "--head-lr must be positive"),
        (None, {"captions-per-image-in-batch": 0}, "--captions-per-image-in-batch must be positive"),
        (None, {"pair-every": 1}, "--pair-every must be at least 2"),
        (None, {"mini-batch-size": -1}, "--mini-batch-size must not be negative"),
        (None, {"compile": "default", "unpad": True}, "--unpad and compilation exclude each other"),
        (None, {"compile": "reduce-overhead", "mini-batch-size": 4}, "overwrites gradients"),
        (lambda d: (d / "text.txt").write_bytes(b""), {}, "text.txt"),
        (lambda d: (d / "text.txt").write_bytes(b"A dog.\n"), {}, "--text has one sentence to train on"),
        (lambda d: (d / "text.txt").write_bytes(b"fine\ncaf\xe9\n"), {}, "text.txt, line 2"),
        (lambda d: damage(d / "features" / "text_features.npy", lambda c: c.__delitem__(slice(-8, None))), {}, "whole"),
        (lambda d: damage(d / "features" / "text_features.npy", lambda c: c.__setitem__(-3, c[-3] ^ 1)), {}, "SHA-256"),
        (lambda d: (d / "STS" / "STSBenchmark" / "sts-dev.csv").write_text("a\tb\n"), {}, "sts-dev.csv"),
        (lambda d: one_score(d / "STS" / "STSBenchmark" / "sts-test.csv"), {}, "sts-test.csv, line 1 and all others"),
    ],
)
def test_bad_input_is_refused_before_any_model_is_loaded(
    arguments, data, tmp_path, monkeypatch, prepare, changes, message
):
    if prepare:
        copy = copy_tree(data, tmp_path / "data")
        prepare(copy)
        changes = {"text": copy / "text.txt", "features": copy / "features", "eval-data": copy, **changes}
        if "exclude-images" in changes:
            changes["exclude-images"] = copy / changes["exclude-images"]
    loaded = []
    monkeypatch.setattr("st_kdmcse.training.run.build_student", lambda *_: loaded.append(1))
    result = run(arguments(**changes))
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ")
    assert message in result.output
    assert not loaded
    assert not (tmp_path / "out").exists()


def test_an_output_directory_with_something_in_it_is_left_alone(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for resume in ({}, {"resume": True}):
        result = run(arguments(**resume))
        assert result.exit_code == 2
        assert "thesis" not in result.output
        assert "out" in result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_finished_run_is_neither_overwritten_nor_resumed(arguments):
    assert run(arguments()).exit_code == 0
    assert "is not empty: add --resume" in run(arguments()).output
    assert "is finished" in run(arguments(resume=True)).output


def test_a_run_is_not_resumed_with_other_options_or_data(arguments, data, tmp_path):
    assert run(arguments(**{"max-steps": 6})).exit_code == 0
    (tmp_path / "out" / "training_summary.json").unlink()
    result = run(arguments(resume=True, seed=7))
    assert result.exit_code == 2
    assert "seed was 42, is 7" in result.output
    (tmp_path / "other.txt").write_text((data / "text.txt").read_text() + "One more sentence .\n")
    result = run(arguments(resume=True, text=tmp_path / "other.txt"))
    assert result.exit_code == 2
    assert "the text data have changed" in result.output


def test_other_data_are_noticed(data, tiny_bert, tmp_path):
    copy = copy_tree(data, tmp_path / "data")
    options = TrainingOptions(
        model=str(tiny_bert),
        text=copy / "text.txt",
        method="simcse",
        eval_data=str(copy),
        output_dir=tmp_path / "out",
        max_steps=2,
        batch_size=8,
        eval_steps=2,
        bf16=False,
    )
    train(options)
    assert changes_since_start(options) == []
    test = copy / "STS/STSBenchmark/sts-test.csv"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[1:]))
    assert changes_since_start(options) == ["the sts-test data have changed"]
    (tmp_path / "out/training_summary.json").unlink()
    with pytest.raises(ValueError, match="other options or data: the sts-test data have changed"):
        train(replace(options, resume=True))
    # Features where there were none are a change too.
    with_features = changes_since_start(replace(options, features=copy / "features"))
    assert with_features == ["the features data have changed", "the sts-test data have changed"]


def test_a_student_that_cannot_be_scored_is_refused_and_the_folder_stays_free(arguments, tiny_bert, tmp_path):
    folder = copy_tree(tiny_bert, tmp_path / "collapsed")
    state = load_file(folder / "model.safetensors")
    save_file({name: value * 0 for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"})
    result = run(arguments(model=folder))
    assert result.exit_code == 2, result.output
    assert "the score on sts-dev is not a number: --model gives all pairs" in result.output
    assert run(arguments(method="simcse", **{"max-steps": 3})).exit_code == 0


def test_a_file_that_was_being_written_at_a_kill_is_no_obstacle(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.run.json.0f.tmp").write_text("{")
    assert run(arguments(method="simcse", **{"max-steps": 3})).exit_code == 0
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_a_run_that_was_killed_while_finishing_is_finished_by_resuming(arguments, tmp_path):
    assert run(arguments()).exit_code == 0
    summary = tmp_path / "out" / "training_summary.json"
    before = json.loads(summary.read_text())
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    summary.unlink()
    (tmp_path / "out" / "model.safetensors").unlink()
    result = run(arguments(resume=True))
    assert result.exit_code == 0, result.output
    after = json.loads(summary.read_text())
    for name in ("steps", "sts_dev_curve", "sts_dev_best", "sts_test_of_best", "losses"):
        assert after[name] == before[name]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_the_best_model_is_kept_between_checkpoints_and_found_by_resuming(arguments, data, tmp_path):
    """A run that loses steps after its checkpoint ends as one that does not, with the best model of its curve."""
    flags = {"max-steps": 12, "eval-steps": 1, "save-steps": 5, "lr": "0.003"}
    assert run(arguments(**flags)).exit_code == 0
    out, again = tmp_path / "out", tmp_path / "again"
    summary = json.loads((out / "training_summary.json").read_text())
    dev = sts_evaluator(load_sts_benchmark(str(data), "dev"), "sts-dev")
    best = summary["sts_dev_best"]
    assert spearman(dev, SentenceTransformer(str(out), device="cpu")) == pytest.approx(best["spearman"], abs=1e-9)
    assert summary["sts_dev_of_best"] == pytest.approx(best["spearman"], abs=1e-9)
    assert [path.name for path in (out / "checkpoints").glob("best-*")] == [f"best-{best['step']}"]
    assert sorted(path.name for path in (out / "checkpoints").glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-12",
    ]

    shutil.copytree(out, again)
    for lost in ("training_summary.json", "checkpoints/checkpoint-12", "model.safetensors", "last"):
        shutil.rmtree(again / lost, ignore_errors=True) if (again / lost).is_dir() else (again / lost).unlink()
    (again / "checkpoints" / "best-11").mkdir()  # of a step that the checkpoint does not know
    (again / "checkpoints" / "best-11.0f.tmp").mkdir()
    result = run(arguments(**flags, resume=True, **{"output-dir": again}))
    assert result.exit_code == 0, result.output
    after = json.loads((again / "training_summary.json").read_text())
    assert (after["sts_dev_best"], after["sts_dev_curve"]) == (best, summary["sts_dev_curve"])
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def signalled(end, act, arguments):
    """The script in a process of its own, which gets a signal when it writes a path with this end."""
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("signalled_worker.py")), end, act, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


def test_ctrl_c_and_kill_cost_nothing(arguments, tmp_path):
    flags = {"max-steps": 24, "eval-steps": 4, "save-steps": 4, "lr": "0.001"}
    whole, out = tmp_path / "whole", tmp_path / "out"
    result = signalled("nowhere", "kill", arguments(**flags, **{"output-dir": whole}))
    assert result.returncode == 0, result.stdout[-3000:]

    stopped = signalled("checkpoint-8/trainer_state.json", "interrupt", arguments(**flags))
    assert stopped.returncode == 130, stopped.stdout[-3000:]
    assert "with --resume to go on" in stopped.stdout
    assert not (out / "training_summary.json").exists()
    assert latest_checkpoint(out / "checkpoints").name == "checkpoint-9"  # the signal ends the step after it

    for last_written in ("trainer_state.json", "checksums.json"):
        killed = signalled(f"checkpoint-16/{last_written}", "kill", arguments(**flags, resume=True))
        assert killed.returncode == -signal.SIGKILL, killed.stdout[-3000:]
        assert (out / "checkpoints/checkpoint-16/model.safetensors").is_file()
        assert latest_checkpoint(out / "checkpoints").name == "checkpoint-12"

    resumed = signalled("nowhere", "kill", arguments(**flags, resume=True))
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    for name in ("model.safetensors", "heads/heads.safetensors"):
        for model in ("", "last"):
            expected, actual = (load_file(run / model / name) for run in (whole, out))
            assert all(torch.equal(value, actual[key]) for key, value in expected.items()), (model, name)
    curves = [json.loads((run / "training_summary.json").read_text())["sts_dev_curve"] for run in (whole, out)]
    assert curves[0] == curves[1]


def test_the_script_runs_on_two_processes(arguments, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    flags = arguments(**{"max-steps": 4, "eval-steps": 2, "gather-across-devices": True})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, str(ROOT / "training" / "train_flickr.py"), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-9000:]
    summary = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    assert (summary["processes"], summary["steps"]) == (2, 4)
    assert result.stdout.count("STS-B test of the best") == 1
    SentenceTransformer(str(tmp_path / "out"), device="cpu")


@pytest.fixture
def extraction(photo_set, tiny_open_clip):
    return {
        "features": None,
        "captions": photo_set / "captions.txt",
        "images": photo_set / "Images",
        "teacher": tiny_open_clip,
        "teacher-batch-size": 8,
    }


def test_features_are_extracted_first(arguments, tmp_path, extraction):
    result = run(arguments(**extraction))
    assert result.exit_code == 0, result.output
    store = FeatureStore.open(tmp_path / "out" / "features", verify=True)
    summary = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    assert (store.num_images, len(store)) == (45, 90)
    assert summary["data_sha256"]["features"] == store.checksum
    assert summary["teacher"] == store.teacher
    # Elsewhere they serve other runs; there they are not made again.
    elsewhere = {**extraction, "features": tmp_path / "features", "max-steps": 2, "eval-steps": 2}
    for number in (1, 2):
        result = run(arguments(**elsewhere, **{"output-dir": tmp_path / f"run{number}"}))
        assert result.exit_code == 0, result.output
    assert not (tmp_path / "run2" / "features").exists()


def test_an_interrupted_extraction_goes_on(arguments, tmp_path, photo_set, tiny_open_clip, extraction):
    options = ExtractionOptions(
        str(photo_set / "captions.txt"), photo_set / "Images", teacher=str(tiny_open_clip), batch_size=8, workers=0
    )
    extract_dataset(options, tmp_path / "out" / "features", shard=(0, 2))
    assert (tmp_path / "out" / "features.parts").is_dir()
    result = run(arguments(**extraction))
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out" / "features.parts").exists()


def test_a_store_of_other_captions_is_not_trained_on(arguments, tmp_path, extraction, photo_set):
    assert run(arguments(**extraction, **{"eval-steps": 0})).exit_code == 0
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    other = {**extraction, "features": tmp_path / "out" / "features", "output-dir": tmp_path / "other", "limit": 9}
    result = run(arguments(**other))
    assert result.exit_code == 2
    assert "limit None instead of 9" in result.output


def test_extraction_options_without_captions_are_refused(arguments, tmp_path):
    result = run(arguments(images=tmp_path, teacher="ViT-B-32"))
    assert result.exit_code == 2
    assert "--images, --teacher: give --captions too" in result.output


@pytest.mark.parametrize(("script", "weight", "limit"), [("coco", 0.05, None), ("cc12m", 0.01, 1_000_000)])
def test_other_data_sets_are_other_defaults(arguments, tmp_path, extraction, script, weight, limit):
    command = importlib.import_module(f"train_{script}").main
    result = CliRunner().invoke(command, arguments(**extraction))
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    assert summary["config"]["multimodal_weight"] == weight
    assert summary["options"]["extraction"]["limit"] == limit
    flags = arguments(**{"output-dir": tmp_path / "own", "multimodal-weight": 0.2})
    assert CliRunner().invoke(command, flags).exit_code == 0
    assert json.loads((tmp_path / "own" / "training_summary.json").read_text())["config"]["multimodal_weight"] == 0.2
    flags = arguments(**{"output-dir": tmp_path / "text", "method": "simcse"})
    assert CliRunner().invoke(command, flags).exit_code == 0


def test_help_lists_every_option_with_both_recipes():
    result = run(["--help"])
    for flag in (
        "--text",
        "--features",
        "--recipe",
        "--margin",
        "--image-threshold",
        "--no-filter-negatives",
        "--demo",
    ):
        assert flag in result.output
    assert "released: 0.15" in result.output.replace("\n", " ").replace("  ", " ")


def test_the_current_folder_is_trained_in_as_any_other(arguments, tmp_path, monkeypatch, extraction):
    for name, changes in (("plain", {}), ("extracted", extraction)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        result = run(arguments(**changes, **{"output-dir": ".", "max-steps": 3}))
        assert result.exit_code == 0, result.output
        assert (tmp_path / name / "last" / "model.safetensors").is_file()
