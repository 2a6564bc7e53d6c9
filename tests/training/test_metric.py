"""The best model of a run by NanoBEIR or another evaluator."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from datasets import Dataset
from helpers import WORDS
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    InformationRetrievalEvaluator,
    NanoBEIREvaluator,
    SentenceEvaluator,
)
from small_runs import flags, options, write_data

from st_kdmcse.cli.main import main
from st_kdmcse.training import TrainingOptions, train
from st_kdmcse.training.metric import load_metric

TASKS = {"NanoMSMARCO": 0, "NanoNQ": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences, store):
    return write_data(tmp_path_factory.mktemp("metric"), sentences, store)


@pytest.fixture(scope="module")
def nanobeir(tmp_path_factory):
    """A folder in the layout of the hub's NanoBEIR: a configuration for each part, with a split for each task."""
    folder = tmp_path_factory.mktemp("NanoBEIR")
    configs = []
    for part in ("corpus", "queries", "qrels"):
        files = []
        for task, seed in TASKS.items():
            generator = np.random.default_rng(seed)
            documents = [" ".join(generator.choice(WORDS, size=9)) for _ in range(40)]
            rows = {
                "corpus": [{"_id": f"d{row}", "text": text} for row, text in enumerate(documents)],
                "queries": [{"_id": f"q{row}", "text": documents[2 * row][:20]} for row in range(12)],
                "qrels": [{"query-id": f"q{row}", "corpus-id": f"d{2 * row}"} for row in range(12)],
            }[part]
            path = folder / part / f"{task}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            Dataset.from_list(rows).to_parquet(path)
            files.append(f"  - split: {task}\n    path: {part}/{task}-*")
        configs.append(f"- config_name: {part}\n  data_files:\n" + "\n".join(files))
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n# NanoBEIR\n")
    return folder


def test_the_best_model_is_chosen_by_nanobeir(data, nanobeir, tiny_bert, tmp_path):
    out = tmp_path / "out"
    arguments = flags(data, tiny_bert, output_dir=out, metric="nanobeir:msmarco,NQ", nanobeir_data=nanobeir)
    many = ["--max-steps", "12", "--eval-steps", "1", "--lr", "0.02", "--seed", "1"]
    result = CliRunner().invoke(main, ["train", *arguments, *many])
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "training_summary.json").read_text())
    metric = summary["metric"]
    curve = [point["score"] for point in metric["curve"]]
    assert [point["step"] for point in metric["curve"]] == list(range(1, 13))
    step = metric["curve"][int(np.argmax(curve))]["step"]
    on_sts = max(summary["sts_dev_curve"], key=lambda point: point["spearman"])
    assert step != on_sts["step"], "STS-B dev must choose another step, or this test shows nothing"
    assert summary["sts_dev_best"] == summary["sts_dev_curve"][step - 1]
    saved = SentenceTransformer(str(out), device="cpu")
    evaluator = NanoBEIREvaluator(["msmarco", "nq"], dataset_id=str(nanobeir))
    scores = evaluator(saved)
    assert metric["primary_metric"] == evaluator.primary_metric == "NanoBEIR_mean_cosine_ndcg@10"
    assert metric["of_best"] == pytest.approx(scores[evaluator.primary_metric], abs=1e-9)
    assert metric["of_best"] == pytest.approx(max(curve), abs=1e-6)
    assert metric["before"] != metric["of_best"]
    assert "nanobeir:msmarco,NQ, which chose: " in result.output
    run = json.loads((out / "run.json").read_text())
    assert run["options"]["metric"] == metric["name"] == "nanobeir:msmarco,NQ"
    assert len(run["data_sha256"]["metric"]) == 64
    assert "NanoBEIR" in (out / "README.md").read_text()


class Norm(SentenceEvaluator):
    """Not a good idea: the length of an embedding."""

    def __init__(self):
        super().__init__()
        self.primary_metric = "norm"

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        return {"others": 0.0, "norm": float(np.linalg.norm(model.encode("a dog runs")))}


def test_any_evaluator_can_choose_and_a_resumed_run_goes_on_with_it(data, tiny_bert, tmp_path):
    changes = {"metric": Norm(), "eval_steps": 1, "lr": 0.02, "save_steps": 2, "max_steps": 6}
    given = options(data, tiny_bert, **changes)
    whole = train(TrainingOptions(**given, output_dir=tmp_path / "whole"))
    curve = whole["metric"]["curve"]
    best = max(curve, key=lambda point: point["score"])
    assert whole["sts_dev_best"]["step"] == best["step"]
    assert whole["metric"]["of_best"] == pytest.approx(best["score"], rel=1e-5)
    assert whole["options"]["metric"] == whole["metric"]["name"] == "Norm"
    for path in (tmp_path / "whole" / "training_summary.json", tmp_path / "whole/checkpoints/checkpoint-6"):
        path.rename(tmp_path / path.name)  # as if it had been killed at step 5
    resumed = train(TrainingOptions(**given, output_dir=tmp_path / "whole", resume=True))
    assert resumed["metric"] == whole["metric"]
    (tmp_path / "whole" / "training_summary.json").unlink()
    with pytest.raises(ValueError, match="metric was 'Norm', is None"):
        train(TrainingOptions(**{**given, "metric": None}, output_dir=tmp_path / "whole", resume=True))


def test_without_a_metric_nothing_is_said_of_one(data, tiny_bert, tmp_path):
    summary = train(TrainingOptions(**options(data, tiny_bert), output_dir=tmp_path / "out"))
    assert summary["metric"] is None
    assert summary["sts_dev_best"] == max(summary["sts_dev_curve"], key=lambda point: point["spearman"])


def test_data_of_an_evaluator_count_for_its_checksum(nanobeir):
    one, other = (load_metric(f"nanobeir:{task}", str(nanobeir)) for task in ("msmarco", "nq"))
    assert len({one.checksum, other.checksum, load_metric("nanobeir:NQ", str(nanobeir)).checksum}) == 2
    assert load_metric(NanoBEIREvaluator(["nq"], dataset_id=str(nanobeir)), None).checksum == other.checksum
    alone = InformationRetrievalEvaluator({"q": "a dog"}, {"d": "dogs"}, {"q": {"d"}})
    assert load_metric(alone, None).checksum is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "nano"], "--metric is 'nano', expected nanobeir, nanobeir:msmarco or"),
        (["--metric", "nanobeir:"], "expected nanobeir, nanobeir:msmarco or"),
        (["--metric", "nanobeir:msmarco,trec"], "--metric: NanoBEIR has no task trec: choose from climatefever, "),
        (["--metric", "nanobeir", "--eval-steps", "0"], "--metric chooses among evaluations, and --eval-steps 0"),
        (["--nanobeir-data", "x"], "--nanobeir-data is read for --metric nanobeir"),
        (["--metric", "nanobeir:nq", "--nanobeir-data", "{data}"], "NanoBEIR cannot be loaded from"),
    ],
)
def test_what_is_refused_before_anything_is_written(data, tiny_bert, tmp_path, arguments, message):
    arguments = [each.format(data=data) for each in arguments]
    run = [*flags(data, tiny_bert, output_dir=tmp_path / "out"), *arguments]
    result = CliRunner().invoke(main, ["train", *run])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_an_evaluator_by_which_less_is_better_is_refused():
    evaluator = Norm()
    evaluator.greater_is_better = False
    with pytest.raises(ValueError, match="`metric`: less is better by Norm"):
        TrainingOptions(text="text.txt", metric=evaluator)
