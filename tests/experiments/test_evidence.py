"""The grounding experiment on a small encoder and small data."""

# ruff: noqa: RUF001

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import load_command
from scipy.stats import spearmanr
from small_runs import write, write_data

from st_kdmcse import FeatureStore
from st_kdmcse.data import STSPairs, STSTask, load_sts_tasks
from st_kdmcse.encoding import load_model
from st_kdmcse.evaluation.sts import evaluate_sts
from st_kdmcse.experiments.arms import ARMS, CONTRASTS, MAIN_ARMS, OPTIONS, Arm, Contrast
from st_kdmcse.experiments.evidence import PRIMARY, Outcome, caption_pairs, evidence_tasks, measures
from st_kdmcse.experiments.grid import arm_grid
from st_kdmcse.experiments.statistics import PairedDifference, holm, paired_difference

COMMAND = "evaluation/grounding_evidence.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences, store):
    """Text, features, STS12, STS-B, SICK-R without its test set, CxC, and a list of images."""
    folder = write_data(tmp_path_factory.mktemp("evidence-data"), sentences, store)
    generator = np.random.default_rng(2)
    for name in ("train", "trial"):
        pairs = [generator.choice(sentences, 2) for _ in range(12)]
        rows = [f"{n}\t{a}\t{b}\t{generator.uniform(1, 5):.2f}\tNEUTRAL" for n, (a, b) in enumerate(pairs)]
        header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment"
        write(folder / f"SICK/SICK_{name}.txt", "\n".join([header, *rows]) + "\n")
    annotations = [{"id": key, "image_id": key, "caption": text} for key, text in enumerate(sentences[:40])]
    write(folder / "captions.json", json.dumps({"images": [], "annotations": annotations}))
    rows = [f"x:sentid:{n},x:sentid:{39 - n},{generator.uniform(0, 5):.2f},c2c_isim" for n in range(20)]
    write(folder / "cxc.csv", "caption1,caption2,agg_score,sampling_method\n" + "\n".join(rows) + "\n")
    write(folder / "left_out.txt", "3.jpg\n")
    return folder


@pytest.fixture
def command(data, tiny_bert, tmp_path):
    def build(**changes):
        values = {
            "model": tiny_bert,
            "text": data / "text.txt",
            "features": data / "features",
            "exclude-images": data / "left_out.txt",
            "data-dir": data,
            "cxc": data / "cxc.csv",
            "coco-captions": data / "captions.json",
            "arms": "simcse,mcse,recipe-permuted",
            "seeds": 2,
            "max-steps": 4,
            "batch-size": 8,
            **changes,
        }
        flags = [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
        return [str(tmp_path / "root"), *flags]

    return build


def test_one_command_trains_scores_and_tests(command, data, tmp_path):
    root = tmp_path / "root"
    result = CliRunner().invoke(load_command(COMMAND), command())
    assert result.exit_code == 0, result.output
    report = json.loads((root / "report/report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["simcse", "mcse", "recipe-permuted"]
    assert [(each["first"], each["second"]) for each in report["contrasts"]] == [
        ("mcse", "simcse"),
        ("simcse", "recipe-permuted"),
    ]
    tasks = ["STS12", "STS-B", "SICK-R", "CxC"]
    assert list(report["before"]) == [PRIMARY, "captions", "general", *tasks]
    scores = report["arms"][1]["scores"]
    for seed in (0, 1):
        result_of_run = evaluate_sts(load_model(str(root / f"mcse/seed-{seed}")), [*evidence_tasks(data)])
        for task in tasks[:3]:
            assert scores[task][seed] == pytest.approx(result_of_run.spearman[task], abs=0.006)
        assert scores[PRIMARY][seed] == pytest.approx(np.mean([scores[task][seed] for task in tasks]))
    difference = report["contrasts"][0]["differences"][PRIMARY]
    expected = paired_difference(scores[PRIMARY], report["arms"][0]["scores"][PRIMARY])
    assert difference == expected._asdict()
    p_values = [each["differences"][PRIMARY]["p"] for each in report["contrasts"]]
    assert [each["p_holm"] for each in report["contrasts"]] == holm(p_values)
    assert report["options"] == []
    summaries = [json.loads(path.read_text()) for path in sorted(root.glob("*/*/training_summary.json"))]
    assert len(summaries) == 6
    assert all(summary["excluded"] == {"images": 1, "captions": 3} for summary in summaries)
    text = (root / "report/report.md").read_text()
    for part in ("| before training | – |", "seed 1", "MCSE − SimCSE", "Left out were 1 images"):
        assert part in text

    before = {path: path.stat().st_mtime_ns for path in root.rglob("seed-*/*") if path.is_file()}
    more = CliRunner().invoke(load_command(COMMAND), command(arms="simcse,mcse,simcse-remove"))
    assert more.exit_code == 0, more.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    report = json.loads((root / "report/report.json").read_text())
    (option,) = report["options"]
    assert option["p_holm"] == option["differences"][PRIMARY]["p"]  # of a family of its own
    assert "One option at a time" in more.output


def test_arms_of_a_seed_see_the_same_batches(data, tiny_bert, tmp_path, monkeypatch):
    from st_kdmcse.losses.base import TwoViewLoss
    from st_kdmcse.training.run import train

    shared = {"model": str(tiny_bert), "text": data / "text.txt", "features": data / "features"}
    arms = {name: ARMS[name] for name in ("simcse", "mcse", "kdmcse", "lists", "kdmcse-permuted")}
    grid = arm_grid(tmp_path, arms, [1], **shared, max_steps=6, batch_size=8, pair_every=2, eval_steps=0)
    forward = TwoViewLoss.forward
    seen = []
    for options in grid:
        batches = []

        def spy(loss, features, labels=None, batches=batches):
            features = list(features)
            batches.append((features[0]["input_ids"].tolist(), None if labels is None else labels.tolist()))
            return forward(loss, features, labels)

        monkeypatch.setattr(TwoViewLoss, "forward", spy)
        train(options)
        seen.append(batches)
    assert len(seen[0]) == 6
    assert [labels is not None for _, labels in seen[0]] == [False, True] * 3
    assert all(batches == seen[0] for batches in seen)


def test_the_permuted_arm_reads_other_pictures(data, tiny_bert, tmp_path):
    from accelerate import PartialState

    from st_kdmcse.training.inputs import TrainingInputs

    shared = {"model": str(tiny_bert), "features": data / "features", "eval_steps": 0}
    plain, permuted = arm_grid(tmp_path, {name: ARMS[name] for name in ("kdmcse", "kdmcse-permuted")}, [5], **shared)
    stores = [TrainingInputs.load(options, PartialState()).store for options in (plain, permuted)]
    assert (stores[0].image_rows != stores[1].image_rows).all()
    assert stores[0].checksum == stores[1].checksum


def test_contrasts_name_main_arms_and_every_arm_has_a_config():
    assert {name for contrast in CONTRASTS for name in contrast[:2]} <= set(MAIN_ARMS) <= ARMS.keys()
    assert {name for contrast in OPTIONS for name in contrast[:2]} <= ARMS.keys()
    for options in arm_grid(Path("runs"), ARMS, [1], model="m", features=Path("f")):
        options.loss_config()


def test_parts_by_hand():
    generator = np.random.default_rng(0)

    def pairs(name, count, genres=()):
        words = [f"{name} {number}" for number in range(count)]
        return STSPairs(words, words, generator.uniform(0, 5, count).tolist(), name, genres=genres)

    tasks = [
        STSTask("STS12", (pairs("MSRpar", 10), pairs("MSRvid", 12))),
        STSTask("STS-B", (pairs("sts-test", 20, ["main-captions"] * 8 + ["main-news"] * 12),)),
        STSTask("CxC", (pairs("c2c_isim", 9),)),
    ]
    similarities = {task.name: generator.normal(size=len(task)).astype(np.float32) for task in tasks}
    found = measures(tasks, similarities, "model")

    def score(number, start, stop):
        task = tasks[number]
        return 100 * spearmanr(task.scores[start:stop], similarities[task.name][start:stop]).statistic

    assert list(found) == [PRIMARY, "captions", "general", "STS12", "STS-B", "CxC"]
    assert found[PRIMARY] == pytest.approx(np.mean([score(0, 0, 22), score(1, 0, 20), score(2, 0, 9)]))
    assert found["captions"] == pytest.approx(np.mean([score(0, 10, 22), score(1, 0, 8), score(2, 0, 9)]))
    assert found["general"] == pytest.approx(np.mean([score(0, 0, 10), score(1, 8, 20)]))
    assert caption_pairs(STSTask("STS12", (pairs("sts12-sts-test", 5),))) is None
    with pytest.raises(ValueError, match="model, CxC: all pairs"):
        measures(tasks[2:], {"CxC": np.ones(9, np.float32)}, "model")


def test_captions_of_the_real_tasks(shared_data):
    tasks = load_sts_tasks(shared_data / "senteval", ["STS12", "STS-B"])
    assert [int(caption_pairs(task).sum()) for task in tasks] == [750, 625]


@pytest.mark.parametrize(
    ("mean", "p", "expected", "reading"),
    [
        (1.0, 0.01, 0.8, "shown"),
        (0.7, 0.01, 0.8, "shown, less than expected"),
        (-1.0, 0.01, 0.0, "the other way round"),
        (1.0, 0.06, 0.0, "no difference shown"),
        (1.0, None, 0.0, "not tested"),
    ],
)
def test_the_outcome_in_words(mean, p, expected, reading):
    difference = PairedDifference(mean, None, None, p, 3)
    assert Outcome(Contrast("a", "b", expected), {PRIMARY: difference}, p).reading == reading


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": "simcse,kdmsce"}, "there is no arm kdmsce: choose from simcse, simcse-remove"),
        ({"data-dir": None}, "--data-dir is missing"),
        ({"coco-captions": None}, "--cxc and --coco-captions go together"),
        ({"cxc": "nowhere.csv"}, "nowhere.csv does not exist"),
        ({"exclude-images": "nowhere.txt"}, "--exclude-images nowhere.txt does not exist"),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, changes, message):
    result = CliRunner().invoke(load_command(COMMAND), command(**changes))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "root/simcse").exists()


def test_an_arm_sets_its_own_options(data, tiny_bert):
    arms = {"a": Arm("A", "mcse", {"multimodal_weight": 0.2}, {"head_learning_rate": 0.1, "lr": 1e-4})}
    shared = {"model": str(tiny_bert), "features": data / "features", "lr": 1e-5}
    runs = arm_grid(Path("root"), arms, [2, 0], **shared)
    assert [(run.seed, run.lr, run.head_learning_rate, dict(run.config)) for run in runs] == [
        (2, 1e-4, 0.1, {"multimodal_weight": 0.2}),
        (0, 1e-4, 0.1, {"multimodal_weight": 0.2}),
    ]
    assert runs[0].output_dir == Path("root/a/seed-2")
    assert FeatureStore.open(data / "features").num_images == 24
