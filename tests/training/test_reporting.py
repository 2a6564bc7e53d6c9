"""Trackers: the curves that they get are those of the trainer."""

import json
import math

import pytest
from click.testing import CliRunner
from helpers import load_command
from small_runs import flags, options, write_data

from st_kdmcse.training.checkpoints import checkpoints_in
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.reporting import trackers
from st_kdmcse.training.run import train


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences, store):
    return write_data(tmp_path_factory.mktemp("reporting"), sentences, store)


def curves(folder):
    """(step, value) by tag, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def logged(output_dir):
    """The same as the trainer has it."""
    found = {}
    state = json.loads((checkpoints_in(output_dir / "checkpoints")[0] / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        for name, value in entry.items():
            tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            if name not in ("step", "epoch"):
                found.setdefault(tag, []).append((entry["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_tensorboard_has_the_curves_of_the_trainer_after_a_resumption_too(data, tiny_bert, tmp_path):
    changes = {"max_steps": 50, "eval_steps": 20, "save_steps": 25, "report_to": "tensorboard", "run_name": "first"}
    run = TrainingOptions(**options(data, tiny_bert, output_dir=tmp_path / "out", **changes))
    train(run)
    expected = logged(run.output_dir)
    assert [step for step, _ in expected["train/loss"]] == [25, 50]
    assert [step for step, _ in expected["eval/sts-dev_spearman_cosine"]] == [20, 40, 50]
    found = curves(run.output_dir / "runs" / "first")
    assert {tag: found[tag] for tag in expected} == expected
    assert all(math.isfinite(value) for points in found.values() for _, value in points)

    # What came after the checkpoint is lost, and computed again.
    (tmp_path / "out/training_summary.json").unlink()
    for name in ("checkpoint-50", "best-50"):
        for path in (tmp_path / "out/checkpoints").glob(name):
            path.rename(tmp_path / name)
    train(TrainingOptions(**options(data, tiny_bert, output_dir=tmp_path / "out", **changes), resume=True))
    found = curves(run.output_dir / "runs" / "first")
    assert [step for step, _ in found["train/loss"]] == [25, 50]
    assert {tag: found[tag] for tag in expected if "second" not in tag and "runtime" not in tag} == {
        tag: points for tag, points in expected.items() if "second" not in tag and "runtime" not in tag
    }


def test_names_of_trackers():
    assert trackers("none") == []
    assert trackers(" tensorboard,") == ["tensorboard"]
    assert "tensorboard" in trackers("all")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": "tensorbord"}, "--report-to knows no tracker 'tensorbord': did you mean tensorboard?"),
        ({"report_to": "tensorboard,none"}, "--report-to knows no tracker 'none'"),
        ({"report_to": ","}, "--report-to names no tracker"),
        ({"report_to": "wandb"}, "--report-to wandb needs a package: pip install wandb"),
        ({"report_to": "tensorboard"}, '--report-to tensorboard needs a package: pip install "st-kdmcse[tensorboard]"'),
        ({"report_to": "clearml"}, "--report-to clearml needs a package: pip install clearml"),
        ({"run_name": "../elsewhere"}, "--run-name must be a name without slashes, got '../elsewhere'"),
        ({"run_name": " "}, "--run-name must be a name without slashes, got ' '"),
    ],
)
def test_what_cannot_be_reported_to_is_refused_before_anything_is_read(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("st_kdmcse.training.reporting.find_spec", lambda name: None)  # as where nothing is installed
    absent = {"text": "nowhere.txt", "output_dir": tmp_path / "out"}
    arguments = flags(tmp_path, tmp_path / "no-model", **absent, **changes)
    result = CliRunner().invoke(load_command("training/train_flickr.py"), arguments)
    assert result.exit_code == 2
    assert f"error: {message}" in result.output
    assert not (tmp_path / "out").exists()
