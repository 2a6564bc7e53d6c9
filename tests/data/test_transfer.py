import pytest

from st_kdmcse.data.transfer import TRANSFER_TASKS, load_transfer_task
from st_kdmcse.files import sha256_file

HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_sst(folder, train):
    ok = "good film\t1\n"
    return write(folder, {f"SST/binary/sentiment-{split}": ok for split in ("dev", "test")}) and write(
        folder, {"SST/binary/sentiment-train": train}
    )


@pytest.mark.parametrize(
    ("name", "rows", "ones"),
    [
        ("MR", {"all": 10662}, 5331),
        ("CR", {"all": 3775}, 2407),
        ("SUBJ", {"all": 10000}, 5000),
        ("MPQA", {"all": 10606}, 3312),
        ("SST2", {"train": 67349, "dev": 872, "test": 1821}, 37569),
        ("TREC", {"train": 5452, "test": 500}, 1162),
        ("MRPC", {"train": 4076, "test": 1725}, 2753),
    ],
)
def test_real_tasks(shared_data, name, rows, ones):
    task = load_transfer_task(shared_data / "senteval", name)
    assert {split: len(found) for split, found in task.splits.items()} == rows
    for split in task.splits.values():
        assert len(split.sentences) == len(split.labels) == len(split.places)
        assert {len(row) for row in split.sentences} == {2 if name == "MRPC" else 1}
        assert set(split.labels) == set(range(6 if name == "TREC" else 2))
    assert next(iter(task.splits.values())).labels.count(1) == ones
    assert task.sha256 == {file: sha256_file(shared_data / "senteval" / file) for file in task.sha256}
    assert len(task.sha256) == (3 if name == "SST2" else 2)


def test_real_rows(shared_data):
    trec = load_transfer_task(shared_data / "senteval", "TREC").splits["train"]
    assert (trec.sentences[0], trec.labels[0]) == (("How did serfdom develop in and then leave Russia ?",), 1)
    mrpc = load_transfer_task(shared_data / "senteval", "MRPC").splits["train"]
    assert (mrpc.sentences[1][0], mrpc.labels[:2]) == (
        "Yucaipa owned Dominick 's before selling the chain to Safeway in 1998 for $ 2.5 billion .",
        [1, 0],
    )
    assert mrpc.places[1].endswith("msr_paraphrase_train.txt, line 3")


@pytest.mark.parametrize("root", ["", "downstream", "data/downstream"])
def test_roots(tmp_path, root):
    write(tmp_path / root, {"CR/custrev.pos": "works well\n", "CR/custrev.neg": "broke\n"})
    assert load_transfer_task(str(tmp_path), "CR").splits["all"].labels == [1, 0]


def test_binary_tasks_are_latin_1_with_blank_joined_tokens(tmp_path):
    negative = b"\xe9 caf\xe9  \t now\r\n\nlast"
    write(tmp_path, {"SUBJ/subj.subjective": negative, "SUBJ/subj.objective": "it rains .\n"})
    rows = load_transfer_task(tmp_path, "SUBJ").splits["all"]
    assert rows.sentences == [("it rains .",), ("é café now",), ("",), ("last",)]
    assert rows.labels == [1, 0, 0, 0]
    assert rows.places[2] == f"{tmp_path / 'SUBJ/subj.subjective'}, line 2"


def test_labelled_files(tmp_path):
    write_sst(tmp_path, "a sad  mess \t0\nfunny \t1\r\n")
    train = load_transfer_task(tmp_path, "SST2").splits["train"]
    assert (train.sentences, train.labels) == ([("a sad mess",), ("funny",)], [0, 1])

    questions = b"NUM:dist How far : x ?\nABBR:exp What is \xf0 ?\n"
    write(tmp_path, {"TREC/train_5500.label": questions, "TREC/TREC_10.label": "LOC:city Where ?\n"})
    train = load_transfer_task(tmp_path, "TREC").splits["train"]
    assert (train.sentences, train.labels) == ([("How far : x ?",), ("What is ð ?",)], [5, 0])

    row = '1\t10\t11\tHe said " yes .\tYes , he said "\n'
    write(tmp_path, {f"MRPC/msr_paraphrase_{split}.txt": HEADER + row for split in ("train", "test")})
    train = load_transfer_task(tmp_path, "MRPC").splits["train"]
    assert (train.sentences, train.labels) == ([('He said " yes .', 'Yes , he said "')], [1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"no tab 1\n", "1 tab-separated columns, expected 2"),
        (b"\n", "1 tab-separated columns, expected 2"),
        (b"two\ttabs\t1\n", "3 tab-separated columns, expected 2"),
        (b"good\t2\n", "the label '2' is neither 0 nor 1"),
        (b"good\t\n", "the label '' is neither"),
        (b"caf\xe9\t1\n", "not UTF-8"),
    ],
)
def test_malformed_sst_rows_are_named(tmp_path, row, message):
    write_sst(tmp_path, b"fine\t1\n" + row)
    with pytest.raises(ValueError, match=f"sentiment-train, line 2: {message}"):
        load_transfer_task(tmp_path, "SST2")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("How far ?\n", "expected CLASS:subclass and a question"),
        ("WHAT:is this ?\n", "expected CLASS:subclass.*ABBR, DESC, ENTY, HUM, LOC, NUM"),
        ("NUM:dist\n", "no question after the class 'NUM:dist'"),
        ("\n", "expected CLASS:subclass"),
    ],
)
def test_malformed_questions_are_named(tmp_path, row, message):
    write(tmp_path, {"TREC/train_5500.label": "HUM:ind Who ?\n", "TREC/TREC_10.label": "HUM:ind Who ?\n" + row})
    with pytest.raises(ValueError, match=f"TREC_10.label, line 2: {message}"):
        load_transfer_task(tmp_path, "TREC")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\t1\t2\ta\tb\n", "line 1: no header"),
        (HEADER, "is empty"),
        ("", "is empty"),
        (HEADER + "1\t1\t2\tonly one\n", "line 2: 4 tab-separated columns, expected 5"),
        (HEADER + "yes\t1\t2\ta\tb\n", "line 2: the label 'yes'"),
    ],
)
def test_malformed_pairs_are_named(tmp_path, content, message):
    fine = HEADER + "1\t1\t2\ta\tb\n"
    write(tmp_path, {"MRPC/msr_paraphrase_train.txt": fine, "MRPC/msr_paraphrase_test.txt": content})
    with pytest.raises(ValueError, match=f"msr_paraphrase_test.txt.*{message}"):
        load_transfer_task(tmp_path, "MRPC")


def test_absent_partial_and_unknown_tasks(tmp_path):
    assert [load_transfer_task(tmp_path, name) for name in TRANSFER_TASKS] == [None] * 7
    write(tmp_path, {"MPQA/mpqa.pos": "to win\n"})
    with pytest.raises(FileNotFoundError, match=r"mpqa\.neg is missing: copy the whole MPQA folder"):
        load_transfer_task(tmp_path, "MPQA")
    write(tmp_path, {"MPQA/mpqa.neg": ""})
    with pytest.raises(ValueError, match=r"mpqa\.neg is empty"):
        load_transfer_task(tmp_path, "MPQA")
    with pytest.raises(ValueError, match="no transfer task 'SST5': choose from MR, CR"):
        load_transfer_task(tmp_path, "SST5")
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        load_transfer_task(tmp_path / "nowhere", "MR")
