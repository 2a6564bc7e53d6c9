import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import load_command
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold

from st_kdmcse.data.transfer import TRANSFER_TASKS, LabelledSentences, TransferTask, load_transfer_task
from st_kdmcse.encoding import SentenceEmbeddings, encode_distinct, load_model
from st_kdmcse.evaluation.transfer import TransferProtocol, classifier_input, evaluate_transfer, score_task

ROOT = Path(__file__).resolve().parents[2]
SMALL_GRID = [0.25, 0.5, 1, 2, 4, 8]
LARGE_GRID = [0.5, 1, 2, 4, 8, 16, 32]


main = load_command("evaluation/transfer.py")
second = runpy.run_path(str(ROOT / "benchmarks" / "transfer_agreement.py"))["second_implementation"]


def made_up(name, rows, classes=2, dimension=12, seed=0):
    """A task of so many rows a split, and embeddings in which its classes overlap."""
    generator = np.random.default_rng(seed)
    directions = generator.normal(size=(classes, dimension))
    sentences, vectors, splits = [], [], {}
    for split, count in rows.items():
        labels = [row % classes for row in range(count)]
        table = []
        for row, label in enumerate(labels):
            words = " w" * generator.integers(0, 5)
            first = generator.normal(size=dimension)
            if name == "MRPC":
                pair = [first, first + (2.0 - 0.7 * label) * generator.normal(size=dimension)]
            else:
                pair = [first + 0.5 * directions[label]]
            table.append(tuple(f"{split} {row} {side}{words}" for side in range(len(pair))))
            sentences += table[-1]
            vectors += pair
        splits[split] = LabelledSentences(table, labels, [f"{split}, line {row + 1}" for row in range(count)])
    return TransferTask(name, splits, {}), SentenceEmbeddings(sentences, np.array(vectors, dtype=np.float32))


def percent(share):
    return round(100 * float(share), 2)


def fit(c, x, y):
    return LogisticRegression(C=c, tol=1e-6, max_iter=10_000).fit(x, y)


def splits(x, y):
    return StratifiedKFold(n_splits=3, shuffle=True, random_state=1111).split(x, y)


def cross_validated(x, y, grid):
    """The plain loop over C and folds; every classifier starts from zero."""
    means = []
    for c in grid:
        scores = []
        for train, test in splits(x, y):
            scores.append(fit(c, x[train], y[train]).score(x[test], y[test]))
        means.append(percent(np.mean(scores)))
    return grid[int(np.argmax(means))], max(means)


@pytest.mark.parametrize("jobs", [1, 3])
def test_nested_folds_equal_the_plain_loop(jobs):
    task, embeddings = made_up("CR", {"all": 200})
    x, y = classifier_input(task.splits["all"], embeddings)
    chosen, developed, tested = [], [], []
    for train, test in splits(x, y):
        c, dev = cross_validated(x[train], y[train], SMALL_GRID)
        chosen.append(c)
        developed.append(dev)
        tested.append(percent(fit(c, x[train], y[train]).score(x[test], y[test])))
    score = score_task(task, embeddings, TransferProtocol(folds=3), jobs=jobs)
    assert (score.c, score.fold_accuracy, score.f1) == (chosen, tested, None)
    assert score.accuracy == round(np.mean(tested), 2)
    assert score.dev_accuracy == round(np.mean(developed), 2)
    assert 60 < score.accuracy < 95


@pytest.mark.parametrize(("name", "classes"), [("TREC", 4), ("MRPC", 2)])
def test_folds_of_the_training_set_equal_the_plain_loop(name, classes):
    task, embeddings = made_up(name, {"train": 150, "test": 60}, classes)
    x, y = classifier_input(task.splits["train"], embeddings)
    test_x, test_y = classifier_input(task.splits["test"], embeddings)
    c, dev = cross_validated(x, y, LARGE_GRID)
    predicted = fit(c, x, y).predict(test_x)
    score = score_task(task, embeddings, TransferProtocol(folds=3))
    assert (score.c, score.dev_accuracy, score.accuracy) == ([c], dev, percent(np.mean(predicted == test_y)))
    assert score.f1 == (percent(f1_score(test_y, predicted)) if name == "MRPC" else None)


def test_a_development_set_chooses_c():
    task, embeddings = made_up("SST2", {"train": 120, "dev": 60, "test": 60})
    (x, y), dev, test = (classifier_input(task.splits[split], embeddings) for split in ("train", "dev", "test"))
    scores = [percent(fit(c, x, y).score(*dev)) for c in SMALL_GRID]
    c = SMALL_GRID[int(np.argmax(scores))]
    score = score_task(task, embeddings)
    assert (score.c, score.dev_accuracy, score.accuracy) == ([c], max(scores), percent(fit(c, x, y).score(*test)))


@pytest.mark.parametrize(
    ("name", "rows", "classes"),
    [
        ("MR", {"all": 300}, 2),
        ("SST2", {"train": 300, "dev": 200, "test": 200}, 2),
        ("TREC", {"train": 300, "test": 200}, 6),
        ("MRPC", {"train": 200, "test": 200}, 2),
    ],
)
def test_a_second_implementation_agrees(name, rows, classes):
    task, embeddings = made_up(name, rows, classes, seed=1)
    ours, other = score_task(task, embeddings, TransferProtocol(folds=3)), second(task, embeddings, folds=3)
    assert ours.accuracy == pytest.approx(other["accuracy"], abs=0.5)
    assert ours.dev_accuracy == pytest.approx(other["dev_accuracy"], abs=0.5)
    if name == "MRPC":
        assert ours.f1 == pytest.approx(other["f1"], abs=0.5)


def test_a_second_implementation_agrees_on_real_embeddings(shared_data, minilm):
    rows = load_transfer_task(shared_data / "senteval", "CR").splits["all"]
    few = [row for row in range(len(rows)) if row % 16 == 0]
    part = LabelledSentences(*([column[row] for row in few] for column in (rows.sentences, rows.labels, rows.places)))
    model = load_model(minilm, "cpu")
    embeddings = encode_distinct(model, [sentence for (sentence,) in part.sentences])
    task = TransferTask("CR", {"all": part}, {})
    ours, other = score_task(task, embeddings, TransferProtocol(folds=2)), second(task, embeddings, folds=2)
    assert ours.accuracy == pytest.approx(other["accuracy"], abs=0.5)
    assert ours.accuracy > 70


def test_rows_come_in_order_of_length_and_pairs_side_by_side():
    rows = LabelledSentences([("c c c",), ("a",), ("b",), ("d d",)], [0, 1, 0, 1], ["", "", "", ""])
    x, y = classifier_input(
        rows, SentenceEmbeddings(["a", "b", "c c c", "d d"], np.arange(4, dtype=np.float32)[:, None])
    )
    assert (x.ravel().tolist(), y.tolist()) == ([1, 0, 3, 2], [0, 1, 1, 0])
    u, v = np.array([[1, -2], [3, 4]], dtype=np.float32)
    x, _ = classifier_input(
        LabelledSentences([("u", "v")], [1], [""]), SentenceEmbeddings(["u", "v"], np.array([u, v]))
    )
    assert x.tolist() == [[2, 6, 3, -8]]


def test_folds_must_fit_the_data():
    task, embeddings = made_up("TREC", {"train": 20, "test": 6}, classes=6)
    with pytest.raises(ValueError, match="a class has 3 rows to be dealt into 10 folds: take fewer folds"):
        score_task(task, embeddings)
    with pytest.raises(ValueError, match="folds must be at least 2, got 1"):
        TransferProtocol(folds=1)


@pytest.fixture(scope="module")
def senteval(tmp_path_factory, sentences):
    """All seven tasks in SentEval's layout, of few rows: label 1 is for sentences with more animals."""
    folder = tmp_path_factory.mktemp("senteval")
    ones = [sentence for sentence in sentences if "dog" in sentence]
    zeros = [sentence for sentence in sentences if "dog" not in sentence]
    names = ("MR/rt-polarity", "CR/custrev", "MPQA/mpqa")
    files = {f"{name}.{end}": some for name in names for end, some in (("pos", ones[:30]), ("neg", zeros[:30]))}
    files |= {"SUBJ/subj.objective": ones[:30], "SUBJ/subj.subjective": zeros[:30]}
    for split in ("train", "dev", "test"):
        files[f"SST/binary/sentiment-{split}"] = [f"{text}\t{int('dog' in text)}" for text in sentences[:40]]
    for split, file in (("train", "train_5500.label"), ("test", "TREC_10.label")):
        classes = ["ABBR:a", "DESC:d", "ENTY:e", "HUM:h", "LOC:l", "NUM:n"]
        files[f"TREC/{file}"] = [f"{classes[row % 6]} {text}" for row, text in enumerate(sentences[:60])]
        files[f"MRPC/msr_paraphrase_{split}.txt"] = [
            "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
            *(
                f"{row % 2}\t1\t2\t{one}\t{two}"
                for row, (one, two) in enumerate(zip(ones[:20], zeros[:20], strict=True))
            ),
        ]
    for name, lines in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tiny_bert):
    from st_kdmcse import build_student

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student")
    build_student(str(tiny_bert)).save_pretrained(str(folder))
    return folder


def run(model, data_dir, *arguments):
    fixed = ["--model", model, "--data-dir", data_dir, "--folds", 2, "--jobs", 2]
    return CliRunner().invoke(main, [str(argument) for argument in (*fixed, *arguments)])


def test_the_script_writes_a_table_and_a_record_and_goes_on(tmp_path, model_folder, senteval):
    output = tmp_path / "new" / "transfer.json"
    first = run(model_folder, senteval, "--output", output, "--tasks", "MPQA, CR", "--device", "cpu")
    assert first.exit_code == 0, first.output
    part = json.loads(output.read_text())
    assert list(part["details"]) == ["CR", "MPQA"]
    assert (part["accuracy"]["MR"], part["accuracy"]["Avg."], part["absent"]) == (None, None, [])

    rest = run(model_folder, senteval, "--output", output, "--device", "cpu")
    assert rest.exit_code == 0, rest.output
    record = json.loads(output.read_text())
    assert list(record["accuracy"]) == [*TRANSFER_TASKS, "Avg."]
    scores = [record["accuracy"][name] for name in TRANSFER_TASKS]
    assert record["accuracy"]["Avg."] == pytest.approx(np.mean(scores), abs=0.006)
    for name in ("CR", "MPQA"):  # with the seconds that it took
        assert record["details"][name] == part["details"][name]
    assert (len(record["details"]["MR"]["c"]), record["details"]["MR"]["rows"]) == (2, {"all": 60})
    assert (len(record["details"]["TREC"]["c"]), "f1" in record["details"]["TREC"]) == (1, False)
    assert (record["protocol"]["folds"], record["seed"]) == (2, 1111)
    assert len(record["data_sha256"]) == 15
    assert len(record["model"]["parameters_sha256"]) == 64
    assert f"MRPC   {record['accuracy']['MRPC']:8.2f}" in rest.output
    assert f"F1 {record['details']['MRPC']['f1']:.2f}" in rest.output
    assert f"Avg.   {record['accuracy']['Avg.']:8.2f}" in rest.output


def test_changed_data_are_scored_again_and_other_results_are_kept(tmp_path, model_folder, senteval, student):
    output = tmp_path / "transfer.json"
    protocol = TransferProtocol(folds=2)
    model = load_model(str(model_folder), "cpu")
    before = evaluate_transfer(model, senteval, ["CR"], protocol, output=output)
    folder = tmp_path / "CR"
    folder.mkdir()
    for end in ("pos", "neg"):
        lines = (senteval / "CR" / f"custrev.{end}").read_text().splitlines(keepends=True)
        (folder / f"custrev.{end}").write_text("".join(lines[:-1]))
    after = evaluate_transfer(model, tmp_path, ["CR", "MR"], protocol, output=output)
    assert (before["details"]["CR"]["rows"], after["details"]["CR"]["rows"]) == ({"all": 60}, {"all": 58})
    assert (after["absent"], after["accuracy"]["MR"]) == (["MR"], None)
    assert json.loads(output.read_text()) == after

    torch.nn.init.zeros_(next(student.parameters()))
    for other, folds, what in ((student, 2, "parameters_sha256 was .*, is .*"), (model, 3, "folds was 2, is 3")):
        with pytest.raises(ValueError, match=rf"of another model or protocol \({what}\): give another output file"):
            evaluate_transfer(other, senteval, ["CR"], TransferProtocol(folds), output=output)
    output.write_text("[1]")
    with pytest.raises(ValueError, match="is not a result of transfer tasks"):
        evaluate_transfer(model, senteval, ["CR"], protocol, output=output)
    assert output.read_text() == "[1]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "CR,SST"], "no transfer task 'SST': choose from MR, CR"),
        (["--folds", "1"], "folds must be at least 2"),
        (["--data-dir", "nowhere"], "there is no folder nowhere"),
        (["--data-dir", str(ROOT / "tests")], "holds no files of MR, CR"),
        (["--model", "./nowhere"], "no model folder ./nowhere"),
    ],
)
def test_what_the_user_can_mend_is_one_line(model_folder, senteval, arguments, message):
    result = run(model_folder, senteval, *arguments)
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert message in result.output


def test_an_embedding_that_is_not_finite_is_placed(student, senteval):
    torch.nn.init.constant_(next(student.parameters()), torch.nan)
    with pytest.raises(ValueError, match=r"custrev\.(pos|neg), line \d+\) is not finite"):
        evaluate_transfer(student, senteval, ["CR"], TransferProtocol(folds=2))


def test_scores_of_two_precisions_are_not_mixed(tmp_path, model_folder, senteval, bfloat16):
    arguments = ["--output", tmp_path / "transfer.json", "--device", "cpu"]
    assert run(model_folder, senteval, *arguments, "--tasks", "CR").exit_code == 0
    assert json.loads((tmp_path / "transfer.json").read_text())["protocol"]["precision"] == "float32"
    mixed = run(model_folder, senteval, *arguments, "--tasks", "MPQA", "--precision", "bfloat16")
    assert mixed.exit_code == 2
    assert "precision was 'float32', is 'bfloat16'" in mixed.output
