import csv
import gzip
import logging
import multiprocessing
import pickle
import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from datasets import config as datasets_config
from hypothesis import given, settings
from hypothesis import strategies as st

from st_kdmcse.data import lines as lines_module
from st_kdmcse.data import sentences as sentences_module
from st_kdmcse.data import tables as tables_module
from st_kdmcse.data.sentences import iter_sentences, read_sentences


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The default cache, empty."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", folder)
    return folder / "st_kdmcse"


def write(tmp_path, content, name="text.txt"):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def write_table(tmp_path, columns, **options):
    path = tmp_path / "table.parquet"
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


def the_file(folder):
    (file,) = folder.glob("*.arrow")
    return file


def test_real_sentences(shared_data):
    path = shared_data / "wiki" / "wiki_sentences.txt"
    dataset = read_sentences(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert dataset.column_names == ["sentence"]
    assert dataset["sentence"][:] == [line.strip() for line in lines if line.strip()]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"one\rtwo\r", ["one", "two"]),
        (b"one\r\n\rtwo\rthree\nfour", ["one", "two", "three", "four"]),
        (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
        (b"\xef\xbb\xbf\none\n", ["one"]),
        (b"\n  \none\n\t\r\n\ntwo\n\n", ["one", "two"]),
        (b"  two  words \t\n", ["two  words"]),
        ("Zürich, 犬\u2028x\n".encode(), ["Zürich, 犬\u2028x"]),
        (b'a "quoted", text\tand a tab\n', ['a "quoted", text\tand a tab']),
    ],
)
def test_lines(tmp_path, content, expected):
    assert read_sentences(write(tmp_path, content))["sentence"][:] == expected


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0\t,;|[{"))),
    end=st.sampled_from("\n \r\n"),
)
def test_text_is_kept_apart_from_surrounding_whitespace(tmp_path_factory, lines, end):
    path = write(
        tmp_path_factory.mktemp("text"), "".join(f"{line}{end.strip(' ') or ' '}\n" for line in lines).encode()
    )
    expected = [line.removeprefix("\ufeff") if row == 0 else line for row, line in enumerate(lines)]
    expected = [line.strip() for line in expected if line.strip()]
    if expected:
        assert read_sentences(path)["sentence"][:] == expected
    else:
        with pytest.raises(ValueError, match="has no sentence"):
            read_sentences(path)


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_many_chunks(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sentences_module, "_CHUNK_ROWS", 4)
    for rows in (3, 4, 5, 8, 11):
        lines = [f"sentence {row}" for row in range(rows)]
        dataset = read_sentences(write(tmp_path, "\n".join(lines).encode(), name))
        assert dataset["sentence"][:] == lines
        assert max(map(len, dataset.data.column("sentence").chunks)) <= 4


def test_blank_lines_are_counted_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger=sentences_module.__name__)
    read_sentences(write(tmp_path, b"one\n\n \ntwo\n"))
    assert "text.txt: skipped 2 blank lines" in caplog.text


def test_memory_is_about_the_size_of_the_text(tmp_path):
    line = b"A sentence of about one hundred and twenty characters, as they are in an encyclopaedia that is on the web."
    path = write(tmp_path, (line + b"\n") * 150_000)
    before = pa.total_allocated_bytes()
    dataset = read_sentences(path)
    assert len(dataset) == 150_000
    assert pa.total_allocated_bytes() - before < 1.2 * path.stat().st_size


def test_pickle(tmp_path):
    dataset = read_sentences(write(tmp_path, b"one\ntwo\n"))
    assert pickle.loads(pickle.dumps(dataset))["sentence"][:] == ["one", "two"]


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\t\r\n", b"\xef\xbb\xbf"])
def test_no_sentence(tmp_path, content):
    with pytest.raises(ValueError, match=r"text\.txt has no sentence"):
        read_sentences(write(tmp_path, content))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.txt"):
        read_sentences(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="is a folder"):
        read_sentences(tmp_path)


def test_other_encodings_name_the_line_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"text\.txt, line 3: not UTF-8 .*byte 1 .*iconv -f latin-1 -t utf-8"):
        read_sentences(write(tmp_path, "one\ntwo\nZürich\n".encode("latin-1")))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_names_the_remedy(tmp_path, encoding):
    with pytest.raises(ValueError, match=r"line 1: a NUL byte.*iconv -f utf-16"):
        read_sentences(write(tmp_path, "one\ntwo\n".encode(encoding)))


def test_binary_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="line 2: a NUL byte"):
        read_sentences(write(tmp_path, b"fine\nnot\0fine\n"))


def test_lines_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "_LINE_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="line 2: more than 1 MiB without a line end"):
        read_sentences(write(tmp_path, b"fine\n" + b"a" * (1 << 21)))


# Compressed text, and what is too long for memory


def test_a_large_file_becomes_a_memory_mapped_one_in_bounded_chunks(tmp_path, cache):
    lines = [f"sentence {row} of some length" for row in range(300_000)]
    dataset = read_sentences(write(tmp_path, "\n".join(lines).encode(), "text.txt.gz"))
    assert dataset["sentence"][:] == lines
    assert [file["filename"] for file in dataset.cache_files] == [str(the_file(cache))]
    sizes = [batch.num_rows for batch in pa.ipc.open_stream(the_file(cache))]
    assert sizes == [65_536] * 4 + [300_000 - 4 * 65_536]


def test_chunks_of_long_sentences_are_bounded_too(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(sentences_module, "_CHUNK_CHARACTERS", 1000)
    lines = ["a" * 400] * 10
    assert read_sentences(write(tmp_path, "\n".join(lines).encode(), "text.gz"))["sentence"][:] == lines
    assert [batch.num_rows for batch in pa.ipc.open_stream(the_file(cache))] == [3, 3, 3, 1]


def test_memory_does_not_grow_with_the_file(tmp_path):
    line = (
        b"A sentence of about one hundred and twenty characters, as they are in an encyclopaedia that is on the web.\n"
    )
    path = write(tmp_path, line * 300_000, "text.gz")
    before = pa.total_allocated_bytes()
    dataset = read_sentences(path)
    assert len(dataset) == 300_000
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_small_text_leaves_nothing_behind(tmp_path, cache):
    read_sentences(write(tmp_path, b"one\n"))
    assert not cache.exists()


def test_the_cache_is_used_again_and_follows_the_content(tmp_path, cache):
    first = read_sentences(write(tmp_path, b"one\ntwo\n", "a.gz"))
    before = the_file(cache).stat()
    again = read_sentences(tmp_path / "a.gz")
    assert again["sentence"][:] == ["one", "two"]
    assert (the_file(cache).stat().st_mtime_ns, the_file(cache).stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    changed = read_sentences(write(tmp_path, b"one\nthree\n", "a.gz"))
    assert changed["sentence"][:] == ["one", "three"]
    assert first["sentence"][:] == ["one", "two"]


def test_the_cache_follows_the_options(tmp_path):
    path = write_table(tmp_path, {"a": ["x", "x", "y"], "b": ["p", "q", "q"]})
    for column, deduplicate, expected in (
        ("a", False, ["x", "x", "y"]),
        ("a", True, ["x", "y"]),
        ("b", False, ["p", "q", "q"]),
        ("b", True, ["p", "q"]),
        ("a", False, ["x", "x", "y"]),
    ):
        dataset = read_sentences(path, column, deduplicate, tmp_path / "here")
        assert dataset["sentence"][:] == expected
    assert len(list((tmp_path / "here").glob("*.arrow"))) == 4


@pytest.mark.parametrize("name", ["text.txt", "text.gz"])
def test_the_fingerprint_depends_on_content_and_options_alone(tmp_path, name):
    content = b"one\ntwo\none\n"
    fingerprints = set()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = write(tmp_path / folder, content, name)
        if folder == "b":
            path.write_bytes((tmp_path / "a" / name).read_bytes())
        fingerprints.add(read_sentences(path, cache_dir=tmp_path / folder)._fingerprint)
    assert len(fingerprints) == 1
    fingerprints.add(read_sentences(path, deduplicate=True)._fingerprint)
    fingerprints.add(read_sentences(write(tmp_path, content + b"three\n", name))._fingerprint)
    assert len(fingerprints) == 3


def truncations(whole):
    """Cut off within a batch, between batches, within the end mark, and completely."""
    return [whole[: len(whole) // 2], whole[:-8], whole[:-3], whole[:5], b""]


def test_a_truncated_cache_is_written_again(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(sentences_module, "_CHUNK_ROWS", 4)
    lines = [f"sentence {row}" for row in range(20)]
    path = write(tmp_path, "\n".join(lines).encode(), "text.gz")
    read_sentences(path)
    whole = the_file(cache).read_bytes()
    for damaged in truncations(whole):
        the_file(cache).write_bytes(damaged)
        assert read_sentences(path)["sentence"][:] == lines
        assert the_file(cache).read_bytes() == whole


def test_a_foreign_cache_is_written_again(tmp_path, cache):
    path = write(tmp_path, b"one\ntwo\n", "text.gz")
    read_sentences(path)
    for table in (pa.table({"sentence": ["other"]}), pa.table({"number": [1]})):
        with pa.ipc.new_stream(the_file(cache), table.schema) as stream:
            stream.write_table(table)
        assert read_sentences(path)["sentence"][:] == ["one", "two"]
    the_file(cache).write_bytes(b"no Arrow at all" * 10)
    assert read_sentences(path)["sentence"][:] == ["one", "two"]


def test_two_processes_at_once(tmp_path, cache):
    lines = [f"sentence {row}" for row in range(100_000)]
    path = write(tmp_path, "\n".join(lines).encode(), "text.gz")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_sentences, args=(path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert Dataset.from_file(str(the_file(cache)))["sentence"][:] == lines


def test_a_bad_line_leaves_no_cache(tmp_path, cache):
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read_sentences(write(tmp_path, b"one\n\xff\n", "text.gz"))
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    path = write(tmp_path, b"one\n", "text.gz")
    with pytest.raises(ValueError, match=r"cache .*text\.gz.*give another `cache_dir`, or set HF_DATASETS_CACHE"):
        read_sentences(path, cache_dir=path)


def test_a_full_disk_is_named_and_nothing_stays(tmp_path, cache):
    path = write(tmp_path, b"a sentence\n" * 300_000, "text.gz")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ValueError, match="cannot be written to the cache .*File too large"):
            read_sentences(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(cache.iterdir()) == []


def test_pickle_of_a_memory_mapped_dataset_holds_no_text(tmp_path):
    pickled = pickle.dumps(read_sentences(write(tmp_path, b"a sentence\n" * 100_000, "text.gz")))
    assert len(pickled) < 10_000
    assert pickle.loads(pickled)["sentence"][-1] == "a sentence"


@pytest.mark.parametrize("kept", [0.3, 0.99])
def test_a_truncated_gzip_file_is_named(tmp_path, kept):
    path = write(tmp_path, "\n".join(str(row) for row in range(50_000)).encode(), "text.gz")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(
        ValueError, match=r"text\.gz is cut off, damaged or no gzip file .*download or compress it again"
    ):
        read_sentences(path)


def test_a_damaged_gzip_file_is_named(tmp_path):
    path = write(tmp_path, "\n".join(str(row) for row in range(50_000)).encode(), "text.gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.gz is cut off, damaged or no gzip file"):
        read_sentences(path)


@pytest.mark.parametrize("content", [b"\x1f\x8bplain text\n", gzip.compress(b"one\n", mtime=0) + b"garbage"])
def test_a_file_that_is_no_gzip_is_named(tmp_path, content):
    path = tmp_path / "text.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.gz is cut off, damaged or no gzip file"):
        read_sentences(path)


def test_gzip_of_several_members(tmp_path):
    path = tmp_path / "text.GZ"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfone\ntw") + gzip.compress(b"o\r\nthree"))
    assert read_sentences(path)["sentence"][:] == ["one", "two", "three"]


# Tables


TYPES = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_a_column_of_a_table(tmp_path, kind):
    table = pa.table({"id": [1, 2, 3], "caption": pa.array(["one", ' Zürich, 犬\n"2" ', "one"], kind)})
    dataset = read_sentences(write_table(tmp_path, table))
    assert dataset["sentence"][:] == ["one", 'Zürich, 犬\n"2"', "one"]
    assert dataset.features["sentence"].dtype == "string"


def test_missing_and_blank_rows_are_counted_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger=sentences_module.__name__)
    path = write_table(tmp_path, {"text": ["one", None, "", " \n", "two"]})
    assert read_sentences(path)["sentence"][:] == ["one", "two"]
    assert "table.parquet: skipped 3 blank rows" in caplog.text


@pytest.mark.parametrize(
    ("columns", "asked", "expected"),
    [
        ({"n": [1], "anything": ["a"]}, None, "a"),
        ({"text": ["a"], "other": ["b"]}, None, "a"),
        ({"text": ["a"], "sentence": ["b"]}, None, "b"),
        ({"text": ["a"], "other": ["b"]}, "other", "b"),
        ({"text": [1], "a.b": ["a"]}, None, "a"),
    ],
)
def test_which_column(tmp_path, columns, asked, expected):
    assert read_sentences(write_table(tmp_path, columns), column=asked)["sentence"][:] == [expected]


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        ({"a": ["x"], "b": ["y"]}, None, r"not clear; .*strings: 'a', 'b'; others: none"),
        ({"n": [1], "m": [0.5]}, None, r"not clear; .*strings: none; others: 'n', 'm'"),
        ({"a": ["x"], "n": [1]}, "b", r"no column 'b' of strings; .*strings: 'a'; others: 'n'"),
        ({"a": ["x"], "n": [1]}, "n", r"no column 'n' of strings"),
        ({"a": [["x"]]}, "a", r"no column 'a' of strings; .*strings: none; others: 'a'"),
    ],
)
def test_columns_are_listed_where_none_fits(tmp_path, columns, asked, message):
    with pytest.raises(ValueError, match=rf"table\.parquet: .*{message}"):
        read_sentences(write_table(tmp_path, columns), column=asked)


TABLES = {
    "csv": b'id,text\n1,"one, 1"\n2,\n3,two\n',
    "tsv": b"id\ttext\n1\tone, 1\n2\t\n3\ttwo\n",
    "jsonl": b'{"id": 1, "text": "one, 1"}\n{"id": 2, "text": null}\n{"text": "two"}\n',
    "json": b'[{"id": 1, "text": "one, 1"},\n  {"id": 2},\n {"text": "two"}]',
}


@pytest.mark.parametrize(
    "name", [*(f"a.{name}" for name in TABLES), *(f"a.{name}.gz" for name in TABLES), "lines.json"]
)
def test_tables_of_text(tmp_path, name):
    content = TABLES["jsonl"] if name == "lines.json" else TABLES[name.split(".")[1]]
    path = write(tmp_path, content, name)
    for column in (None, "text"):
        assert read_sentences(path, column)["sentence"][:] == ["one, 1", "two"]
    with pytest.raises(ValueError, match=r"no column 'texts' of strings; name one as `text_column`\. .*'text'"):
        read_sentences(path, "texts")


def test_the_columns_of_simcse_are_named(tmp_path):
    path = write(tmp_path, b"sent0,sent1,hard_neg\nA dog.,An animal.,A cat.\n", "nli_for_simcse.csv")
    with pytest.raises(ValueError, match="not clear; .*'sent0', 'sent1', 'hard_neg'"):
        read_sentences(path)
    assert read_sentences(path, "sent0")["sentence"][:] == ["A dog."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sent0,sent1,hard_neg\nA dog.,An animal.,A cat.\n", "a table with columns separated by commas"),
        (b"A dog.\tAn animal.\nA cat.\tA pet.\nA cow.\tFood.\n", "a table with columns separated by tabs"),
        (b'[\n  {"text": "a"}\n]\n', "looks like JSON: name it"),
        (b'{"text": "a"}\n{"text": "b"}\n', "looks like JSON: name it"),
        (pickle.dumps(["one", "two"]), "is a pickle, no text"),
        (b"PK\x03\x04" + bytes(100), "is a zip archive"),
        (b"<!DOCTYPE html>\n<p>one\n", "is a web page, no text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a pointer of Git LFS"),
        (b"name".ljust(257, b"\0") + b"ustar".ljust(300, b"\0"), "is a tar archive"),
    ],
)
@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_what_is_no_text_is_refused_whatever_its_name(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_sentences(write(tmp_path, content, name))


@pytest.mark.parametrize(
    "content", [b"Yes, no\nYes, yes\n", b"[1] See there.\nA dog, a cat.\n", b"{a dog}\n", b"Yes,no\nAnd so on.\n"]
)
def test_text_with_separators_and_brackets_is_text(tmp_path, content):
    assert read_sentences(write(tmp_path, content))["sentence"][:] == content.decode().splitlines()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1]", r"a\.json, item 1: 1 is no JSON object"),
        ("a.json", b'[{"text": "a"}, {"text": 2}]', r"a\.json, item 2: 'text' is 2, no text"),
        ("a.json", b'[{"text": "a"}, {"te', "not whole, valid JSON"),
        ("a.json", b'{"text": ["a"],\n"n": 1}', "neither a JSON list of objects nor JSON lines"),
        ("a.json", b'[{"text": "a"},' + b"[" * 60_000, "nested more than 100 deep"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ["b"]}\n', r"a\.jsonl, line 2: 'text' is \['b'\], no text"),
        ("a.csv", b"id\ttext\n1\ta\n", "line 1: 'id.ttext' is separated by tabs, not commas: name it .tsv"),
        ("a.tsv", b"id,text\n1,a\n", "is separated by commas, not tabs: name it .csv"),
        ("a.csv", b'text\n"a\nb\n', r"line 2: a quote \(\"\) is opened there and not closed"),
        ("a.csv", b"text\n" + b"a" * 100 + b"\n", "line 2: a field of more than 50 characters"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(tables_module, "_FIELD_CHARACTERS", 50)
    before = csv.field_size_limit(50)
    try:
        with pytest.raises(ValueError, match=message):
            read_sentences(write(tmp_path, content, name))
    finally:
        csv.field_size_limit(before)


def test_a_text_file_has_no_columns(tmp_path):
    with pytest.raises(ValueError, match=r"text\.txt is read as text and has no column 'text'"):
        read_sentences(write(tmp_path, b"one\n"), column="text")


def test_a_table_without_sentences(tmp_path):
    for values in ([], [None, " "]):
        with pytest.raises(ValueError, match="all its rows are blank"):
            read_sentences(write_table(tmp_path, {"text": pa.array(values, pa.string())}))


def test_a_row_that_is_not_utf_8_is_named(tmp_path):
    values = pa.array([b"one", b"two", b"Z\xfcrich"]).view(pa.string())
    with pytest.raises(ValueError, match=r"table\.parquet, row 2, column 'text': not UTF-8"):
        read_sentences(write_table(tmp_path, pa.table({"text": values})))


def test_a_damaged_table_is_named(tmp_path):
    path = write_table(tmp_path, {"text": [f"sentence {row}" for row in range(10_000)]}, write_page_checksum=True)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    for damaged in (whole[:4], whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"table\.parquet is damaged or cannot be read .*write it again"):
            read_sentences(path)


def test_many_row_groups_and_batches(tmp_path):
    lines = [f"sentence {row}" for row in range(30_000)]
    for row_group_size in (1_000, 30_000):
        path = write_table(tmp_path, {"text": lines}, row_group_size=row_group_size)
        assert read_sentences(path)["sentence"][:] == lines


# Options that all formats share


@pytest.mark.parametrize("name", ["text.txt", "text.gz"])
def test_deduplication_keeps_the_first(tmp_path, caplog, name):
    caplog.set_level(logging.INFO, logger=sentences_module.__name__)
    path = write(tmp_path, b"two\none\n two \n\nOne\none\nthree", name)
    assert read_sentences(path)["sentence"][:] == ["two", "one", "two", "One", "one", "three"]
    assert read_sentences(path, deduplicate=True)["sentence"][:] == ["two", "one", "One", "three"]
    assert f"{name}: left out 2 repeated sentences" in caplog.text


def test_iter_sentences_is_the_same_without_a_cache(tmp_path, cache):
    content = b"\xef\xbb\xbfone\r\n\n two\none\n"
    for path in (write(tmp_path, content), write(tmp_path, content, "text.gz")):
        assert list(iter_sentences(path)) == ["one", "two", "one"]
        assert list(iter_sentences(path, deduplicate=True)) == ["one", "two"]
    table = write_table(tmp_path, {"a": ["one", None, "two"], "b": ["x", "y", "z"]})
    assert list(iter_sentences(table, column="b")) == ["x", "y", "z"]
    assert not cache.exists()


def test_iter_sentences_streams_and_checks_the_path_at_once(tmp_path):
    sentences = iter_sentences(write(tmp_path, b"one\n\xff\n"))
    assert next(sentences) == "one"
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        next(sentences)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gz"):
        iter_sentences(tmp_path / "nowhere.gz")
    with pytest.raises(ValueError, match="all its lines are blank"):
        list(iter_sentences(write(tmp_path, b"\n")))


@pytest.mark.parametrize("name", ["text.txt", "text.gz", "table.parquet"])
def test_progress(tmp_path, capsys, name):
    lines = [f"sentence {row}" for row in range(100_000)]
    if name == "table.parquet":
        path = write_table(tmp_path, {"text": lines})
    else:
        path = write(tmp_path, "\n".join(lines).encode(), name)
    read_sentences(path, cache_dir=tmp_path / "hidden", show_progress_bar=False)
    assert capsys.readouterr().err == ""
    read_sentences(path, cache_dir=tmp_path / "shown", show_progress_bar=True)
    shown = capsys.readouterr().err
    assert f"Checksum of {name}: 100%" in shown
    assert f"Reading {name}: 100%" in shown


@pytest.mark.parametrize("name", ["text.pq", "text.parquet", "text.gz", "text.txt", "text"])
@pytest.mark.parametrize("kind", ["plain", "gzip", "parquet"])
def test_the_content_tells_what_a_file_is_not_its_name(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "parquet":
        pq.write_table(pa.table({"sentence": ["one", "two"]}), path)
    else:
        path.write_bytes(gzip.compress(b"one\ntwo\n") if kind == "gzip" else b"one\ntwo\n")
    assert read_sentences(path)["sentence"][:] == ["one", "two"]
    assert list(iter_sentences(path)) == ["one", "two"]


def test_a_flipped_bit_in_the_cache_is_noticed(tmp_path, cache):
    path = write(tmp_path, b"one\ntwo\n", "text.gz")
    read_sentences(path)
    whole = the_file(cache).read_bytes()
    assert whole.count(b"onetwo") == 1
    the_file(cache).write_bytes(whole.replace(b"onetwo", b"onetwn"))
    assert read_sentences(path)["sentence"][:] == ["one", "two"]
    assert the_file(cache).read_bytes() == whole
