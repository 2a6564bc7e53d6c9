"""Tasks of MTEB on data in mteb's own layout, from local files."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from datasets import Dataset
from helpers import WORDS, cpu_with_bfloat16, with_large_weights
from sentence_transformers import SentenceTransformer

from st_kdmcse.cli.main import main
from st_kdmcse.data import load_sts_tasks
from st_kdmcse.evaluation.mteb_results import evaluate_mteb, load_mteb_tasks
from st_kdmcse.evaluation.sts import evaluate_sts
from st_kdmcse.provenance import model_checksum

mteb = pytest.importorskip("mteb")


def local_task(monkeypatch, name, folder, rows):
    """A task of mteb, whose data set is a folder as on the hub."""
    folder.mkdir(parents=True)
    Dataset.from_list(rows).to_json(folder / "test.jsonl")
    kind = type(mteb.get_task(name))
    monkeypatch.setattr(
        kind, "metadata", kind.metadata.model_copy(update={"dataset": {"path": str(folder), "revision": "1"}})
    )
    return mteb.get_task(name)


def pairs_of(count, seed=0):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        one, other = (" ".join(generator.choice(WORDS, size=7)) for _ in range(2))
        yield {"sentence1": one, "sentence2": other, "score": float(generator.uniform(0, 5))}


@pytest.fixture
def sts12(monkeypatch, tmp_path):
    return local_task(monkeypatch, "STS12", tmp_path / "data" / "sts12-sts", list(pairs_of(40)))


@pytest.fixture
def sickr(monkeypatch, tmp_path):
    return local_task(monkeypatch, "SICK-R", tmp_path / "data" / "sickr-sts", list(pairs_of(30, seed=1)))


@pytest.fixture
def folder(student, tmp_path):
    with_large_weights(student).save_pretrained(str(tmp_path / "student"))
    return tmp_path / "student"


def expected(model, task):
    """Spearman of the cosines, by hand."""
    from scipy.stats import spearmanr

    rows = [json.loads(line) for line in (Path(task.metadata.dataset["path"]) / "test.jsonl").read_text().splitlines()]
    one, two = (model.encode([row[f"sentence{side}"] for row in rows]) for side in (1, 2))
    cosines = (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
    return float(spearmanr(cosines, [row["score"] for row in rows]).statistic)


def command(folder, output, *more):
    return ["evaluate", "mteb", "--model", str(folder), "--output-dir", str(output), "--device", "cpu", *more]


def test_results_that_mteb_reads(sts12, sickr, folder, tmp_path):
    output = tmp_path / "results"
    result = CliRunner().invoke(main, command(folder, output, "--tasks", "STS12, SICK-R"))
    assert result.exit_code == 0, result.output
    model = SentenceTransformer(str(folder), device="cpu")
    loaded = mteb.ResultCache(output).load_results(tasks=["STS12", "SICK-R"])
    [of_model] = loaded.model_results
    assert (of_model.model_name, of_model.model_revision) == ("local/student", model_checksum(model))
    scores = {each.task_name: each.get_score() for each in of_model.task_results}
    assert scores == {task.metadata.name: pytest.approx(expected(model, task), abs=1e-4) for task in (sts12, sickr)}
    for name, score in scores.items():
        assert f"{name:6}  {100 * score:6.2f}  cosine_spearman" in result.output
    from mteb.models import ModelMeta

    place = output / "results" / "local__student" / model_checksum(model)
    meta = ModelMeta.model_validate_json_resolved((place / "model_meta.json").read_text())
    assert (meta.embed_dim, meta.max_tokens, meta.similarity_fn_name.value) == (32, model.max_seq_length, "cosine")
    assert set(meta.framework) == {"Sentence Transformers", "PyTorch"}
    assert meta.n_parameters == sum(each.numel() for each in model.parameters())
    assert meta.modalities == ["text"]


def test_what_is_there_is_not_run_again(sts12, sickr, folder, tmp_path):
    output = tmp_path / "results"
    run = CliRunner().invoke(main, command(folder, output, "--tasks", "STS12", "--name", "us/ours"))
    assert run.exit_code == 0, run.output
    [path] = output.rglob("STS12.json")
    before = path.read_bytes(), path.stat().st_mtime_ns
    run = CliRunner().invoke(main, command(folder, output, "--tasks", "STS12,SICK-R", "--name", "us/ours"))
    assert run.exit_code == 0, run.output
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert (path.parent / "SICK-R.json").is_file()
    assert path.parent.parent.name == "us__ours"
    other = with_large_weights(SentenceTransformer(str(folder), device="cpu"))
    evaluate_mteb(other, [sts12], output, name="us/ours", show_progress_bar=False)
    assert len(list(output.rglob("STS12.json"))) == 2


def test_prompts_and_truncation_of_the_model_count(sts12, folder, tmp_path):
    model = SentenceTransformer(str(folder), device="cpu")
    plain = expected(model, sts12)
    model.prompts = {"STS12": "the red ball ", "document": "snow "}
    model.truncate_dim = 8
    result = evaluate_mteb(model, [sts12], tmp_path / "out", name="student", show_progress_bar=False)
    [path] = (tmp_path / "out").rglob("model_meta.json")
    meta = json.loads(path.read_text())
    assert (meta["embed_dim"], meta["use_instructions"]) == (8, True)
    model.default_prompt_name = "STS12"
    prompted = expected(model, sts12)
    assert prompted != pytest.approx(plain, abs=1e-3)
    assert result.task_results[0].get_score() == pytest.approx(prompted, abs=1e-4)


def test_bfloat16_has_results_of_its_own(sts12, folder, tmp_path, bfloat16):
    scores = {}
    for precision in ("float32", "bfloat16"):
        run = CliRunner().invoke(main, command(folder, tmp_path / "out", "--tasks", "STS12", "--precision", precision))
        assert run.exit_code == 0, run.output
        assert ("computed in bfloat16" in run.output) == (precision == "bfloat16")
    for path in (tmp_path / "out").rglob("STS12.json"):
        scores["experiments" in path.parts] = json.loads(path.read_text())["scores"]["test"][0]["cosine_pearson"]
    assert 0 < abs(scores[False] - scores[True]) < 0.1
    with cpu_with_bfloat16(False):
        run = CliRunner().invoke(main, command(folder, tmp_path / "o", "--tasks", "STS12", "--precision", "bfloat16"))
    assert run.exit_code == 2
    assert "set --precision to float32 or auto" in run.output


def test_a_task_that_fails_is_named_and_the_others_are_kept(sts12, monkeypatch, folder, tmp_path):
    kind = type(mteb.get_task("SICK-R"))
    nowhere = {"path": str(tmp_path / "nowhere"), "revision": "1"}
    monkeypatch.setattr(kind, "metadata", kind.metadata.model_copy(update={"dataset": nowhere}))
    run = CliRunner().invoke(main, command(folder, tmp_path / "out", "--tasks", "SICK-R,STS12"))
    assert run.exit_code == 2
    assert "1 of 2 tasks failed, the first is SICK-R: " in run.output
    assert "STS12 " in run.output
    assert [path.name for path in (tmp_path / "out").rglob("S*.json")] == ["STS12.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --benchmark or --tasks"),
        (["--tasks", "STS12", "--benchmark", "MTEB(eng, v2)"], "give either --benchmark or --tasks"),
        (["--tasks", "STS-12"], "--tasks: 'STS-12' not found. Did you mean: 'STS12'?"),
        (["--benchmark", "MTEB(eng, v3)"], "--benchmark: 'MTEB(eng, v3)' not found. Did you mean: MTEB(eng, v"),
        (["--tasks", "STS12", "--model", "./nowhere"], "there is no model folder ./nowhere"),
    ],
)
def test_what_is_refused(tiny_bert, tmp_path, arguments, message):
    result = CliRunner().invoke(main, command(tiny_bert, tmp_path / "out", *arguments))
    assert result.exit_code == 2
    assert message in result.output
    assert not list((tmp_path / "out").rglob("*.json"))


def test_the_tasks_of_a_benchmark():
    names = [task.metadata.name for task in load_mteb_tasks("MTEB(eng, v2)")]
    assert len(names) == 41
    assert {"STS12", "ArguAna", "Banking77Classification"} <= set(names)


def test_the_checksum_tells_models_apart(folder, tmp_path):
    model = SentenceTransformer(str(folder), device="cpu")
    first = model_checksum(model)
    model.encode(["a dog runs on the beach", "a man"])
    assert model_checksum(model) == first
    model.save_pretrained(str(tmp_path / "copy"))
    assert model_checksum(SentenceTransformer(str(tmp_path / "copy"), device="cpu")) == first
    found = {first}
    for change in ("prompts", "truncate_dim", "max_seq_length", "pooling", "weights"):
        changed = SentenceTransformer(str(folder), device="cpu")
        if change == "prompts":
            changed.prompts = {"query": "the "}
        elif change == "pooling":
            changed[1].pooling_mode = "mean"
        elif change == "weights":
            next(iter(changed.parameters())).data[0] += 1
        else:
            setattr(changed, change, 9)
        found.add(model_checksum(changed))
    assert len(found) == 6


@pytest.mark.slow
def test_sts12_of_mteb_is_that_of_senteval(monkeypatch, shared_data, minilm, tmp_path):
    [task] = load_sts_tasks(shared_data / "senteval", ["STS12"])
    columns = {"sentence1": task.sentences1, "sentence2": task.sentences2, "score": task.scores}
    rows = Dataset.from_dict(columns).to_list()
    sts12 = local_task(monkeypatch, "STS12", tmp_path / "sts12-sts", rows)
    model = SentenceTransformer(minilm, device="cpu")
    result = evaluate_mteb(model, [sts12], tmp_path / "out", name="minilm", show_progress_bar=False)
    own = evaluate_sts(model, [task]).details["STS12"]["spearman"]["all"]
    assert 100 * result.task_results[0].get_score() == pytest.approx(own, abs=0.02)
