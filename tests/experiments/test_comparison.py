"""Comparison of small, real runs on STS tasks, by the script."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import copy_tree, load_command
from sentence_transformers import SentenceTransformer
from small_runs import options, write_data

from st_kdmcse.data import load_sts_tasks
from st_kdmcse.evaluation.sts import evaluate_sts
from st_kdmcse.experiments.comparison import PRESENT, compare_runs
from st_kdmcse.experiments.grid import method_grid, run_grid
from st_kdmcse.experiments.runs import find_runs, score_runs


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences, store):
    return write_data(tmp_path_factory.mktemp("compare-data"), sentences, store)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data, tiny_bert):
    """Two seeds of two methods; not to be changed."""
    root = tmp_path_factory.mktemp("compare") / "root"
    run_grid(method_grid(root, ["simcse", "mcse"], [0, 1], **options(data, tiny_bert, lr=1e-4)))
    return root


@pytest.fixture
def root(trained, tmp_path):
    return copy_tree(trained, tmp_path / "root")


def run(*arguments):
    return CliRunner().invoke(load_command("evaluation/compare.py"), [str(each) for each in arguments])


def test_best_and_last_are_scored_as_by_evaluate_sts(root, data):
    tasks, found = load_sts_tasks(data), find_runs([root]).runs
    scores = score_runs(found, tasks)
    folder = root / "mcse/seed-1"
    for checkpoint, model in (("best", folder), ("last", folder / "last")):
        expected = evaluate_sts(SentenceTransformer(str(model), device="cpu"), tasks)
        given = scores[folder, checkpoint]
        assert given.spearman == {name: expected.spearman[name] for name in ("STS12", "STS-B")}
        for name, cosines in expected.similarities.items():
            np.testing.assert_allclose(given.similarities[name], cosines, atol=1e-6)
    record = json.loads((folder / "evaluation/sts-best.json").read_text())
    assert record["model"]["parameters_sha256"]
    assert record["data_sha256"] == {task.name: task.checksum for task in tasks}


def test_the_scores_are_a_frame(root, data):
    comparison = compare_runs(find_runs([root]).runs, load_sts_tasks(data), replicates=0)
    frame = comparison.to_frame()
    assert sorted(zip(frame.method, frame.seed, frame.checkpoint, strict=True)) == sorted(
        (row.group.label, run.seed, checkpoint)
        for row in comparison.rows
        for run in row.group.runs
        for checkpoint in ("best", "last")
    )
    for row in comparison.rows:
        own = frame[(frame.method == row.group.label) & (frame.checkpoint == "best")]
        assert own["STS12"].mean() == pytest.approx(row.best["STS12"].mean)
        assert own[PRESENT].tolist() == row.compared
        assert own["SICK-R"].isna().all()


def test_a_second_report_evaluates_nothing(root, data):
    assert run(root, "--data-dir", data, "--output", root / "report").exit_code == 0
    files = sorted(root.rglob("evaluation/sts-*"))
    before = {path: path.stat().st_mtime_ns for path in files}
    assert len([path for path in files if path.name == "sts-best.json"]) == 4
    result = run(root, "--data-dir", data, "--output", root / "report")
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_other_weights_or_a_damaged_cache_are_scored_again(root, data):
    tasks, (found, *_) = load_sts_tasks(data), find_runs([root / "mcse/seed-0"]).runs
    first = score_runs([found], tasks)[found.folder, "best"]
    cache = found.folder / "evaluation/sts-best.npz"
    cache.write_bytes(b"damaged")
    np.testing.assert_array_equal(
        score_runs([found], tasks)[found.folder, "best"].similarities["STS12"], first.similarities["STS12"]
    )
    shutil.copy(root / "simcse/seed-1/last/model.safetensors", found.folder)
    again = score_runs([found], tasks)[found.folder, "best"]
    assert not np.array_equal(again.similarities["STS12"], first.similarities["STS12"])


def test_another_pooling_is_scored_again_and_a_note_is_not(root, data):
    tasks, (found, *_) = load_sts_tasks(data), find_runs([root / "mcse/seed-0"]).runs
    first = score_runs([found], tasks)[found.folder, "best"]
    cache = found.folder / "evaluation/sts-best.json"
    before = cache.stat().st_mtime_ns
    (found.folder / "README.md").write_text("my best model")
    score_runs([found], tasks)
    assert cache.stat().st_mtime_ns == before
    pooling = found.folder / "1_Pooling/config.json"
    assert '"cls"' in pooling.read_text()
    pooling.write_text(pooling.read_text().replace('"cls"', '"mean"'))
    again = score_runs([found], tasks)[found.folder, "best"]
    expected = evaluate_sts(SentenceTransformer(str(found.folder), device="cpu"), tasks)
    np.testing.assert_allclose(again.similarities["STS12"], expected.similarities["STS12"], atol=1e-6)
    assert not np.allclose(again.similarities["STS12"], first.similarities["STS12"], atol=1e-3)


def test_other_pairs_are_scored_again(root, data, tmp_path):
    found = find_runs([root / "mcse/seed-0"]).runs
    few = load_sts_tasks(data, ["STS-B"])
    assert list(score_runs(found, few)[found[0].folder, "best"].spearman) == ["STS-B"]
    assert list(score_runs(found, load_sts_tasks(data))[found[0].folder, "best"].spearman) == ["STS12", "STS-B"]
    cache = found[0].folder / "evaluation/sts-best.json"
    before = cache.stat().st_mtime_ns
    score_runs(found, few)  # a part of what is known
    assert cache.stat().st_mtime_ns == before


def test_comparison_over_seeds_and_pairs(trained, data, tmp_path):
    root = copy_tree(trained, tmp_path / "root")
    tasks = load_sts_tasks(data)
    comparison = compare_runs(find_runs([root]).runs, tasks, replicates=50, seed=1)
    mcse, simcse = comparison.rows
    assert mcse.compared == pytest.approx([np.mean([each["STS12"], each["STS-B"]]) for each in mcse.each["best"]])
    assert mcse.best["Avg."] is None
    assert mcse.best[PRESENT].mean == pytest.approx(np.mean(mcse.compared))
    (pair,) = comparison.pairs
    assert pair.difference == pytest.approx(np.mean(mcse.compared) - np.mean(simcse.compared))
    assert pair.low <= pair.difference + 3
    assert pair.low <= pair.high
    assert pair.bootstrap == pair.bootstrap_holm
    again = compare_runs(find_runs([root]).runs, tasks, replicates=50, seed=1)
    assert again.pairs == comparison.pairs
    without = compare_runs(find_runs([root]).runs, tasks, replicates=0)
    assert without.pairs[0].low is None


def test_script(root, data, tmp_path):
    shutil.copytree(root / "mcse/seed-0", root / "mcse/seed-9")
    (root / "mcse/seed-9/training_summary.json").unlink()
    output = tmp_path / "report"
    arguments = [f"ours={root / 'mcse'}", root / "simcse", "--data-dir", data, "--output", output, "--bootstrap", 20]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "| ours | 2 |" in result.output
    assert "seed-9 is not finished" in result.output
    assert "mean of STS12, STS-B" in (output / "report.md").read_text()
    assert "Bootstrap: 20 replicates, seed 0." in (output / "report.md").read_text()


def test_one_seed_is_compared_over_pairs(root, data, tmp_path):
    result = run(root / "mcse/seed-0", root / "simcse/seed-0", "--data-dir", data, "--output", tmp_path / "report")
    assert result.exit_code == 0, result.output
    (pair,) = json.loads((tmp_path / "report/report.json").read_text())["pairs"]
    assert pair["t_test"] is None
    assert 0 < pair["bootstrap"] <= 1
    assert pair["over_seeds"] == "not tested"


def test_without_tasks_the_scores_of_the_training_are_compared(root, tmp_path):
    result = run(root, "--output", tmp_path / "report")
    assert result.exit_code == 0, result.output
    summary = json.loads((root / "mcse/seed-0/training_summary.json").read_text())
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["compared"] == "STS-B test score"
    assert report["methods"][0]["runs"][0]["best"]["STS-B"] == round(100 * summary["sts_test_of_best"], 2)
    assert not (root / "mcse/seed-0/evaluation").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "mcse/seed-0/model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda root: (root / "mcse/seed-0/training_summary.json").write_text("{"), "training_summary.json is damaged"),
        (lambda root: shutil.rmtree(root), "there is no folder"),
    ],
)
def test_bad_input_is_one_line(root, data, tmp_path, damage, message):
    damage(root)
    result = run(root, "--data-dir", data, "--output", tmp_path / "report")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "nowhere/at/all"], "there is no folder nowhere/at/all"),
        (["--output", "FILE"], "is a file: name a folder"),
        (["--output", "FILE/report"], "is a file: name a folder"),
        (["--bootstrap-seed", -1], "--bootstrap-seed"),
    ],
)
def test_what_spoils_the_report_is_found_before_anything_is_scored(root, data, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    given = [str(each).replace("FILE", str(tmp_path / "file")) for each in arguments]
    result = run(root, "--data-dir", data, *given)
    assert result.exit_code == 2
    assert message in result.output
    assert not list(root.rglob("evaluation"))
