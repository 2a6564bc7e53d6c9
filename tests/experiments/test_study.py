"""Tuning: studies of small real runs."""

import json
import shutil

import optuna
import pytest
from click.testing import CliRunner
from file_events import at_path, interrupt
from small_runs import options, write_data

from st_kdmcse.cli.main import main
from st_kdmcse.experiments.study import Range, tune

SPACE = {"lr": Range(1e-4, 1e-2, log=True), "margin": [0.1, 0.2], "pair_every": Range(2, 3)}


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences, store):
    return write_data(tmp_path_factory.mktemp("tune"), sentences, store)


@pytest.fixture(scope="module")
def given(data, tiny_bert):
    return {**options(data, tiny_bert, max_steps=4, eval_steps=2), "seed": 3, "bf16": False}


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    """A study of three trials."""
    root = tmp_path_factory.mktemp("studies") / "study"
    return root, tune(root, SPACE, 3, prune=False, **given)


def trials(root):
    return optuna.load_study(study_name="tune", storage=f"sqlite:///{root / 'study.db'}").trials


def summary(folder):
    return json.loads((folder / "training_summary.json").read_text())


def test_the_winner_is_the_best_trial_trained_again(finished):
    root, tuned = finished
    found = trials(root)
    best = max(found, key=lambda trial: trial.value)
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 3
    assert len({trial.params["lr"] for trial in found}) == 3
    assert tuned.winner == root / f"winner-{best.number + 1:03d}"
    again = summary(tuned.winner)
    assert again["sts_dev_best"]["spearman"] == best.value
    assert again["sts_dev_curve"] == summary(root / "trials" / f"trial-{best.number + 1:03d}")["sts_dev_curve"]
    assert again["learning_rate"] == best.params["lr"]
    assert again["options"]["config"] == {"margin": best.params["margin"]}
    for number, trial in enumerate(found):
        folder = root / "trials" / f"trial-{number + 1:03d}"
        assert sorted(path.name for path in folder.iterdir() if path.name != "lock") == [
            "run.json",
            "training_summary.json",
        ]
        assert trial.intermediate_values == {
            point["step"]: point["spearman"] for point in summary(folder)["sts_dev_curve"]
        }
    for name in ("model.safetensors", "heads/heads.safetensors", "last/model.safetensors", "README.md"):
        assert (tuned.winner / name).is_file()
    report = (root / "report.md").read_text()
    assert report == tuned.report
    assert f"score of **{100 * again['sts_test_of_best']:.2f}**" in report
    assert "The scores on STS-B dev below are no results" in report
    assert f"| {100 * best.value:.2f} | 4 | complete |" in report
    assert "Trained again, the winner scores" not in report


def test_trials_of_one_seed_and_the_same_options_are_equal(given, tmp_path):
    tune(tmp_path / "study", {"margin": [0.15]}, 2, prune=False, **given)
    first, second = (summary(tmp_path / "study" / "trials" / f"trial-00{number}") for number in (1, 2))
    assert first["sts_dev_curve"] == second["sts_dev_curve"]
    assert first["losses"] == second["losses"]
    assert trials(tmp_path / "study")[0].value == trials(tmp_path / "study")[1].value


def test_an_interrupted_study_goes_on_and_more_trials_are_added(finished, given, tmp_path):
    root = tmp_path / "study"
    at_path("trial-002/checkpoints/checkpoint-2/trainer_state.json", interrupt)
    changes = {**given, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt, match=r"stopped in .*trial-002; the same command goes on"):
        tune(root, SPACE, 2, prune=False, **changes)
    assert [trial.state.name for trial in trials(root)] == ["COMPLETE", "RUNNING"]
    tune(root, SPACE, 2, prune=False, **changes)
    assert summary(root / "trials/trial-002")["resumed"]
    tune(root, SPACE, 3, prune=False, **changes)
    expected, found = trials(finished[0]), trials(root)
    assert [trial.params for trial in found] == [trial.params for trial in expected]
    assert [trial.intermediate_values for trial in found] == [trial.intermediate_values for trial in expected]
    with pytest.raises(ValueError, match="was begun with other settings"):
        tune(root, SPACE, 3, prune=False, **{**changes, "seed": 4})


def test_a_trial_below_the_median_is_pruned(finished, given, tmp_path):
    root = shutil.copytree(finished[0], tmp_path / "study")
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{root / 'study.db'}")
    for _ in range(5):  # as if earlier trials had been perfect
        study.add_trial(
            optuna.trial.create_trial(
                params=study.trials[0].params,
                distributions=study.trials[0].distributions,
                value=1.0,
                intermediate_values={2: 1.0, 4: 1.0},
            )
        )
    tuned = tune(root, SPACE, 9, **given)
    pruned = trials(root)[8]
    assert (pruned.state.name, list(pruned.intermediate_values)) == ("PRUNED", [2])
    assert summary(root / "trials/trial-009")["steps"] == 2
    assert "| 2 | pruned |" in tuned.report


def test_a_trial_that_fails_does_not_end_the_study(given, tmp_path):
    tuned = tune(tmp_path / "study", {"lr": [1e30, 1e-4]}, 4, prune=False, **given)
    states = {trial.params["lr"]: trial.state.name for trial in trials(tmp_path / "study")}
    assert states == {1e30: "FAIL", 1e-4: "COMPLETE"}
    assert all("training diverged" in error for error in tuned.failed.values())
    assert "training diverged" in tuned.report


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("search-space: {margn: [0.1]}", {}, "there is no option 'margn': did you mean 'margin'?"),
        ("search-space: {seed: [1, 2]}", {}, "--search-space: seed cannot be tuned; choose from batch_size"),
        ("search-space: {margin: [0.1, wide]}", {}, "margin: 'wide' is not a valid float"),
        ("search-space: {margin: []}", {}, "margin has no values to choose from"),
        ("search-space: {margin: {low: 0.1}}", {}, "margin: expected a list of values, or low and high"),
        ("search-space: {margin: {low: 0.2, high: 0.1}}", {}, "`low` must be below `high`"),
        ("search-space: {margin: {low: 0.1, high: 9}}", {}, "--margin must be in [0, pi], got 9"),
        ("search-space: {margin: {low: 0.0, high: 1, log: true}}", {}, "`log` needs a positive `low`"),
        ("search-space: {head-init: {low: random, high: ridge}}", {}, "head-init: a range is one of numbers"),
        ("search-space: {threshold: [none, 0.8], image-threshold: [0.3]}", {}, "stands for both thresholds"),
        ("margin: 0.1\nsearch-space: {margin: [0.1, 0.2]}", {}, "--margin has a value, and others in --search-space"),
        ("search-space: [margin]", {}, "expected options by name"),
        ("{}", {}, "Missing option '--search-space'"),
        ("search-space: {margin: [0.1]}", {"eval-steps": 0}, "--eval-steps must be above 0"),
        ("search-space: {margin: [0.1]}", {"model": "bert-bse"}, "--model bert-bse is neither"),
    ],
)
def test_bad_spaces_are_refused_before_anything_is_made(data, tiny_bert, tmp_path, content, more, message):
    given = {"model": tiny_bert, "text": data / "text.txt", "features": data / "features", "eval-data": data, **more}
    (tmp_path / "tune.yaml").write_text(content)
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    root = tmp_path / "root"
    result = CliRunner().invoke(main, ["tune", str(root), "--config", str(tmp_path / "tune.yaml"), *arguments])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not root.exists()


def test_a_metric_that_trials_are_not_compared_by_is_refused(data, tiny_bert, tmp_path):
    with pytest.raises(ValueError, match="`metric`: trials are compared by their scores on STS-B dev"):
        tune(tmp_path / "root", {"margin": [0.1]}, 1, **options(data, tiny_bert, max_steps=2, metric="nanobeir"))


def test_the_command(data, tiny_bert, tmp_path):
    (tmp_path / "tune.yaml").write_text(
        f"model: {tiny_bert}\ntext: {data}/text.txt\nfeatures: {data}/features\neval-data: {data}\nmax-steps: 2\n"
        "eval-steps: 1\nbatch-size: 8\nsearch-space:\n  lr: {low: 1e-5, high: 1e-4, log: true}\n"
        "  threshold: [auto, null, 0.5]\n  margin-guard: [true, false]\n"
    )
    arguments = ["tune", str(tmp_path / "root"), "--config", str(tmp_path / "tune.yaml"), "--trials", "2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert f"winner: {tmp_path / 'root' / 'winner-00'}" in result.output
    assert "The winner is trial" in result.output
    config = json.loads(next((tmp_path / "root").glob("winner-*/run.json")).read_text())["options"]["config"]
    assert config["image_threshold"] == config["text_threshold"]
