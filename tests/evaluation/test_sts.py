import csv
import json
from itertools import combinations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import WORDS, copy_tree, cpu_with_bfloat16, load_command, with_large_weights
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    SequentialEvaluator,
)
from sentence_transformers.sentence_transformer.modules import Pooling

from st_kdmcse import build_student
from st_kdmcse.data import STS_TASKS, STSPairs, STSTask, load_sts_tasks
from st_kdmcse.evaluation.sts import (
    AS_SAVED,
    POOLINGS,
    STSEvaluator,
    evaluate_poolings,
    evaluate_sts,
    has_pooler,
    score_embeddings,
)


@pytest.fixture(scope="module")
def tasks():
    """Two subsets of one task and one of another, with sentences in common."""
    generator = np.random.default_rng(0)
    sentences = [" ".join(generator.choice(WORDS, size=generator.integers(3, 12))) for _ in range(60)]
    pairs_of = list(combinations(range(len(sentences)), 2))

    def pairs(name, count):
        drawn = generator.permutation(pairs_of)[:count]  # no pair twice: rounding would decide which is closer
        one, two = [sentences[i] for i, _ in drawn], [sentences[j] for _, j in drawn]
        places = [f"{name}.txt, line {number}" for number in range(1, count + 1)]
        return STSPairs(one, two, generator.uniform(0, 5, size=count).tolist(), name, places)

    return [STSTask("STS12", (pairs("a", 30), pairs("b", 50))), STSTask("STS-B", (pairs("c", 40),))]


@pytest.fixture
def student(student):
    return with_large_weights(student)


def stock(model, pairs):
    metrics = EmbeddingSimilarityEvaluator(pairs.sentences1, pairs.sentences2, pairs.scores, name="x")(model)
    return {kind: 100 * metrics[f"x_{kind}_cosine"] for kind in ("pearson", "spearman")}


def test_scores_equal_the_stock_evaluator(student, tasks):
    result = evaluate_sts(student, tasks)
    for task in tasks:
        details = result.details[task.name]
        whole = STSPairs(task.sentences1, task.sentences2, task.scores, "")
        each = [stock(student, subset) for subset in task.subsets]
        for kind in ("pearson", "spearman"):
            assert details[kind]["all"] == pytest.approx(stock(student, whole)[kind], abs=1e-3)
            scores = [score[kind] for score in each]
            assert [subset[kind] for subset in details["subsets"].values()] == pytest.approx(scores, abs=1e-3)
            sizes = [len(subset) for subset in task.subsets]
            assert details[kind]["mean"] == pytest.approx(np.mean(scores), abs=1e-3)
            assert details[kind]["wmean"] == pytest.approx(np.average(scores, weights=sizes), abs=1e-3)
        assert result.spearman[task.name] == round(details["spearman"]["all"], 2)
    assert result.spearman["SICK-R"] is None
    assert result.spearman["Avg."] is None
    assert result.absent == ["STS13", "STS14", "STS15", "STS16", "SICK-R"]
    frame = result.to_frame().set_index(["task", "subset"])
    assert len(frame) == sum(1 + len(task.subsets) for task in tasks)
    for task in tasks:
        details = result.details[task.name]
        assert frame.loc[(task.name, "all"), "spearman"] == details["spearman"]["all"]
        for name, subset in details["subsets"].items():
            assert frame.loc[(task.name, name)].to_dict() == subset


def test_each_distinct_sentence_is_encoded_once(student, tasks, monkeypatch):
    seen = []
    preprocess = student.preprocess
    monkeypatch.setattr(
        student, "preprocess", lambda texts, **options: seen.extend(texts) or preprocess(texts, **options)
    )
    evaluate_sts(student, tasks, batch_tokens=64)
    assert sorted(seen) == sorted({s for task in tasks for s in task.sentences1 + task.sentences2})


def test_the_average_is_of_all_seven():
    vectors = dict(zip("abcdef", np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), strict=True))
    pairs = STSPairs(list("abcde"), list("bcdef"), [1.0, 2.0, 5.0, 0.0, 3.0], "x")
    tasks = [STSTask(name, (pairs,)) for name in STS_TASKS]

    def lookup(sentences):
        return np.stack([vectors[sentence] for sentence in sentences])

    result = score_embeddings(lookup, tasks)
    one, two = lookup(pairs.sentences1), lookup(pairs.sentences2)
    cosine = (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
    np.testing.assert_allclose(result.similarities["STS12"], cosine, rtol=1e-5)
    assert result.spearman["STS12"] == round(100 * spearmanr(pairs.scores, cosine).statistic, 2)
    assert result.details["STS12"]["pearson"]["all"] == pytest.approx(100 * pearsonr(pairs.scores, cosine).statistic)
    assert result.spearman["Avg."] == result.spearman["STS12"]
    assert list(result.spearman) == [*STS_TASKS, "Avg."]


def test_other_tasks_stand_beside_the_average(student, tasks):
    other = STSTask("CxC", tasks[0].subsets)
    result = evaluate_sts(student, [*tasks, other])
    assert list(result.spearman) == [*STS_TASKS, "Avg.", "CxC"]
    assert result.spearman["CxC"] == result.spearman["STS12"]
    assert result.spearman["Avg."] is None


def test_a_collapsed_model_has_no_score(tasks, caplog):
    result = score_embeddings(lambda sentences: np.ones((len(sentences), 3), np.float32), tasks)
    assert result.spearman["STS12"] is None
    assert result.absent == ["STS13", "STS14", "STS15", "STS16", "SICK-R"]
    assert "no correlation" in caplog.text
    json.dumps(result.details, allow_nan=False)


def test_embeddings_that_are_not_finite_are_named(student, tasks):
    row = student.tokenizer.convert_tokens_to_ids("dog")
    student[0].auto_model.embeddings.word_embeddings.weight.data[row] = torch.nan
    with pytest.raises(ValueError, match=r"embedding of '.*dog.*' \([abc]\.txt, line \d+\) is not finite.*diverged"):
        evaluate_sts(student, tasks)


def test_poolings_equal_models_with_that_pooling(student, tasks):
    found = evaluate_poolings(student, tasks)
    assert list(found) == [AS_SAVED, *POOLINGS]
    assert found[AS_SAVED].spearman == found["cls"].spearman == evaluate_sts(student, tasks).spearman
    dimension = student.get_embedding_dimension()
    student[1] = Pooling(dimension, "mean")
    assert found["mean"].spearman == evaluate_sts(student, tasks).spearman
    sentences = sorted({s for task in tasks for s in task.sentences1 + task.sentences2})
    student.eval()
    with torch.no_grad():
        features = student.preprocess(sentences)
        pooled = student[0].auto_model(features["input_ids"], features["attention_mask"]).pooler_output.numpy()
    rows = {sentence: row for row, sentence in enumerate(sentences)}
    expected = score_embeddings(lambda texts: pooled[[rows[text] for text in texts]], tasks)
    assert found["pooler"].spearman == expected.spearman
    with pytest.raises(ValueError, match="unknown pooling 'max'"):
        evaluate_poolings(student, tasks, ["max"])


def test_an_encoder_without_pooler(student, tasks):
    student[0].auto_model.pooler = None
    with pytest.raises(ValueError, match="has no pooler"):
        evaluate_poolings(student, tasks, ["pooler"])


def test_evaluator_in_a_sequence(student, tasks, tmp_path):
    evaluator = STSEvaluator(tasks, name="dev")
    student.train()
    for steps in (1, 2):
        metrics = SequentialEvaluator([evaluator])(student, str(tmp_path), 0, steps)
    assert student.training
    result = evaluate_sts(student, tasks)
    scores = [result.details[task.name]["spearman"]["all"] / 100 for task in tasks]
    assert metrics["dev_STS12_spearman_cosine"] == pytest.approx(scores[0])
    assert metrics["dev_STS-B_pearson_cosine"] == pytest.approx(result.details["STS-B"]["pearson"]["all"] / 100)
    assert metrics["dev_spearman_cosine"] == pytest.approx(np.mean(scores))
    assert metrics["sequential_score"] == metrics[evaluator.primary_metric]
    with (tmp_path / "sts_evaluation_dev_results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == ["1", "2"]
    assert float(rows[1]["STS12_spearman_cosine"]) == pytest.approx(scores[0])
    with pytest.raises(ValueError, match="no STS tasks"):
        STSEvaluator([])


@pytest.mark.slow
def test_all_minilm_scores_what_it_is_known_to_score(shared_data, minilm):
    model = SentenceTransformer(minilm, device="cpu")
    result = evaluate_sts(model, load_sts_tasks(shared_data / "senteval", ["STS12", "STS-B"]))
    assert (result.spearman["STS12"], result.spearman["STS-B"]) == (72.37, 82.03)


def write_senteval(folder, gold="1.0\n\n3.0\n4.5\n"):
    """A SentEval folder in which every task is there, of few pairs."""
    from st_kdmcse.data.sts import _SUBSETS

    lines = ["a dog runs\tthe dogs sits", "a man\ta woman", "red ball\ta ball", "snow\tgrass of snow"]
    for year, subsets in _SUBSETS.items():
        place = folder / "STS" / f"{year}-en-test"
        place.mkdir(parents=True)
        for subset in subsets:
            (place / f"STS.input.{subset}.txt").write_text("\n".join(lines) + "\n")
            (place / f"STS.gs.{subset}.txt").write_text(gold)
    (folder / "STS" / "STSBenchmark").mkdir()
    rows = [
        f"g\tf\ty\t{number}\t{score}\t{line}\n" for number, (score, line) in enumerate(zip("1342", lines, strict=True))
    ]
    (folder / "STS" / "STSBenchmark" / "sts-test.csv").write_text("".join(rows))
    (folder / "SICK").mkdir()
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
    sick = [
        f"{number}\t{line}\t{score}\tNEUTRAL\n" for number, (score, line) in enumerate(zip("1342", lines, strict=True))
    ]
    (folder / "SICK" / "SICK_test_annotated.txt").write_text(header + "".join(sick))
    return folder


def test_a_pooler_that_is_not_in_the_checkpoint_is_left_out(tmp_path, student):
    assert has_pooler(student, save(student, tmp_path / "with"))
    weights = load_file(tmp_path / "with" / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    copy_tree(tmp_path / "with", tmp_path / "without")
    save_file(kept, tmp_path / "without" / "model.safetensors", metadata={"format": "pt"})
    drawn = SentenceTransformer(str(tmp_path / "without"), device="cpu")
    assert not has_pooler(drawn, str(tmp_path / "without"))
    data = write_senteval(tmp_path / "senteval")
    arguments = ["--model", str(tmp_path / "without"), "--data-dir", str(data), "--pooling"]
    run = CliRunner().invoke(load_command("evaluation/sts.py"), [*arguments, "all"])
    assert run.exit_code == 0
    assert "mean" in run.stdout
    assert "pooler" not in run.stdout
    run = CliRunner().invoke(load_command("evaluation/sts.py"), [*arguments, "pooler"])
    assert run.exit_code == 2
    assert "no weights of a pooler" in run.stderr


def save(model, folder):
    model.save_pretrained(str(folder))
    return str(folder)


def test_script(tmp_path, tiny_bert, student):
    data = write_senteval(tmp_path / "senteval")
    student.save_pretrained(str(tmp_path / "model"))
    output = tmp_path / "new" / "results.json"
    run = CliRunner().invoke(
        load_command("evaluation/sts.py"),
        ["--model", str(tmp_path / "model"), "--data-dir", str(data), "--output", str(output), "--pooling", "all"],
    )
    assert run.exit_code == 0, run.output
    record = json.loads(output.read_text())
    assert list(record["spearman"]) == [*STS_TASKS, "Avg."]
    assert record["absent"] == []
    average = np.mean([record["spearman"][name] for name in STS_TASKS])
    assert record["spearman"]["Avg."] == pytest.approx(average, abs=0.0051)
    assert record["spearman"] == record["pooling"]["cls"]["spearman"]
    assert record["details"]["STS12"]["pairs"] == 15
    assert set(record["data_sha256"]) == set(STS_TASKS)
    assert len(record["model"]["parameters_sha256"]) == 64
    assert all(name in run.stdout for name in (*STS_TASKS, "Avg.", "pooler"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "there is no model folder ./nowhere"),
        (["--model", "{data}"], "neither modules.json nor config.json"),
        (["--tasks", "STS17"], "unknown STS task STS17: choose from STS12"),
        (["--data-dir", "{data}/SICK"], "holds none of STS12"),
        (["--data-dir", "/nowhere/senteval"], "there is no folder /nowhere/senteval"),
        (["--data-dir", "SentEval/data/downstream"], "there is no folder SentEval/data/downstream"),
        (["--pooling", "mean, max"], "unknown pooling 'max'"),
        (["--device", "cuda:7"], "could not be loaded"),
    ],
)
def test_script_errors(tmp_path, tiny_bert, arguments, message):
    data = write_senteval(tmp_path)
    given = {"--model": str(tiny_bert), "--data-dir": str(data)}
    given |= {name: value.format(data=data) for name, value in zip(arguments[::2], arguments[1::2], strict=True)}
    flat = [each for option in given.items() for each in option]
    run = CliRunner().invoke(load_command("evaluation/sts.py"), flat)
    assert run.exit_code == 2
    assert run.stderr.startswith("error: ")
    assert message in run.stderr


def test_scores_are_of_the_precision_that_is_asked_for(tmp_path, student, bfloat16):
    data = write_senteval(tmp_path / "senteval")
    student.save_pretrained(str(tmp_path / "model"))
    arguments = ["--model", str(tmp_path / "model"), "--data-dir", str(data), "--output", str(tmp_path / "scores.json")]
    details = {}
    for given, computed in (([], "float32"), (["--precision", "auto"], "bfloat16")):
        run = CliRunner().invoke(load_command("evaluation/sts.py"), [*arguments, *given])
        assert run.exit_code == 0, run.output
        record = json.loads((tmp_path / "scores.json").read_text())
        assert record["precision"] == computed
        assert ("embeddings were computed in bfloat16" in run.stdout) == (computed == "bfloat16")
        details[computed] = record["details"]["STS-B"]["pearson"]["all"]
    assert 0 < abs(details["float32"] - details["bfloat16"]) < 5  # of 15 pairs, by a model of random weights
    tasks = load_sts_tasks(data, ["STS-B"])
    metric = STSEvaluator(tasks, precision="bfloat16")(student)["sts_STS-B_pearson_cosine"]
    assert 100 * metric == pytest.approx(details["bfloat16"], abs=0.2)
    with cpu_with_bfloat16(False):
        run = CliRunner().invoke(load_command("evaluation/sts.py"), [*arguments, "--precision", "bfloat16"])
    assert run.exit_code == 2
    assert "set --precision to float32 or auto" in run.stderr


@pytest.fixture
def sts_data(tmp_path):
    lines = [f"main\tfile\t2012\t{n}\t{n % 6}\t{' '.join(WORDS[n : n + 4])}\t{WORDS[n]}\n" for n in range(12)]
    (tmp_path / "sts").mkdir()
    (tmp_path / "sts" / "sts-test.csv").write_text("".join(lines))
    (tmp_path / "sts" / "sts-dev.csv").write_text("".join(lines))
    return tmp_path / "sts"


@pytest.mark.parametrize(
    ("flags", "mode", "row"),
    [
        ([], "mean", "mean (none saved)"),
        (["--pooling", "cls"], "cls", "cls (none saved)"),
        (["--pooling", "cls,mean"], "cls", "cls (none saved)"),
    ],
)
def test_a_plain_encoder_is_scored_with_the_pooling_that_was_asked_for(tiny_bert, sts_data, tmp_path, flags, mode, row):
    arguments = ["--model", str(tiny_bert), "--data-dir", str(sts_data), "--tasks", "STS-B", "--device", "cpu"]
    result = CliRunner().invoke(
        load_command("evaluation/sts.py"), [*arguments, *flags, "--output", str(tmp_path / "r.json")]
    )
    assert result.exit_code == 0, result.output
    assert row in result.output
    assert AS_SAVED not in result.output
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["model"]["pooling"] == f"{mode} (none was saved)"
    expected = evaluate_sts(build_student(str(tiny_bert), pooling=mode).to("cpu"), load_sts_tasks(sts_data, ["STS-B"]))
    assert record["spearman"]["STS-B"] == expected.spearman["STS-B"]
    assert ("mean" in record["pooling"]) == (flags[-1:] == ["cls,mean"])


def test_other_commands_ask_for_the_pooling_too_and_a_model_keeps_its_own(tiny_bert, sts_data, tmp_path, caplog):
    build_student(str(tiny_bert)).save_pretrained(str(tmp_path / "saved"))
    arguments = [f"plain={tiny_bert}", f"saved={tmp_path / 'saved'}", "--data-dir", str(sts_data)]
    command = load_command("evaluation/alignment_uniformity.py")
    for flags, mode in (([], "mean"), (["--pooling", "cls"], "cls")):
        caplog.clear()
        result = CliRunner().invoke(command, [*arguments, *flags, "--output", str(tmp_path / "r.json")])
        assert result.exit_code == 0, result.output
        plain, saved = json.loads((tmp_path / "r.json").read_text())["models"]
        assert plain["model"]["pooling"] == f"{mode} (none was saved)"
        assert "pooling" not in saved["model"]
        assert ("no pooling was saved" in caplog.text) == (not flags)
    assert plain["spearman"] == saved["spearman"]  # both by [CLS]
