"""The commands of the search as a user types them."""

import csv
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from sentence_transformers import SentenceTransformer

from st_kdmcse import build_student
from st_kdmcse.cli.main import main
from st_kdmcse.cli.search import RESULT_COLUMNS
from st_kdmcse.cli.search_options import SizeType
from st_kdmcse.search import SemanticIndex

pytest.importorskip("faiss")

ARTICLES = """number,title,year,lang
a1,a dog runs on the beach,1999,en
a2,two dogs on snow,2004,en
a3,a woman sits on grass,2010,de
a4,,2011,en
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_bert):
    """Folder of a saved student."""
    folder = tmp_path_factory.mktemp("student") / "tiny-student"
    torch.manual_seed(0)
    build_student(str(tiny_bert)).to("cpu").save_pretrained(str(folder))
    return folder


@pytest.fixture
def articles(tmp_path):
    path = tmp_path / "articles.csv"
    path.write_text(ARTICLES)
    return path


@pytest.fixture
def index(tmp_path, model, articles):
    """Folder of an index of three articles."""
    result = run("index", "build", articles, "--model", model, "--out", tmp_path / "index", *COLUMNS)
    assert result.exit_code == 0, result.output
    return tmp_path / "index"


COLUMNS = ["--text-column", "title", "--id-column", "number"]


def run(*arguments, **settings):
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, [str(argument) for argument in arguments], **settings)


def fails(*arguments):
    """The error of a command that a user can mend: one line or a usage message, exit status 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


def results(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_build_says_what_was_done(tmp_path, model, articles):
    result = run("index", "build", articles, "--model", model, "--out", tmp_path / "new index", *COLUMNS)
    assert result.exit_code == 0, result.output
    assert f"3 texts of {articles} are in {tmp_path / 'new index'}" in result.stdout
    assert f"left out 1 without text, the first at {articles}, line 5" in result.stdout
    assert f"st-kdmcse search '{tmp_path / 'new index'}' \"a query\"" in result.stdout
    index = SemanticIndex.load(tmp_path / "new index")
    assert [(hit.text, hit.metadata) for hit in index.get(["a3"])] == [
        ("a woman sits on grass", {"year": 2010, "lang": "de"})
    ]


def test_build_with_options(tmp_path, model, sentences):
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(sentences))
    options = ["--factory", "IVF4,Flat", "--recall-target", "0.9", "--memory-limit", "1GiB"]
    assert run("index", "build", path, "--model", model, "--out", tmp_path / "index", *options).exit_code == 0
    info = json.loads(run("index", "info", tmp_path / "index", "--json").stdout)
    assert (info["factory"], info["rows"], info["checksums"]) == ("IVF4,Flat", 200, "ok")
    assert info["model"]["name"] == str(model)
    assert (info["tuning"]["source"], info["tuning"]["met"]) == ("rows", False)  # 20 queries show no recall of 0.9
    assert SemanticIndex.load(tmp_path / "index").get(["200"])[0].text == sentences[199]


def test_build_with_queries_to_tune_on(tmp_path, model, sentences):
    path, queries, out = tmp_path / "sentences.txt", tmp_path / "queries.txt", tmp_path / "index"
    path.write_text("\n".join(sentences))
    arguments = ["index", "build", path, "--model", model, "--out", out, "--factory", "IVF4,Flat"]
    assert "queries.txt" in fails(*arguments, "--tune-queries", queries)
    queries.write_text("\n")
    assert "queries.txt has no text" in fails(*arguments, "--tune-queries", queries)
    queries.write_text("\n".join(f"{each} again" for each in sentences))
    done = run(*arguments, "--tune-queries", queries, "--recall-target", "0.8")
    assert done.exit_code == 0, done.output
    shown = run("index", "info", out).stdout
    assert "with 99 % confidence) on 200 queries with nprobe" in shown
    assert "target 0.8: met" in shown


def test_search_is_that_of_the_index(index, model):
    found = results("search", index, "a", "dog", "-k", 2)
    expected = SemanticIndex.load(index, SentenceTransformer(str(model), device="cpu")).search("a dog", k=2)
    assert (found["query"], found["k"], found["filter"]) == ("a dog", 2, None)
    assert [(each["id"], each["text"], each["metadata"]) for each in found["results"]] == [
        (hit.id, hit.text, hit.metadata) for hit in expected
    ]
    assert [each["score"] for each in found["results"]] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    assert [each["rank"] for each in found["results"]] == [1, 2]


def test_filters(index):
    def ids(*conditions):
        filters = [part for condition in conditions for part in ("--filter", condition)]
        return {each["id"] for each in results("search", index, "a dog", *filters)["results"]}

    assert ids("lang=en") == {"a1", "a2"}
    assert ids("lang!=en") == {"a3"}
    assert ids("year>=2000", "year<2010") == {"a2"}
    assert ids('lang=["de", "fr"]') == {"a3"}
    assert ids("year=1999", "lang=en") == {"a1"}
    assert ids("year=2000") == set()
    assert "'year': there are numbers, and \"1999\" is not one of them" in fails(
        "search", index, "a dog", "--filter", 'year="1999"'
    )
    queries = index.parent / "queries.txt"
    queries.write_text("a dog\nsnow\n")
    assert "did you mean 'year'?" in fails(
        "search", index, "--queries", queries, "--out", index.parent / "results.csv", "--filter", "yaer>1"
    )
    assert not (index.parent / "results.csv").exists()
    assert "did you mean 'year'?" in run("search", index, "--filter", "yaer=1", input="a dog\n").stderr


def test_a_table_as_wide_as_the_terminal(tmp_path, model):
    long = "snow on the beach " * 40
    (tmp_path / "a.jsonl").write_text(
        "\n".join(map(json.dumps, [{"text": long, "n": 1}, {"text": "a \x1b[31mred\n ball \u202e", "n": None}]))
    )
    assert run("index", "build", tmp_path / "a.jsonl", "--model", model, "--out", tmp_path / "index").exit_code == 0
    output = run("search", tmp_path / "index", "snow").stdout
    assert output.splitlines()[0].split() == ["rank", "score", "id", "text"]
    assert max(map(len, output.splitlines())) <= 80
    assert "[n: 1]" in output
    assert re.search(r"  a \[31mred\n +ball\n", output), "its lines, without what would steer the terminal"
    assert output.count("beach") < 20
    assert "..." in output
    assert run("search", tmp_path / "index", "snow", "--filter", "n>1").stdout == "nothing found\n"


def test_the_prompt(index):
    result = run("search", index, "-k", 1, input="a dog\n\n   \nsnow\n")
    assert (result.exit_code, result.stdout.count("rank")) == (0, 2), result.output
    assert run("search", index, input="").exit_code == 0


def test_an_error_or_an_interruption_at_the_prompt(index, monkeypatch):
    answers = iter([ValueError("the first is wrong"), [[]], KeyboardInterrupt()])

    def search(self, queries, k=10, where=None):
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(SemanticIndex, "search", search)
    result = run("search", index, input="one\ntwo\nthree\nfour\n")
    assert (result.exit_code, result.stderr) == (0, "error: the first is wrong\n")
    assert result.stdout.split() == ["nothing", "found"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_file_of_queries(tmp_path, index, suffix):
    (tmp_path / "queries.tsv").write_text("key\ttext\nq1\ta dog\nq2\t\nq3\tsnow\n")
    out = tmp_path / f"results.{suffix}"
    result = run("search", index, "--queries", tmp_path / "queries.tsv", "--id-column", "key", "-k", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"4 results of 2 queries are in {out}" in result.stdout
    assert "left out 1 without text" in result.stdout
    if suffix == "parquet":
        rows = pq.read_table(out).to_pylist()
        assert pq.read_schema(out).equals(RESULT_COLUMNS)
    elif suffix == "csv":
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["query_id"], row["query"], int(row["rank"])) for row in rows] == [
        ("q1", "a dog", 1),
        ("q1", "a dog", 2),
        ("q3", "snow", 1),
        ("q3", "snow", 2),
    ]
    expected = results("search", index, "snow", "-k", 2)["results"]
    assert [row["id"] for row in rows[2:]] == [each["id"] for each in expected]
    assert [float(row["score"]) for row in rows[2:]] == pytest.approx([each["score"] for each in expected], abs=1e-5)
    metadata = rows[2]["metadata"]
    assert (metadata if suffix == "jsonl" else json.loads(metadata)) == expected[0]["metadata"]


def test_add_update_remove(tmp_path, index):
    new = tmp_path / "new.txt"
    new.write_text("a blue ball\nred grass\n")
    added = run("index", "add", index, new)
    assert added.exit_code == 0, added.output
    assert f"added 2 texts: 5 are in {index}" in added.stdout
    ids = added.stdout.split("their ids: ")[1].strip().split(", ")
    assert results("search", index, "a blue ball", "-k", 1)["results"][0]["id"] == ids[0]

    changed = tmp_path / "changed.csv"
    changed.write_text("number,title,year\na2,a small child,2020\n")
    assert "replaced 1 of the 5 texts" in run("index", "update", index, changed, *COLUMNS).stdout
    found = results("search", index, "a small child", "-k", 1)["results"][0]
    assert (found["id"], found["text"], found["metadata"]) == ("a2", "a small child", {"year": 2020})

    assert "removed 3 of 5 texts" in run("index", "remove", index, "a1", *ids).stdout
    assert {each["id"] for each in results("search", index, "a dog")["results"]} == {"a2", "a3"}


def test_what_cannot_be_changed_leaves_the_index_as_it_was(tmp_path, index, articles):
    before = (index / "manifest.json").read_bytes()
    assert "the id 'a1' is there already" in fails("index", "add", index, articles, *COLUMNS)
    assert "no row with the id '1999'" in fails("index", "update", index, articles, *COLUMNS[:3], "year")
    assert "--id-column is missing" in fails("index", "update", index, articles, *COLUMNS[:2])
    assert "no row with the id 'a9'" in fails("index", "remove", index, "a1", "a9")
    assert (index / "manifest.json").read_bytes() == before


def test_info(index, model):
    output = run("index", "info", index).stdout
    for line in ("engine     faiss", "factory    Flat", "rows       3", "dim        32", "checksums  ok"):
        assert line in output.splitlines()
    assert f"name {model}" in output
    vectors = next(index.glob("data-*/vectors.faiss"))
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"\xff")
    assert "vectors.faiss was altered" in fails("index", "info", index)
    assert "vectors.faiss was altered" in fails("index", "verify", index)


def test_an_index_that_stays_on_disk(tmp_path, model, sentences):
    path, out = tmp_path / "sentences.txt", tmp_path / "index"
    path.write_text("\n".join(sentences))
    arguments = ["index", "build", path, "--model", model, "--out", out, "--mmap", "--factory"]
    assert "with --mmap take IVF" in fails(*arguments, "HNSW8")
    assert run(*arguments, "IVF4,PQ16x4fs,RFlat").exit_code == 0
    assert "on disk, memory-mapped" in run("index", "info", out).stdout
    assert f"every byte of {out} is as it was written: 200 texts" in run("index", "verify", out).stdout
    assert sentences[3] in run("search", out, sentences[3], "--mmap").stdout
    for command in (["index", "add", out, path], ["index", "remove", out, "1"], ["search", out, "a", "--no-mmap"]):
        assert "was built to stay on disk" in fails(*command)


def test_compact(index):
    assert "left out 0 vectors" in run("index", "compact", index).stdout
    before = (index / "manifest.json").read_bytes()
    assert run("index", "remove", index, "a1").exit_code == 0
    assert "removed    1" in run("index", "info", index).stdout
    assert "left out 1 vectors of texts that are gone" in run("index", "compact", index).stdout
    assert "removed    0" in run("index", "info", index).stdout
    assert (index / "manifest.json").read_bytes() != before
    assert SemanticIndex.load(index).get(["a3"])[0].text == "a woman sits on grass"
    assert "Milvus compacts by itself" in fails("index", "compact", "milvus://localhost/wiki")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FILE": "articels.csv"}, "articels.csv does not exist: give a file of texts"),
        ({"--text-column": "titel"}, "no column 'titel'; choose a text column of 'number', 'title', 'year', 'lang'"),
        ({"--id-column": "id"}, "no column 'id'"),
        ({"--metadata": "year,language"}, "no column 'language' for the metadata"),
        ({"--id-column": "lang"}, "line 3: the id 'en' is that of line 2 too"),
        ({"--model": "./modle"}, "no model folder ./modle"),
        ({"--memory-limit": "much"}, "'much' is not a size, such as 4GiB or 512MiB"),
        ({"--recall-target": "95"}, "95.0 is not in the range"),
        ({"--factory": "IVF"}, "'IVF'"),
        ({"--out": "milvus://host"}, "collection"),
        ({"--out": "file:///index"}, "is not an address of an index"),
    ],
)
def test_typos_leave_nothing(tmp_path, articles, model, change, message):
    options = {"FILE": articles, "--model": model, "--out": tmp_path / "index", **dict([COLUMNS[:2], COLUMNS[2:]])}
    options |= change
    file = options.pop("FILE")
    assert message in fails("index", "build", file, *[part for item in options.items() for part in item])
    assert not (tmp_path / "index").exists()


def test_an_empty_row_is_refused_on_demand(tmp_path, articles, model):
    error = fails("index", "build", articles, "--model", model, "--out", tmp_path / "i", *COLUMNS, "--refuse-empty")
    assert f"{articles}, line 5: there is no text" in error


def test_searches_that_cannot_be(tmp_path, index):
    queries = tmp_path / "queries.txt"
    queries.write_text("a dog\n")
    assert f"there is no index at {tmp_path / 'idnex'}" in fails("search", tmp_path / "idnex", "a dog")
    assert "the query is empty" in fails("search", index, " ")
    assert "-k" in fails("search", index, "a dog", "-k", 0)
    assert "--queries goes with --out FILE" in fails("search", index, "--queries", queries)
    assert "--queries goes with" in fails("search", index, "a dog", "--queries", queries, "--out", "a.csv")
    assert "go with --queries FILE" in fails("search", index, "a dog", "--out", tmp_path / "a.csv")
    assert "a.xlsx is to be written as which format?" in fails(
        "search", index, "--queries", queries, "--out", tmp_path / "a.xlsx"
    )
    assert "'year'" in fails("search", index, "a dog", "--filter", "year")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".xlsx"] == []


def test_odd_input_has_an_error_of_one_line(tmp_path, index, model, monkeypatch):
    assert "query 0 is not valid UTF-8" in fails("search", index, b"a \xff dog".decode(errors="surrogateescape"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "a dog"}\n{"text": "half \\ud800"}\n')
    error = fails("index", "build", "texts.jsonl", "--model", model, "--out", "new")
    assert "texts.jsonl, line 2: half of a surrogate pair" in error
    assert "texts.jsonl, line 2" in fails("index", "add", index, "texts.jsonl")
    assert "texts.jsonl, line 2" in fails("duplicates", "texts.jsonl", "--model", model)
    assert "texts.jsonl, line 2" in fails("search", index, "--queries", "texts.jsonl", "--out", "a.csv")
    (tmp_path / "here").mkdir()
    (tmp_path / "texts.txt").write_text("a dog\nsnow\n")
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "../here"):
        assert run("index", "build", "../texts.txt", "--model", model, "--out", out).exit_code == 0
        assert len(SemanticIndex.load(tmp_path / "here")) == 2
        shutil.rmtree(tmp_path / "here" / next((tmp_path / "here").glob("data-*")).name)
        (tmp_path / "here" / "manifest.json").unlink()
    assert "something else in it" in fails("index", "build", "../texts.txt", "--model", model, "--out", "..")
    assert "cannot be an index" in fails("index", "build", "../texts.txt", "--model", model, "--out", "/")


def test_queries_without_any_input(index):
    command = [sys.executable, "-m", "st_kdmcse", "search", str(index)]
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    done = subprocess.run(closed, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "error: there is no input to read queries from: give a query" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_build_goes_on(tmp_path, index, articles, model, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    arguments = ["index", "build", articles, "--model", model, "--out", tmp_path / "again", *COLUMNS]
    with monkeypatch.context() as patched:
        patched.setattr("st_kdmcse.search.storage.build_faiss", interrupted)
        result = run(*arguments)
    assert (result.exit_code, "the same command goes on from there" in result.stderr) == (130, True), result.output
    assert not (tmp_path / "again").exists()
    with monkeypatch.context() as patched:
        patched.setattr("st_kdmcse.search.build.encode_documents", interrupted)
        result = run(*arguments)
    assert result.exit_code == 0, "all was encoded before"
    assert results("search", tmp_path / "again", "a dog") == results("search", index, "a dog")


def test_duplicates(tmp_path, model):
    path = tmp_path / "texts.txt"
    path.write_text("a dog runs\nsnow on grass\na dog runs\n\n")
    shown = run("duplicates", path, "--model", model, "--threshold", 1)
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert [line.split() for line in lines[1:3]] == [["1", "1.0000", "1", "a", "dog", "runs"], "3 a dog runs".split()]
    assert lines[3] == "3 texts, 1 equal an earlier one; 1 pairs score 1.0 or more"
    assert lines[4].startswith("left out 1 without text")
    out = tmp_path / "pairs.csv"
    written = run("duplicates", path, "--model", model, "--threshold", 0.1, "--limit", 1, "--out", out)
    assert written.exit_code == 0, written.output
    assert f"of which the best 1 are kept (--limit); they are in {out}" in written.stdout
    assert out.read_text() == "id1,id2,score,text1,text2\n1,3,1.0,a dog runs,a dog runs\n"
    assert "is what is read" in fails("duplicates", out, "--text-column", "text1", "--model", model, "--out", out)
    assert "0<x<=1" in fails("duplicates", path, "--model", model, "--threshold", 2)
    path.write_text("a dog runs\n")
    assert run("duplicates", path, "--model", model).stdout.startswith("no duplicates\n")


def test_milvus(tmp_path, articles, model, monkeypatch):
    pytest.importorskip("milvus_lite")
    monkeypatch.chdir(tmp_path)
    address = "milvus:lite.db?collection=articles"
    build = ["index", "build", articles, "--model", model, "--out", address, *COLUMNS]
    first = run(*build)
    assert first.exit_code == 0, first.output
    assert f"st-kdmcse search '{address}'" in first.stdout
    SemanticIndex.open(address, str(model)).remove(["a3"])  # as if it had been interrupted before it
    assert run(*build).exit_code == 0
    found = results("search", address, "a woman sits on grass", "--filter", "year>=2000")["results"]
    assert [(found[0]["id"], found[0]["metadata"]["year"]), found[1]["id"]] == [("a3", 2010), "a2"]
    info = json.loads(run("index", "info", address, "--json").stdout)
    assert (info["engine"], info["rows"]) == ("milvus-lite", 3)
    (tmp_path / "new.txt").write_text("a blue ball\n")
    assert "there are other texts in that collection" in fails(
        "index", "build", tmp_path / "new.txt", "--model", model, "--out", address
    )
    assert "not for Milvus" in fails(*build, "--factory", "Flat")
    assert f"added 1 texts: 4 are in {address}" in run("index", "add", address, tmp_path / "new.txt").stdout
    assert "removed 1 of 4 texts" in run("index", "remove", address, "a1").stdout


def test_sizes():
    convert = SizeType().convert
    assert [convert(text, None, None) for text in ("4GiB", "512 MB", "1.5k", "100", "2t")] == [
        4 << 30,
        512 << 20,
        1536,
        100,
        2 << 40,
    ]


def test_images_are_indexed_and_found(tmp_path, student, tiny_multimodal, photos):
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in photos:
        shutil.copy(photo, folder)
    made = run("index", "images", folder, "--model", tiny_multimodal, "--out", tmp_path / "index")
    assert made.exit_code == 0, made.output
    assert f"12 images of {folder} are in {tmp_path / 'index'}" in made.stdout
    found = json.loads(run("search", tmp_path / "index", "a dog", "-k", "3", "--json").stdout)
    assert {each["id"] for each in found["results"]} <= {photo.name for photo in photos}
    found = json.loads(run("search", tmp_path / "index", "--image", photos[4], "-k", "2", "--json").stdout)
    assert found["image"] == str(photos[4])
    assert (found["results"][0]["id"], found["results"][0]["score"]) == (photos[4].name, pytest.approx(1, abs=1e-5))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for arguments, message in (
        (["search", tmp_path / "index", "--image", tmp_path / "broken.jpg"], "broken.jpg cannot be decoded"),
        (["search", tmp_path / "index", "--image", tmp_path / "none.jpg"], "none.jpg does not exist"),
        (["search", tmp_path / "index", "a dog", "--image", photos[0]], "--image goes without a query"),
        (["index", "images", folder, "--images", folder, "--model", "x", "--out", "y"], "is none"),
    ):
        refused = run(*arguments)
        assert (refused.exit_code, message in refused.stderr) == (2, True), refused.output
    student.save_pretrained(str(tmp_path / "model"))
    refused = run("index", "images", folder, "--model", tmp_path / "model", "--out", tmp_path / "other")
    assert refused.exit_code == 2
    assert "encodes no images: make one of sentences and images of its run with st-kdmcse export" in refused.stderr
    run("index", "build", write_lines(tmp_path, "a dog"), "--model", tmp_path / "model", "--out", tmp_path / "texts")
    refused = run("search", tmp_path / "texts", "--image", photos[0])
    assert "the model of this index encodes no images" in refused.stderr


def write_lines(folder, *lines):
    (folder / "lines.txt").write_text("\n".join(lines) + "\n")
    return folder / "lines.txt"


def test_a_model_that_has_gone_can_be_named_anew(tmp_path, student):
    student.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "a.txt").write_text("a dog\na cat\n")
    run("index", "build", tmp_path / "a.txt", "--model", tmp_path / "model", "--out", tmp_path / "index")
    (tmp_path / "model").rename(tmp_path / "moved")
    refused = run("search", tmp_path / "index", "a dog")
    assert refused.exit_code == 2
    assert f"was made with the model {tmp_path / 'model'}, which could not be loaded" in refused.stderr
    assert "--model" in refused.stderr
    assert run("search", tmp_path / "index", "a dog", "--model", tmp_path / "moved").exit_code == 0


def test_texts_are_encoded_in_the_precision_that_is_asked_for(tmp_path, model, sentences, bfloat16):
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(f"{sentence} {row}" for row, sentence in enumerate(sentences * 2)))
    vectors = {}
    for given, computed in (("auto", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        out = tmp_path / given
        result = run("index", "build", path, "--model", model, "--out", out, "--precision", given)
        assert result.exit_code == 0, result.output
        assert f"precision   {computed}" in re.sub(" +", " " * 3, run("index", "info", out).stdout)
        opened = SemanticIndex.load(out)
        vectors[given] = opened.backend.index.reconstruct_n(0, len(opened))
    assert np.array_equal(vectors["auto"], vectors["bfloat16"])
    assert 1e-6 < np.abs(vectors["auto"] - vectors["float32"]).max() < 0.05
    for given in ("float32", "bfloat16"):
        assert results("search", tmp_path / "auto", sentences[0], "--precision", given)["results"]
        result = run("duplicates", path, "--model", model, "--threshold", "0.999", "--precision", given)
        assert result.exit_code == 0, result.output
    more = tmp_path / "more.txt"
    more.write_text("a red ball\n")
    assert run("index", "add", tmp_path / "auto", more, "--precision", "bfloat16").exit_code == 0
    assert "precision" in run("index", "info", tmp_path / "auto").stdout
