import pandas as pd
import pytest
from small_runs import CHINESE, GERMAN, write_multilingual

from st_kdmcse.data.sts import STS_TASKS, load_sts_benchmark, load_sts_tasks

ROW = "main-news\tMSRvid\t2012test\t0001\t{score}\t{one}\t{two}\n"


@pytest.fixture
def senteval(tmp_path):
    def write(*rows):
        folder = tmp_path / "STS" / "STSBenchmark"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sts-dev.csv").write_bytes("".join(rows).encode())
        return tmp_path

    return write


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


@pytest.mark.parametrize(("split", "count"), [("train", 5749), ("dev", 1500), ("test", 1379)])
def test_real_benchmark(shared_data, split, count):
    pairs = load_sts_benchmark(shared_data / "senteval", split)
    assert len(pairs) == len(pairs.sentences1) == len(pairs.sentences2) == len(pairs.scores) == count
    assert pairs.name == f"sts-{split}"
    assert min(pairs.scores) == 0
    assert max(pairs.scores) == 5
    assert all(pairs.sentences1)
    assert all(pairs.sentences2)


def test_real_rows_and_roots(shared_data):
    pairs = load_sts_benchmark(shared_data / "senteval", "dev")
    assert (pairs.sentences1[1], pairs.sentences2[1], pairs.scores[1]) == (
        "a young child is riding a horse .",
        "a child is riding a horse .",
        4.75,
    )
    for root in ("senteval/STS", "senteval/STS/STSBenchmark"):
        assert load_sts_benchmark(str(shared_data / root), "dev") == pairs


@pytest.mark.parametrize(
    "root", ["", "STS/STSBenchmark", "downstream/STS/STSBenchmark", "data/downstream/STS/STSBenchmark"]
)
def test_senteval_roots(tmp_path, root):
    (tmp_path / root).mkdir(parents=True, exist_ok=True)
    (tmp_path / root / "sts-dev.csv").write_text(
        ROW.format(score=2.5, one="a", two="b") + ROW.format(score=0, one="a", two="c")
    )
    assert load_sts_benchmark(tmp_path, "dev").scores == [2.5, 0]


def test_quotes_line_ends_and_further_columns(senteval):
    first = ROW.format(score="5", one='He said "yes', two="Zürich, 'tis").replace("\n", "\thttp://x\tlicence\n")
    pairs = load_sts_benchmark(senteval(first, ROW.format(score="0.2", one="c", two="d").replace("\n", "\r\n")), "dev")
    assert (pairs.sentences1, pairs.sentences2, pairs.scores) == (
        ['He said "yes', "c"],
        ["Zürich, 'tis", "d"],
        [5, 0.2],
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("main\tnews\t2012\t1\t3.0\tonly one\n", "6 tab-separated columns, expected 7"),
        ("\n", "1 tab-separated columns"),
        (ROW.format(score="high", one="a", two="b"), "the score 'high' is not a number from 0 to 5"),
        (ROW.format(score="", one="a", two="b"), "the score '' is not"),
        (ROW.format(score="nan", one="a", two="b"), "the score 'nan' is not"),
        (ROW.format(score="5.1", one="a", two="b"), "the score '5.1' is not"),
        (ROW.format(score="-1", one="a", two="b"), "the score '-1' is not"),
        (ROW.format(score="1", one="  ", two="b"), "the sentences are '  ' and 'b', and a blank one"),
    ],
)
def test_malformed_rows_are_named(senteval, row, message):
    folder = senteval(ROW.format(score=1, one="a", two="b"), row)
    with pytest.raises(ValueError, match=rf"sts-dev.csv, line 2: {message}"):
        load_sts_benchmark(folder, "dev")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(3, "a", "b")], "the only pair"),
        ([(3, "a", "b"), (3, "c", "d")], "all others have the score 3"),
        ([(3, "a", "b"), (4, "b", "a"), (5, "a", "b")], "are one pair of sentences"),
        ([(3, "a", "a"), (4, "b", "b")], "a sentence with itself"),
    ],
)
def test_pairs_that_no_model_can_be_scored_on_are_refused(senteval, rows, message):
    folder = senteval(*(ROW.format(score=score, one=one, two=two) for score, one, two in rows))
    for load in (load_sts_benchmark, lambda source, split: load_sts_tasks(source, ["STS-B"], split)):
        with pytest.raises(ValueError, match=f"sts-dev.csv, line 1 .*{message}"):
            load(folder, "dev")


def test_a_year_of_one_score_is_refused_and_a_subset_of_one_is_not(sts13):
    with pytest.raises(ValueError, match=r"line 1 and all others have the score 2"):
        load_sts_tasks(sts13(gold="2\n\n2\n"))
    (task,) = load_sts_tasks(sts13(gold="1\n\n1\n"))
    assert set(task.subsets[2].scores) == {1.0}


def test_other_encodings_are_named(tmp_path):
    (tmp_path / "sts-dev.csv").write_bytes(ROW.format(score=1, one="Zürich", two="b").encode("latin-1"))
    with pytest.raises(ValueError, match=r"sts-dev\.csv, line 1: not UTF-8"):
        load_sts_benchmark(tmp_path, "dev")


def test_missing_things(senteval, tmp_path):
    with pytest.raises(ValueError, match=r"sts-dev\.csv is empty"):
        load_sts_benchmark(senteval(), "dev")
    with pytest.raises(FileNotFoundError, match=r"sts-test\.csv is missing"):
        load_sts_benchmark(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*SentEval"):
        load_sts_benchmark(tmp_path / "nowhere", "dev")
    with pytest.raises(ValueError, match="split is 'validation', expected \"train\""):
        load_sts_benchmark(tmp_path, "validation")


def parquet(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, table in splits.items():
        pd.DataFrame(table).to_parquet(folder / f"{split}.parquet")
    return folder


def pairs_table(*scores):
    return {"sentence1": ["a"] * len(scores), "sentence2": [f"b{n}" for n in range(len(scores))], "score": scores}


def test_parquet_folder(tmp_path):
    folder = parquet(
        tmp_path / "stsb",
        train=pairs_table(0.0, 2.5, 5.0),
        validation={"sentence1": ["one", "two"], "sentence2": ["eins", "zwei"], "score": [0.5, 1.0]},
        test=pairs_table(0.2, 0.4),
    )
    dev = load_sts_benchmark(folder, "dev")
    assert (dev.sentences1, dev.sentences2, dev.scores, dev.name) == (
        ["one", "two"],
        ["eins", "zwei"],
        [2.5, 5.0],
        "sts-dev",
    )
    assert load_sts_benchmark(str(folder), "test").scores == [1.0, 2.0]
    assert load_sts_benchmark(folder, "train").scores == [0.0, 2.5, 5.0]


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_other_languages(tmp_path, ending):
    folder = write_multilingual(tmp_path / "stsb_multi_mt", {"de": GERMAN, "zh": CHINESE}, ending)
    for language, pairs in (("de", GERMAN), ("zh", CHINESE)):
        for source in (folder / language, str(folder / language), f"{folder}:{language}"):
            for split in ("train", "dev", "test"):
                found = load_sts_benchmark(source, split)
                assert list(zip(found.sentences1, found.sentences2, found.scores, strict=True)) == pairs
    with pytest.raises(ValueError, match=r"name one, as .*stsb_multi_mt:CONFIG .*'de', 'zh'"):
        load_sts_benchmark(str(folder), "dev")
    with pytest.raises(ValueError, match=r"stsb_multi_mt:nl could not be read: .*nl"):
        load_sts_benchmark(f"{folder}:nl", "dev")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere:de"):
        load_sts_benchmark(f"{tmp_path / 'nowhere'}:de", "dev")
    with pytest.raises(ConnectionError, match="nobody/stsb:de did not load from the hub"):
        load_sts_benchmark("nobody/stsb:de", "dev")


def test_other_languages_in_the_layout_of_senteval(tmp_path):
    rows = "".join(f"main\tdatei\t2012\t{n}\t{gold}\t{a}\t{b}\n" for n, (a, b, gold) in enumerate(GERMAN))
    (tmp_path / "sts-dev.csv").write_text(rows, encoding="utf-8")
    assert load_sts_benchmark(tmp_path, "dev").sentences1[1] == "Ein Mann spielt eine große Flöte."


def test_parquet_folder_errors(tmp_path):
    with pytest.raises(ValueError, match=r"splits \['test'\], none of them dev"):
        load_sts_benchmark(parquet(tmp_path / "a", test=pairs_table(1.0)), "dev")
    with pytest.raises(ValueError, match="no column score, sentence2"):
        load_sts_benchmark(parquet(tmp_path / "b", test={"sentence1": ["a"]}), "test")
    with pytest.raises(ValueError, match=r"split test, row 1: the score 7\.0 is not a number from 0 to 5"):
        load_sts_benchmark(parquet(tmp_path / "c", test=pairs_table(1.0, 7.0)), "test")
    with pytest.raises(ValueError, match="split test, row 0: the score None is not"):
        load_sts_benchmark(parquet(tmp_path / "d", test=pairs_table(None, 1.0)), "test")
    with pytest.raises(ValueError, match=r"could not be read.*SentEval folder"):
        load_sts_benchmark(parquet(tmp_path / "e"), "test")
    (parquet(tmp_path / "f") / "test.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"could not be read.*SentEval folder"):
        load_sts_benchmark(tmp_path / "f", "test")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"nobody/stsb did not load from the hub.*give a SentEval folder"):
        load_sts_benchmark("nobody/stsb", "dev")


INPUT = "two\t words \u0085 here\nA b\tc d\ne\tf\tfurther\tcolumns\n"


@pytest.fixture
def sts13(tmp_path):
    """A function that writes STS13 with one subset's files as given."""

    def write(sentences=INPUT, gold="1.5\n\n5.000\n", root="STS"):
        folder = tmp_path / root / "STS13-en-test"
        folder.mkdir(parents=True, exist_ok=True)
        for subset in ("FNWN", "headlines"):
            (folder / f"STS.input.{subset}.txt").write_text("a\tb\n")
            (folder / f"STS.gs.{subset}.txt").write_text("2\n")
        (folder / "STS.input.OnWN.txt").write_bytes(sentences.encode() if isinstance(sentences, str) else sentences)
        (folder / "STS.gs.OnWN.txt").write_text(gold)
        return tmp_path

    return write


def test_real_tasks(shared_data):
    tasks = {task.name: task for task in load_sts_tasks(shared_data / "senteval")}
    assert {"STS12", "STS-B"} <= set(tasks)
    assert {subset.name: len(subset) for subset in tasks["STS12"].subsets} == {
        "MSRpar": 750,
        "MSRvid": 750,
        "SMTeuroparl": 459,
        "surprise.OnWN": 750,
        "surprise.SMTnews": 399,
    }
    assert len(tasks["STS12"]) == len(tasks["STS12"].places) == 3108
    assert len(tasks["STS-B"]) == 1379
    (trial,) = load_sts_tasks(shared_data / "senteval", ["SICK-R"], "dev")
    assert len(trial) == 500
    assert (min(trial.scores), max(trial.scores)) == (1, 5)
    assert trial.places[0].endswith("SICK_trial.txt, line 2")
    assert [task.name for task in load_sts_tasks(shared_data / "senteval", split="train")] == ["STS-B", "SICK-R"]


@pytest.mark.parametrize("root", ["", "STS", "downstream/STS", "data/downstream/STS"])
def test_a_year_of_several_subsets(sts13, root):
    (task,) = load_sts_tasks(sts13(root=root))
    assert (task.name, [subset.name for subset in task.subsets]) == ("STS13", ["FNWN", "headlines", "OnWN"])
    onwn = task.subsets[2]
    # A blank gold score is no gold: the pair is left out, and no other moves into its place.
    assert (onwn.sentences1, onwn.sentences2, onwn.scores) == (["two", "e"], ["words here", "f"], [1.5, 5.0])
    assert [place[-6:] for place in onwn.places] == ["line 1", "line 3"]
    assert (task.sentences1, task.scores) == (["a", "a", "two", "e"], [2, 2, 1.5, 5])


def test_the_checksum_is_of_the_content(sts13):
    (first,) = load_sts_tasks(sts13())
    (same,) = load_sts_tasks(sts13(sentences=INPUT.replace("A b", "A  c")))  # a pair without gold
    (other,) = load_sts_tasks(sts13(gold="1.5\n\n4.9\n"))
    assert first.checksum == same.checksum != other.checksum


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"gold": "1\n2\n"}, r"STS.gs.OnWN.txt has 2 lines, .*STS.input.OnWN.txt has 3.*copy both"),
        ({"gold": "1\nhigh\n3\n"}, r"STS.gs.OnWN.txt, line 2: the score 'high' is not a number from 0 to 5"),
        ({"gold": "1\n\n5.01\n"}, r"STS.gs.OnWN.txt, line 3: the score '5.01' is not"),
        ({"gold": "\n\n\n"}, r"STS.input.OnWN.txt is empty: no pair with a score"),
        ({"sentences": "a\tb\nc d\ne\tf\n", "gold": "1\n2\n3\n"}, r"STS.input.OnWN.txt, line 2: 1 tab-separated"),
        ({"sentences": b"a\tb\nc\td\n\xff\tf\n"}, r"STS.input.OnWN.txt, line 3: not UTF-8"),
    ],
)
def test_malformed_years_are_named(sts13, files, message):
    with pytest.raises(ValueError, match=message):
        load_sts_tasks(sts13(**files))


def test_a_year_with_a_missing_file(sts13):
    folder = sts13()
    (folder / "STS/STS13-en-test/STS.gs.headlines.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"STS.gs.headlines.txt is missing: copy the whole STS13-en-test"):
        load_sts_tasks(folder)


def test_sick_without_its_header(tmp_path):
    (tmp_path / "SICK").mkdir()
    (tmp_path / "SICK" / "SICK_test_annotated.txt").write_text("1\ta b\tc\t3.5\tNEUTRAL\n")
    with pytest.raises(ValueError, match=r"SICK_test_annotated.txt, line 1: the header is .*expected pair_ID"):
        load_sts_tasks(tmp_path)


def test_tasks_that_are_not_there(sts13, tmp_path):
    folder = sts13()
    assert load_sts_tasks(folder, ["STS12", "STS13", "SICK-R"])[0].name == "STS13"
    with pytest.raises(ValueError, match="holds none of STS12"):
        load_sts_tasks(folder, ["STS12"])
    with pytest.raises(ValueError, match="unknown STS task STSB: choose from STS12"):
        load_sts_tasks(folder, ["STSB"])
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        load_sts_tasks(tmp_path / "nowhere")


def test_the_layout_of_the_hub(tmp_path, caplog):
    for name in ("sts12", "sts13", "sts14", "sts15", "sts16", "stsbenchmark", "sickr"):
        table = {"sentence1": ["a  b", "c"], "sentence2": ["d", "e"], "score": [1.0, 4.0]}
        parquet(tmp_path / f"{name}-sts", test=table)
    tasks = load_sts_tasks(tmp_path)
    assert tuple(task.name for task in tasks) == STS_TASKS
    assert all((task.sentences1, task.scores) == (["a b", "c"], [1, 4]) for task in tasks)
    assert tasks[0].places[1].endswith("split test, row 1")
    assert "2 pairs where the test set of SentEval has 4927" in caplog.text


def test_an_organisation_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="nobody/sts12-sts did not load from the hub"):
        load_sts_tasks("nobody")
