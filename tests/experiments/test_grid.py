"""Grids of small, real training runs."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from file_events import at_path, interrupt
from helpers import copy_tree, load_command
from safetensors.torch import load_file
from small_runs import flags, options, write_data

from st_kdmcse import FeatureStore
from st_kdmcse.experiments.grid import margin_grid, method_grid, run_grid, shared_features
from st_kdmcse.training.run import train


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences, store):
    return write_data(tmp_path_factory.mktemp("grid-data"), sentences, store)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, tiny_bert):
    """A finished grid of two methods; not to be changed."""
    root = tmp_path_factory.mktemp("grid") / "root"
    runs = method_grid(root, ["simcse", "mcse"], [0, 1], {"temperature": 0.1}, **options(data, tiny_bert))
    assert run_grid(runs).failed == {}
    return root


def test_a_method_gets_the_options_that_it_reads(data, tiny_bert):
    runs = method_grid(Path("root"), ["simcse", "kdmcse"], [0, 3], {"margin": 0.2}, **options(data, tiny_bert))
    assert [(run.method, run.seed, dict(run.config)) for run in runs] == [
        ("simcse", 0, {}),
        ("simcse", 3, {}),
        ("kdmcse", 0, {"margin": 0.2}),
        ("kdmcse", 3, {"margin": 0.2}),
    ]
    assert runs[1].output_dir == Path("root/simcse/seed-3")
    assert all(run.features == data / "features" for run in runs)


def test_margins(data, tiny_bert):
    runs = margin_grid(Path("root"), [0.025, 0.1], [0], {"temperature": 0.1}, **options(data, tiny_bert))
    assert [dict(run.config) for run in runs] == [{"temperature": 0.1, "margin": margin} for margin in (0.025, 0.1)]
    assert runs[0].output_dir == Path("root/margin-0.025/seed-0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["kdmsce"], [0], {}), "no method 'kdmsce'"),
        ((["simcse"], [0], {"margin": 0.1}), "none of the methods simcse has the option margin"),
        ((["simcse", "simcse"], [0], {}), "named twice"),
        ((["simcse"], [], {}), "no run in the grid"),
    ],
)
def test_a_grid_that_makes_no_sense(data, tiny_bert, arguments, message):
    with pytest.raises(ValueError, match=message):
        method_grid(Path("root"), *arguments, **options(data, tiny_bert))


def test_finished_runs_are_where_they_belong_without_checkpoints(finished):
    for folder in (finished / "mcse/seed-0", finished / "simcse/seed-1"):
        assert (folder / "training_summary.json").is_file()
        assert (folder / "last/model.safetensors").is_file()
        assert not (folder / "checkpoints").exists()
    assert json.loads((finished / "mcse/seed-0/run.json").read_text())["options"]["config"] == {"temperature": 0.1}


def test_a_run_of_a_grid_is_the_run_alone(finished, data, tiny_bert, tmp_path):
    (alone,) = method_grid(tmp_path, ["mcse"], [1], {"temperature": 0.1}, **options(data, tiny_bert))
    train(alone)
    assert (alone.output_dir / "model.safetensors").read_bytes() == (
        finished / "mcse/seed-1/model.safetensors"
    ).read_bytes()


def test_a_finished_grid_is_not_repeated(finished, data, tiny_bert, caplog):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    runs = method_grid(finished, ["simcse", "mcse"], [0, 1], {"temperature": 0.1}, **options(data, tiny_bert))
    with caplog.at_level(logging.INFO, "st_kdmcse"):
        assert run_grid(runs).finished == [run.output_dir for run in runs]
    assert "all 4 runs were finished before" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_other_options_or_data_are_refused_before_anything_is_trained(finished, data, tiny_bert, tmp_path):
    changed = method_grid(finished, ["mcse"], [7, 0], **options(data, tiny_bert, max_steps=6))
    with pytest.raises(
        ValueError, match=r"mcse/seed-0 was started with other options or data: .*config was .*max_steps was 4, is 6"
    ):
        run_grid(changed)
    assert not (finished / "mcse/seed-7").exists()
    (tmp_path / "text.txt").write_text("a dog runs\na man sits\n" * 20)
    other = options(data, tiny_bert, text=tmp_path / "text.txt")
    with pytest.raises(ValueError, match="the text data have changed"):
        run_grid(method_grid(finished, ["mcse"], [0], {"temperature": 0.1}, **other))


def test_missing_text_stops_the_grid(data, tiny_bert, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`text` .*absent\.txt does not exist"):
        run_grid(method_grid(tmp_path, ["mcse"], [0], **options(data, tiny_bert, text=tmp_path / "absent.txt")))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_diverges_does_not_lose_the_others(data, tiny_bert, tmp_path, caplog):
    bad = method_grid(tmp_path, ["simcse"], [0], **options(data, tiny_bert, lr=1e30))
    good = method_grid(tmp_path, ["mcse"], [0], **options(data, tiny_bert, max_steps=2))
    with caplog.at_level(logging.INFO, "st_kdmcse"):
        result = run_grid([*bad, *good])
    assert result.finished == [tmp_path / "mcse/seed-0"]
    assert "training diverged" in result.failed[tmp_path / "simcse/seed-0"]
    assert "run 1 of 2: train" in caplog.text
    record = json.loads((tmp_path / "simcse/seed-0.failed.json").read_text())
    assert "training diverged" in record["error"]
    assert not (tmp_path / "simcse/seed-0/training_summary.json").exists()
    shutil.rmtree(tmp_path / "simcse/seed-0")
    assert run_grid(method_grid(tmp_path, ["simcse"], [0], **options(data, tiny_bert, max_steps=2))).failed == {}
    assert not (tmp_path / "simcse/seed-0.failed.json").exists()


def test_runs_side_by_side(finished, data, tiny_bert, tmp_path):
    bad = method_grid(tmp_path, ["simcse"], [7], **options(data, tiny_bert, lr=1e30))
    good = method_grid(tmp_path, ["simcse", "mcse"], [0, 1], {"temperature": 0.1}, **options(data, tiny_bert))
    result = run_grid([*bad, *good], jobs=2)
    assert result.finished == [run.output_dir for run in good]
    assert "training diverged" in result.failed[tmp_path / "simcse/seed-7"]
    assert not (tmp_path / "mcse/seed-1/checkpoints").exists()
    for name in ("simcse/seed-0", "mcse/seed-1"):
        alone, beside = (load_file(root / name / "last/model.safetensors") for root in (finished, tmp_path))
        for key, value in alone.items():
            torch.testing.assert_close(beside[key], value, rtol=1e-4, atol=1e-6)


def test_checkpoints_are_kept_on_demand(data, tiny_bert, tmp_path):
    (run,) = method_grid(tmp_path, ["simcse"], [0], **options(data, tiny_bert, max_steps=2))
    run_grid([run], keep_checkpoints=True)
    assert (run.output_dir / "checkpoints/checkpoint-2/optimizer.pt").is_file()


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (None, {"model": "bert-bse"}, "`model` bert-bse is neither"),
        (lambda folder: (folder / "model.safetensors").unlink(), {}, r"`model` .*copy cannot be loaded: "),
        (None, {"max_seq_length": 65}, "from 2 to the 64 positions"),
        (None, {"eval_data": "/nowhere"}, "there is no folder /nowhere"),
        (None, {"text_column": "title"}, "title"),
    ],
)
def test_what_would_stop_every_run_stops_the_grid(data, tiny_bert, tmp_path, damage, changes, message):
    model = copy_tree(tiny_bert, tmp_path / "copy")
    if damage:
        damage(model)
    with pytest.raises((ValueError, OSError), match=message):
        run_grid(method_grid(tmp_path / "root", ["simcse"], [0, 1], **{**options(data, model), **changes}))
    assert not (tmp_path / "root").exists()


def test_features_of_a_store_are_used_where_they_are(tmp_path, data):
    assert shared_features(tmp_path, data / "features") == data / "features"
    assert shared_features(tmp_path, None) is None
    with pytest.raises(FileNotFoundError, match="does not exist"):
        shared_features(tmp_path, tmp_path / "absent.json")


def test_released_features_are_converted_once(tmp_path):
    def write(name, value):
        image = {"image_feat": [value, 0.5], "captions": ["a dog", "two dogs"], "lang_feat": [[1.0, 0.0], [0.0, 1.0]]}
        (tmp_path / name).write_text(json.dumps({"1.jpg": image}))
        return tmp_path / name

    first, root = write("first.json", 0.25), tmp_path / "root"
    made = shared_features(root, first)
    assert made == root / "features"
    assert FeatureStore.open(made).gather([0]).image_features.tolist() == [[0.25, 0.5]]
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert shared_features(root, first.rename(tmp_path / "moved.json")) == made
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    with pytest.raises(ValueError, match=r"second\.json .* is not the file that .*features was .* first\.json"):
        shared_features(root, write("second.json", 0.75))
    shutil.rmtree(made)
    shared_features(root, tmp_path / "second.json")
    assert FeatureStore.open(made).gather([0]).image_features.tolist() == [[0.75, 0.5]]
    (root / "features-source.json").unlink()
    with pytest.raises(ValueError, match=r"features-source\.json is missing or damaged"):
        shared_features(root, tmp_path / "second.json")


@pytest.mark.parametrize("script", ["ablation", "margin_sweep"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": "nowhere/at/all"}, "there is no folder nowhere/at/all"),
        ({"output": Path(__file__)}, "is a file: name a folder"),
        ({"bootstrap_seed": -1}, "--bootstrap-seed"),
    ],
)
def test_what_spoils_the_report_is_found_before_training(data, tiny_bert, tmp_path, script, changes, message):
    arguments = [str(tmp_path / "root"), *flags(data, tiny_bert, **changes)]
    result = CliRunner().invoke(load_command(f"evaluation/{script}.py"), arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "root").exists()


def test_ctrl_c_and_the_same_command_again(data, tiny_bert, tmp_path):
    root, command = tmp_path / "root", load_command("evaluation/ablation.py")
    arguments = [
        str(root),
        *flags(data, tiny_bert, max_steps=60, eval_steps=20, save_steps=20, methods="simcse", seeds="2"),
    ]
    run = root / "simcse/seed-0"
    at_path(str(run / "checkpoints/checkpoint-20/trainer_state.json"), interrupt)
    first = CliRunner().invoke(command, arguments)
    assert first.exit_code == 130, first.output
    assert f"stopped in {run}; the same command goes on from there" in first.output
    assert not (run / "training_summary.json").exists()
    second = CliRunner().invoke(command, arguments)
    assert second.exit_code == 0, second.output
    assert json.loads((run / "training_summary.json").read_text())["resumed"]
    assert "| simcse | 2 |" in second.output
    assert (root / "report/report.html").is_file()


def test_ctrl_c_at_the_last_step_stops_the_grid(data, tiny_bert, tmp_path):
    runs = method_grid(tmp_path, ["simcse"], [0, 1], **options(data, tiny_bert))
    at_path(str(tmp_path / "simcse/seed-0/checkpoints/checkpoint-4/trainer_state.json"), interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_grid(runs)
    assert not (tmp_path / "simcse/seed-1").exists()


def test_ablation_reports_and_fails_if_a_run_failed(data, tiny_bert, tmp_path):
    root = tmp_path / "root"
    (root / "mcse/seed-0").mkdir(parents=True)
    (root / "mcse/seed-0/in the way").touch()
    arguments = [str(root), *flags(data, tiny_bert, max_steps=2, methods="mcse,simcse", seeds="0,", threshold=0.5)]
    result = CliRunner().invoke(load_command("evaluation/ablation.py"), arguments)
    assert result.exit_code == 2
    assert "none of the methods mcse, simcse has the option image_threshold, text_threshold" in result.output
    result = CliRunner().invoke(load_command("evaluation/ablation.py"), arguments[:-2])
    assert result.exit_code == 1, result.output
    assert "1 of 2 runs failed" in result.output
    assert "| simcse | 1 |" in result.output
    assert "is not empty" in (root / "report/report.md").read_text()


def test_margin_sweep_marks_the_best(data, tiny_bert, tmp_path):
    arguments = [str(tmp_path / "root"), *flags(data, tiny_bert, max_steps=2, margins="0.05,0.125", seeds="1")]
    result = CliRunner().invoke(load_command("evaluation/margin_sweep.py"), [*arguments, "--data-dir", str(data)])
    assert result.exit_code == 0, result.output
    assert "| kdmcse (margin 0.05) | 1 |" in result.output
    report = (tmp_path / "root/report/report.md").read_text()
    assert "The margin with the highest mean on STS-B dev is **0." in report
    assert (tmp_path / "root/report/plots/margin.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": "none"}, "'none' is neither a number of seeds"),
        ({"seeds": "0"}, "'0' is neither a number of seeds"),
        ({"methods": "simcse,kdmsce"}, "no method 'kdmsce'"),
        ({"features": "absent"}, "--features absent does not exist"),
    ],
)
def test_bad_input_is_one_line(data, tiny_bert, tmp_path, changes, message):
    result = CliRunner().invoke(
        load_command("evaluation/ablation.py"), [str(tmp_path / "root"), *flags(data, tiny_bert, **changes)]
    )
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "root").exists()
