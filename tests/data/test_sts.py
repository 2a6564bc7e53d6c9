import pandas as pd
import pytest

from st_kdmcse.data.sts import load_sts_benchmark

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
    (tmp_path / root / "sts-dev.csv").write_text(ROW.format(score=2.5, one="a", two="b"))
    assert load_sts_benchmark(tmp_path, "dev").scores == [2.5]


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
    ],
)
def test_malformed_rows_are_named(senteval, row, message):
    folder = senteval(ROW.format(score=1, one="a", two="b"), row)
    with pytest.raises(ValueError, match=rf"sts-dev.csv, line 2: {message}"):
        load_sts_benchmark(folder, "dev")


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
    return {"sentence1": ["a"] * len(scores), "sentence2": ["b"] * len(scores), "score": scores}


def test_parquet_folder(tmp_path):
    folder = parquet(
        tmp_path / "stsb",
        train=pairs_table(0.0, 2.5, 5.0),
        validation={"sentence1": ["one", "two"], "sentence2": ["eins", "zwei"], "score": [0.5, 1.0]},
        test=pairs_table(0.2),
    )
    dev = load_sts_benchmark(folder, "dev")
    assert (dev.sentences1, dev.sentences2, dev.scores, dev.name) == (
        ["one", "two"],
        ["eins", "zwei"],
        [2.5, 5.0],
        "sts-dev",
    )
    assert load_sts_benchmark(str(folder), "test").scores == [1.0]
    assert load_sts_benchmark(folder, "train").scores == [0.0, 2.5, 5.0]


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
