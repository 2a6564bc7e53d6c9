"""Reading records from files of each format, what is wrong in them, and writing results."""

import csv
import gzip
import json
import re
import tracemalloc
from datetime import date
from decimal import Decimal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from st_kdmcse.search.records import RecordFile, TextRecord
from st_kdmcse.search.results import output_file, write_rows


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_a_text_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffA dog runs.\r\n\n  Zwei Hunde, „laut“ \nlast")
    file = RecordFile(path)
    expected = [TextRecord("1", "A dog runs."), TextRecord("3", "Zwei Hunde, „laut“"), TextRecord("4", "last")]
    assert list(file) == expected
    assert list(file()) == expected, "read anew by each call"
    assert (file.skipped, file.first_skipped) == (1, f"{path}, line 2")
    assert (file.check(), file.num_rows) == (3, None)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.gz", "a.csv.gz", "a.jsonl.gz"])
def test_compressed(tmp_path, name):
    content = {"a.csv.gz": "text\nA dog\n", "a.jsonl.gz": '{"text": "A dog"}\n'}.get(name, "A dog\n")
    path = write(tmp_path / name, gzip.compress(content.encode()))
    assert [record.text for record in RecordFile(path)] == ["A dog"]
    write(path, path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{name} is cut off"):
        RecordFile(path).check()


def test_csv(tmp_path):
    path = write(
        tmp_path / "a.csv",
        'key,Sentence,year,price,open,code,note,\nx,"a ""b"", c",1999,1,true,007,,\n\n'
        'y,"two\nlines",-5,2.5,False,12,n/a,\n',
    )
    file = RecordFile(path, id_column="key")
    assert list(file) == [
        TextRecord("x", 'a "b", c', {"year": 1999, "price": 1.0, "open": True, "code": "007", "note": None}),
        TextRecord("y", "two\nlines", {"year": -5, "price": 2.5, "open": False, "code": "12", "note": "n/a"}),
    ]
    assert [type(record.metadata["price"]) for record in file] == [float, float]
    assert [record.id for record in RecordFile(path, metadata=[])] == ["0", "1"]
    assert [record.metadata for record in RecordFile(path, metadata=["year"])] == [{"year": 1999}, {"year": -5}]
    assert [record.text for record in RecordFile(path, text_column="code")] == ["007", "12"]


def test_values_that_are_no_numbers_of_a_computer(tmp_path):
    values = ["1" * 19, "٣", "1e999", "+1", "0x1", "nan", "1_000", "1.", " 1"]
    path = write(tmp_path / "a.csv", "text,value\n" + "".join(f"t,{value}\n" for value in values))
    assert [record.metadata["value"] for record in RecordFile(path)] == values
    for value in values:
        write(path, f"text,value\nt,{value}\n")
        assert next(iter(RecordFile(path))).metadata == {"value": value}


def test_quotes_of_a_tsv_are_its_text(tmp_path):
    path = write(tmp_path / "a.tsv", 'caption\tnumber\n"Hello", he said\t3\n\nopen " quote\t4\n')
    assert list(RecordFile(path)) == [
        TextRecord("0", '"Hello", he said', {"number": 3}),
        TextRecord("1", 'open " quote', {"number": 4}),
    ]


def test_json_lines(tmp_path):
    rows = [
        {"id": 7, "text": "one", "n": 1, "x": float("nan"), "tags": ["a"], "": 1},
        {"id": "b", "text": "zw\u00f6lf", "late": True},
        {"id": 9, "text": None},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(RecordFile(path, id_column="id")) == [
        TextRecord("7", "one", {"n": 1, "x": None}),
        TextRecord("b", "zwölf", {"late": True}),
    ]
    assert [record.metadata for record in RecordFile(path, metadata=["late"])] == [{}, {"late": True}]
    assert [record.id for record in RecordFile(path)] == ["1", "2"]


def test_parquet(tmp_path):
    path = write_table(
        tmp_path / "a.parquet",
        key=pa.array([1.0, None, 3.0]),
        text=pa.array(["one", None, "three"]).dictionary_encode(),
        day=[date(2024, 1, 2), date(2025, 1, 1), None],
        price=[Decimal("1.50"), None, Decimal("2.00")],
        score=[0.5, float("nan"), float("nan")],
        tags=[["a"], [], []],
        raw=[b"1", b"2", b"3"],
    )
    file = RecordFile(path, id_column="key")
    assert list(file) == [
        TextRecord("1", "one", {"day": "2024-01-02", "price": 1.5, "score": 0.5}),
        TextRecord("3", "three", {"day": None, "price": 2.0, "score": None}),
    ]
    assert (file.num_rows, file.skipped, file.first_skipped) == (3, 1, f"{path}, row 1")
    with pytest.raises(ValueError, match="'tags' holds no texts, numbers or truth values"):
        RecordFile(path, metadata=["tags"])


def test_parquet_of_pandas_with_many_batches(tmp_path):
    frame = pd.DataFrame({"id": [f"k{number}" for number in range(9000)], "caption": "a dog"})
    frame.to_parquet(tmp_path / "a.parquet")
    records = list(RecordFile(tmp_path / "a.parquet", text_column="caption", id_column="id"))
    assert [record.id for record in records] == frame["id"].tolist()


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", "good\nb\xe9\n".encode("latin-1"), {}, "a.txt, line 2: not UTF-8.*iconv"),
        ("a.txt", "good".encode("utf-16"), {}, "a.txt, line 1: a NUL byte"),
        ("a.txt", b"", {}, "a.txt is empty: give a file"),
        ("a.txt", b" \n\n", {}, "a.txt has no text: it is empty, or all its lines are"),
        ("a.txt", b"a\n\nb\n", {"on_empty": "raise"}, "a.txt, line 2: there is no text"),
        ("a.txt", b"a\n", {"id_column": "id"}, "read as a text a line and has no columns: leave out id column"),
        ("a.csv", b"text,id\n", {}, "a.csv has no text"),
        ("a.csv", b"text,id\na,1\nb,2,3\n", {}, "a.csv, line 3: 3 columns separated by commas, expected 2"),
        ("a.csv", b'text,id\na,1\n"b,2\nc,3\n', {}, r"a.csv, line 3: .*a quote \(\"\) is opened there"),
        ("a.csv", b"text,id\na,1\n\xff,2\n", {}, "a.csv, line 3: not UTF-8"),
        ("a.csv", b"text,text\na,1\n", {}, "a.csv, line 1: the header has 'text' twice"),
        (
            "a.csv",
            b"id;text\n1;a\n",
            {"text_column": "text"},
            "line 1: 'id;text' is separated by semicolons, not commas",
        ),
        ("a.csv", b"a,b\n1,a\n", {}, "which column holds the texts is not clear; choose a text column of 'a', 'b'"),
        ("a.csv", b"text,b\n1,a\n", {"id_column": "id"}, "no column 'id'; choose an id column of 'text', 'b'"),
        ("a.csv", b"text,b\n1,a\n", {"metadata": ["c"]}, "no column 'c' for the metadata; choose of 'text', 'b'"),
        ("a.csv", b"text,id\na,1\n\n,1\nb,2\nc,1\n", {"id_column": "id"}, "line 6: the id '1' is that of line 2 too"),
        ("a.csv", b"text,id\na,1\nb,\n", {"id_column": "id"}, "line 3: the id '' in 'id' is neither"),
        ("a.csv", b"text,id\na,%b\n" % (b"x" * 513), {"id_column": "id"}, "line 2: the id 'x+... in 'id'"),
        ("a.txt", b'{"text": "a"}\n', {}, "a.txt is read as text, and looks like JSON: name it .csv, .tsv, .jsonl"),
        ("a.tsv", b"text\tid\na\n", {}, "a.tsv, line 2: 1 columns separated by tabs, expected 2"),
        ("a.json", b'[{"text": "a"}, 2]', {}, "a.json, item 2: 2 is no JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', {}, "a.jsonl, line 2: no valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', {}, r"a.jsonl, line 2: \['b'\] is no JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ["b"]}\n', {}, r"a.jsonl, line 2: 'text' is \['b'\], no text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', {}, "a.jsonl, line 1: half of a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, {}, "a.jsonl, line 1: no valid JSON"),
        ("a.jsonl", b'{"text": "a", "n": Infinity}', {}, "line 1: 'n' is inf, no text, number or truth value"),
        ("a.jsonl", b'{"text": "a", "id": true}', {"id_column": "id"}, "line 1: the id True in 'id' is neither"),
        ("a.jsonl", b'{"text": "a"}', {"text_column": "txt"}, "no column 'txt'; choose a text column of 'text'"),
        ("a.jsonl", b'{"text": 1}', {"text_column": "text"}, "'text' holds no texts; choose a text column of none"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, name, content, options, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        RecordFile(path, **options).check()
    assert str(path) in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="b.txt does not exist"):
        RecordFile(tmp_path / "b.txt")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        RecordFile(tmp_path)


def test_duplicate_ids_and_bad_bytes_of_parquet(tmp_path):
    path = write_table(tmp_path / "a.parquet", text=["a", "b", "c"], id=[1, 2, 1])
    with pytest.raises(ValueError, match="a.parquet, row 2: the id '1' is that of row 0 too"):
        RecordFile(path, id_column="id").check()
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    path = write_table(tmp_path / "b.parquet", text=broken)
    with pytest.raises(ValueError, match="b.parquet, row 1, column 'text': not UTF-8"):
        RecordFile(path).check()
    write(path, path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="b.parquet is damaged"):
        RecordFile(path)


def test_a_long_text_is_a_record(tmp_path):
    text = "a dog " * 33_000
    for name, content in {
        "a.txt": text,
        "a.csv": f'text\n"{text}"\n',
        "a.jsonl": json.dumps({"text": text}),
    }.items():
        assert [record.text for record in RecordFile(write(tmp_path / name, content))] == [text.strip()]


def test_identity_depends_on_the_content_and_the_options(tmp_path):
    path = write(tmp_path / "a.csv", "text,id\na,1\n")
    first = RecordFile(path).identity()
    assert first == RecordFile(path).identity()
    assert (first["file"], first["bytes"]) == ("a.csv", "12")
    assert RecordFile(path, id_column="id").identity() != first
    assert RecordFile(path, metadata=[]).identity() != first
    write(path, "text,id\na,2\n")
    assert RecordFile(path).identity() != first


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    sentences = [f"{number} dogs run on the beach and in the snow" for number in range(60_000)]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        write_table(path, text=sentences, id=list(range(60_000)))
    else:
        row = {"txt": "{1}\n", "csv": "{0},{1}\n", "jsonl": '{{"id": {0}, "text": "{1}"}}\n'}[suffix]
        header = "id,text\n" if suffix == "csv" else ""
        write(path, header + "".join(row.format(number, text) for number, text in enumerate(sentences)))
    file = RecordFile(path, id_column=None if suffix == "txt" else "id")
    tracemalloc.start()
    try:
        assert file.check() == 60_000
        assert tracemalloc.get_traced_memory()[1] < 4 << 20, "the texts alone are 3 MB, as strings 6 MB"
    finally:
        tracemalloc.stop()


SCHEMA = pa.schema([("id", pa.string()), ("score", pa.float32())])


def test_results_are_written_and_read_again(tmp_path):
    rows = [{"id": 'a, "b"', "score": 0.5}, {"id": "ü\nc", "score": -1.0}]
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = tmp_path / "new" / f"results{suffix}"
        assert write_rows(path, SCHEMA, iter(rows)) == 2
    folder = tmp_path / "new"
    with (folder / "results.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{**row, "score": str(row["score"])} for row in rows]
    assert [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()] == rows
    assert pq.read_table(folder / "results.parquet").to_pylist() == rows
    assert pq.read_schema(folder / "results.parquet").equals(SCHEMA)
    assert len(list(folder.iterdir())) == 3, "no temporary file is left"
    assert write_rows(folder / "none.parquet", SCHEMA, []) == 0
    assert pq.read_table(folder / "none.parquet").num_rows == 0


def test_what_was_there_stays_when_writing_is_interrupted(tmp_path):
    def rows():
        yield {"id": "a", "score": 1.0}
        raise KeyboardInterrupt

    for suffix in (".csv", ".jsonl", ".parquet"):
        path = write(tmp_path / f"results{suffix}", "before")
        with pytest.raises(KeyboardInterrupt):
            write_rows(path, SCHEMA, rows())
        assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 3


def test_output_files_that_cannot_be(tmp_path):
    source = write(tmp_path / "a.csv", "text\na\n")
    with pytest.raises(ValueError, match=r"pairs.txt is to be written as which format\? Give it one of .csv, .jsonl"):
        output_file(tmp_path / "pairs.txt")
    with pytest.raises(ValueError, match="a.csv is what is read"):
        output_file(tmp_path / "." / "a.csv", source)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        output_file(tmp_path / "folder.csv")
    assert output_file(str(tmp_path / "b.csv"), source) == tmp_path / "b.csv"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("column", ["number", "kind"])
@pytest.mark.parametrize("character", ["\0", "\x1b"])
def test_control_characters_in_ids_and_metadata_are_refused(tmp_path, name, column, character):
    rows = [{"text": "a dog", "number": "a", "kind": "x"}, {"text": "a cat", "number": "b", "kind": "y"}]
    rows[1][column] += f"{character}z"
    path = tmp_path / name
    if name.endswith("parquet"):
        write_table(path, **{key: [row[key] for row in rows] for key in rows[0]})
    elif name.endswith("jsonl"):
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = "," if name.endswith("csv") else "\t"
        write(path, "\n".join(separator.join(each) for each in [rows[0].keys(), *(row.values() for row in rows)]))
    place = {"a.csv": "line 3", "a.tsv": "line 3", "a.jsonl": "line 2", "a.parquet": "row 1"}[name]
    binary = character == "\0" and name in ("a.csv", "a.tsv")  # files of lines with a NUL are refused altogether
    message = "a NUL byte" if binary else f".*control character {re.escape(repr(character))}"
    with pytest.raises(ValueError, match=f"{name}, {place}: {message}"):
        RecordFile(path, id_column="number").check()


def test_tabs_and_ends_of_lines_in_metadata_are_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "a dog", "kind": "x\ty\nz"}))
    (record,) = RecordFile(path)
    assert record.metadata == {"kind": "x\ty\nz"}
