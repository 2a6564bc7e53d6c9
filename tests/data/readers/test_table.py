import csv
import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from st_kdmcse.data.images import load_image
from st_kdmcse.data.readers import BadRowError, CaptionTable, open_captions

ROWS = [("a.jpg", "A dog, ."), ("a.jpg", ' "A" brown dog .'), ("b.jpg", "Zwei Kätzchen 犬"), ("c.jpg", "A bird .")]
EXPECTED = {"a.jpg": ["A dog, .", ' "A" brown dog .'], "b.jpg": ["Zwei Kätzchen 犬"], "c.jpg": ["A bird ."]}


@pytest.fixture
def table(write, tmp_path):
    """A table in one of the file formats."""

    def to_file(suffix, rows=ROWS, header=("image", "caption")):
        if suffix == "parquet":
            columns = [list(column) for column in zip(*rows, strict=True)]
            pq.write_table(pa.table(columns, names=list(header)), tmp_path / "t.parquet")
            return tmp_path / "t.parquet"
        rows = [*([header] if header else []), *rows]
        if suffix == "csv":
            text = io.StringIO(newline="")
            csv.writer(text).writerows(rows)
            return write("t.csv", text.getvalue())
        return write("t.tsv", "".join("\t".join(row) + "\n" for row in rows))

    return to_file


@pytest.mark.parametrize("suffix", ["tsv", "csv", "parquet"])
@pytest.mark.parametrize("header", [("image", "caption"), ("Path", "TEXT"), ("url", "whatever"), ("name", "title")])
def test_the_formats_agree(table, images, read, suffix, header):
    path = table(suffix, header=header)
    reader = CaptionTable(path)
    assert read(reader) == (EXPECTED, [])
    assert (reader.streaming, reader.num_images) == (True, None)
    records = list(CaptionTable(path, images=images))
    assert [record.image for record in records] == [images / f"{name}.jpg" for name in "abc"]
    row = "row 3" if suffix == "parquet" else "line 4"
    assert records[1].where == f"{path}, {row}"


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_without_a_header(table, read, suffix):
    assert read(CaptionTable(table(suffix, header=None))) == (EXPECTED, [])


def test_cc12m_as_published(table, tmp_path, read):
    """Addresses, no header, quotes that are part of the text."""
    rows = [("http://x.org/1.jpg", 'caption "one'), ("https://x.org/2?image=3", '"two')]
    path = table("tsv", rows, header=None)
    assert read(CaptionTable(path)) == ({name: [caption] for name, caption in rows}, [])
    with pytest.raises(BadRowError, match=r"t.tsv, line 1: http://x.org/1.jpg is no file: download the images"):
        list(CaptionTable(path, images=tmp_path))


@pytest.mark.parametrize("suffix", ["tsv", "csv", "parquet"])
def test_columns_by_name(table, read, suffix):
    rows = [("1", "one", "a.jpg", "eins"), ("2", "two", "b.jpg", "zwei")]
    path = table(suffix, rows, ("number", "english", "photo", "deutsch"))
    found, _ = read(CaptionTable(path, image_column="photo", caption_column="deutsch"))
    assert found == {"a.jpg": ["eins"], "b.jpg": ["zwei"]}
    with pytest.raises(ValueError, match=r"no column 'photo' or no column 'french'; its columns: 'number', 'english'"):
        list(CaptionTable(path, image_column="photo", caption_column="french"))
    with pytest.raises(ValueError, match="column of images" if suffix == "parquet" else "4 columns, expected 2"):
        list(CaptionTable(path))


def test_the_table_of_the_teacher_features(shared_data):
    path = shared_data / "flickr8k_features" / "captions.csv"
    with path.open(encoding="utf-8", newline="") as file:
        expected = [(row["image"], row["caption"]) for row in csv.DictReader(file)]
    records = list(CaptionTable(path))
    assert [(record.image_id, caption) for record in records for caption in record.captions] == expected
    assert (len(records), len(expected)) == (984, 4_920)


def test_rows_of_an_image_that_are_apart(table, read):
    path = table("tsv", [*ROWS, ("a.jpg", "again"), ("a.jpg", "and again"), ("d.jpg", "last")])
    found, problems = read(CaptionTable(path, on_error="skip"))
    assert found == {**EXPECTED, "d.jpg": ["last"]}
    assert [problem[:2] for problem in problems] == [("duplicate id", f"{path}, line 6")]


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
@pytest.mark.parametrize("header", ["image{0}caption\n", ""])
@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ("b.jpg", "wrong columns", "1 columns, expected 2"),
        ("b.jpg{0}one{0}two", "wrong columns", "3 columns, expected 2"),
        ("b.jpg{0} ", "no caption", "the caption is empty"),
        ("{0}one", "no image file", "no image is named"),
        (b"b.jpg{0}caf\xe9", "encoding", "iconv -f latin-1"),
        (b"b.jpg{0}a\0", "encoding", "NUL"),
    ],
)
def test_a_bad_row_is_named_and_shifts_nothing(write, read, suffix, header, row, kind, message):
    row = row if isinstance(row, bytes) else row.encode()
    content = header.encode() + b"a.jpg{0}one\n" + row + b"\nc.jpg{0}three\n"
    path = write(f"t.{suffix}", content.replace(b"{0}", b"," if suffix == "csv" else b"\t"))
    line = 3 if header else 2
    found, problems = read(CaptionTable(path, on_error="skip"))
    assert found == {"a.jpg": ["one"], "c.jpg": ["three"]}
    assert [problem[:2] for problem in problems] == [(kind, f"{path}, line {line}")]
    with pytest.raises(BadRowError, match=re.escape(f"{path}, line {line}: ") + f".*{message}"):
        list(CaptionTable(path))


def test_a_wrong_separator(write):
    path = write("t.tsv", "a.jpg,one\nb.jpg,two\n")
    with pytest.raises(ValueError, match="t.tsv, line 1: 'a.jpg,one' is separated by commas, not tabs: name it .csv"):
        list(CaptionTable(path, on_error="skip"))
    with pytest.raises(ValueError, match=r"e.tsv is empty"):
        list(CaptionTable(write("e.tsv", "")))
    with pytest.raises(ValueError, match=r"h.tsv has no image with captions"):
        list(CaptionTable(write("h.tsv", "image\tcaption\n")))


def test_missing_image_files(table, images, read):
    (images / "a.jpg").unlink()
    (images / "c.jpg").write_bytes(b"")
    found, problems = read(CaptionTable(table("tsv"), images=images, on_error="skip"))
    assert list(found) == ["b.jpg"]
    assert [kind for kind, _, _ in problems] == ["no image file", "empty image file"]


def parquet(target, **columns):
    pq.write_table(pa.table(columns), target)
    return target


def test_absolute_paths_need_no_folder(table, images):
    path = table("tsv", [(str(images / "a.jpg"), "one"), ("b.jpg", "two")])
    absolute, relative = CaptionTable(path)
    assert absolute.image == images / "a.jpg"
    assert relative.image is None


@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_images_in_the_table(tmp_path, jpeg, read, kind):
    contents = [jpeg(number) for number in range(150)]
    # A path that says nothing must not bring images together.
    values = contents if kind == "bytes" else [{"bytes": content, "path": "image.jpg"} for content in contents]
    path = parquet(tmp_path / "t.parquet", image=values, caption=[[f"{n}", f"{n}!"] for n in range(150)])
    reader = CaptionTable(path)
    assert len(reader) == 150
    for number, record in enumerate(reader):
        assert (record.image_id, record.captions) == (f"t.parquet#{number + 1}", (f"{number}", f"{number}!"))
        assert record.image == contents[number]
    assert load_image(record.image).size == (8, 6)


def test_paths_in_a_struct(tmp_path, images):
    values = [{"bytes": None, "path": f"{name}.jpg"} for name in "ab"]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = parquet(tmp_path / "t.parquet", image=pa.array(values, kind), text=["one", "two"])
    assert [record.image for record in CaptionTable(path, images=images)] == [images / "a.jpg", images / "b.jpg"]


def test_bad_rows_of_parquet(tmp_path, jpeg, read):
    captions = pa.array([["one"], None, [], ["", "four"], [" "], ["six"], ["seven"]], pa.list_(pa.string()))
    values = [jpeg(), jpeg(), jpeg(), jpeg(), jpeg(), None, b""]
    path = parquet(tmp_path / "t.parquet", image=pa.array(values, pa.binary()), caption=captions)
    found, problems = read(CaptionTable(path, on_error="skip"))
    assert found == {"t.parquet#1": ["one"], "t.parquet#4": ["four"]}
    assert [problem[:2] for problem in problems] == [
        *(("no caption", f"{path}, row {row}") for row in (2, 3, 4, 5)),
        ("no image file", f"{path}, row 6"),
        ("empty image file", f"{path}, row 7"),
    ]
    with pytest.raises(BadRowError, match=r"t.parquet, row 2: the caption is None"):
        list(CaptionTable(path))


def test_parquet_text_that_is_not_utf8(tmp_path, read):
    wrong = pa.array([b"one", b"caf\xe9", b"three"], pa.binary()).view(pa.string())
    path = parquet(tmp_path / "t.parquet", path=["a.jpg", "b.jpg", "c.jpg"], text=wrong)
    found, problems = read(CaptionTable(path, on_error="skip"))
    assert found == {"a.jpg": ["one"], "c.jpg": ["three"]}
    assert [problem[:2] for problem in problems] == [("encoding", f"{path}, row 2")]


def test_dictionaries_and_many_batches(tmp_path, read):
    names = [f"{row // 3}.jpg" for row in range(15_000)]
    captions = pa.array([f"caption {row}" for row in range(15_000)], pa.large_string())
    path = parquet(tmp_path / "t.parquet", image=pa.array(names).dictionary_encode(), caption=captions)
    found, problems = read(CaptionTable(path))
    assert (len(found), problems) == (5_000, [])
    assert found["4999.jpg"] == ["caption 14997", "caption 14998", "caption 14999"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [1, 2], "caption": ["a", "b"]}, "the image column 'image' is of type int64"),
        ({"image": ["a", "b"], "caption": [1, 2]}, "the caption column 'caption' is of type int64"),
        ({"image": ["a", "b"], "caption": [[1], [2]]}, "the caption column 'caption' is of type list"),
        ({"x": ["a"], "y": ["b"]}, "no column of images or no column of captions; its columns: 'x', 'y'"),
    ],
)
def test_wrong_parquet_columns(tmp_path, columns, message):
    with pytest.raises(ValueError, match=f"t.parquet.*{message}"):
        list(CaptionTable(parquet(tmp_path / "t.parquet", **columns), on_error="skip"))


def test_damaged_parquet(table):
    path = table("parquet", [(f"{row}.jpg", f"caption {row}") for row in range(2_000)])
    whole = path.read_bytes()
    for content in (whole[:1_000], whole[:4]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="t.parquet is no whole parquet file"):
            list(CaptionTable(path, on_error="skip"))
    path.write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    with pytest.raises(ValueError, match="t.parquet is damaged after row 0"):
        list(CaptionTable(path, on_error="skip"))


def test_missing_paths(table, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.tsv does not exist"):
        CaptionTable(tmp_path / "missing.tsv")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        CaptionTable(table("tsv"), images=tmp_path / "no")


def test_the_content_tells_what_a_file_is_not_its_name(table, tmp_path):
    rows = [("a.jpg", "a dog"), ("b.jpg", "a cat")]
    parquet_file, text_file = table("parquet", rows), tmp_path / "captions.pq"
    text_file.write_text("image\tcaption\na.jpg\ta dog\nb.jpg\ta cat\n")
    renamed = parquet_file.rename(tmp_path / "captions.tsv")
    for path in (text_file, renamed):
        assert [record.captions for record in open_captions(path).records(check_files=False)] == [
            ("a dog",),
            ("a cat",),
        ]


FLICKR30K = r"""raw,sentids,split,filename,img_id
"[""Two men, outside."", ""Two \""guys\"".""]","[0, 1]",train,a.jpg,0
"[""A dog.""]",[2],val,b.jpg,1
"""
SPLIT_ROWS = [
    {"image": "a.jpg", "captions": ["one", "two"], "split": "train", "caption_0": "one", "caption_1": "two"},
    {"image": "b.jpg", "captions": ["three"], "split": "val", "caption_0": "three", "caption_1": ""},
    {"image": "c.jpg", "captions": ["four"], "split": "test", "caption_0": "four", "caption_1": ""},
]


def test_the_published_annotations_of_flickr30k(write, images):
    path = write("flickr_annotations_30k.csv", FLICKR30K)
    reader = open_captions(path, images=images, split="train")
    assert [(each.image_id, each.captions) for each in reader] == [("a.jpg", ("Two men, outside.", 'Two "guys".'))]
    assert len(list(open_captions(path, images=images, split="train+val"))) == 2
    with pytest.raises(ValueError, match=r"has no split 'dev' in its column 'split'; its splits: train, val"):
        list(open_captions(path, split="dev", on_error="skip"))


def write_split_rows(path, kind, name):
    rows = [{key: row[key] for key in ("image", "split", *name.split(","))} for row in SPLIT_ROWS]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        cells = [[json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values()] for row in rows]
        with path.open("w", newline="") as file:
            if kind == "csv":
                csv.writer(file).writerows([list(rows[0]), *cells])
            else:
                file.writelines("\t".join(line) + "\n" for line in [list(rows[0]), *cells])


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ["captions", "caption_0,caption_1"])
@pytest.mark.parametrize("asked", [True, False])
def test_splits_lists_and_several_columns_in_every_format(tmp_path, images, read, kind, name, asked):
    path = tmp_path / f"t.{kind}"
    write_split_rows(path, kind, name)
    options = {"images": images, "caption_column": name} if asked else {}
    assert read(open_captions(path, **options)) == (
        {"a.jpg": ["one", "two"], "b.jpg": ["three"], "c.jpg": ["four"]},
        [],
    )
    assert read(open_captions(path, split="val+test", **options))[0] == {"b.jpg": ["three"], "c.jpg": ["four"]}
    with pytest.raises(ValueError, match="no split 'dev' in its column"):
        list(open_captions(path, split="dev", **options))


def test_a_table_without_a_column_of_splits(write):
    with pytest.raises(ValueError, match="t.csv has no column 'split'; its columns: 'image', 'caption'"):
        list(CaptionTable(write("t.csv", "image,caption\na.jpg,one\n"), split="train"))


def test_json_of_blip(write, images, read):
    rows = [
        {"image": "a.jpg", "caption": "one", "image_id": "coco_1"},
        {"image": "a.jpg", "caption": "two", "image_id": "coco_1"},
        {"image": "b.jpg", "caption": ["three", "four"]},
    ]
    expected = {"a.jpg": ["one", "two"], "b.jpg": ["three", "four"]}
    for name, content in (
        ("t.json", json.dumps(rows)),
        ("t.jsonl", "\n".join(map(json.dumps, rows))),
        ("lines.json", "\n".join(map(json.dumps, rows))),
    ):
        reader = open_captions(write(name, content), images=images)
        assert type(reader) is CaptionTable
        assert read(reader) == (expected, [])


def test_bad_rows_of_json(write, read):
    rows = ['{"image": "a.jpg", "caption": "one"}', "[1]", '{"image": 3, "caption": "x"}', '{"caption": "x"}']
    more = '{"image": "b.jpg", "caption": "' + "d" * 10 + '"}'
    for name, content, place in (
        ("t.json", f"[{', '.join([*rows, more])}]", "item"),
        ("t.jsonl", "\n".join([*rows, "{", more]), "line"),
    ):
        path = write(name, content)
        found, problems = read(open_captions(path, on_error="skip"))
        assert found == {"a.jpg": ["one"], "b.jpg": ["d" * 10]}
        kinds = ["wrong columns", "no image file", "no image file", *(["wrong columns"] if place == "line" else [])]
        assert sorted(kind for kind, *_ in problems) == sorted(kinds)
        assert problems[0][1] == f"{path}, {place} 2"


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.string_view(), ["one", "two"]),
        (pa.list_(pa.string(), 2), [["one", "two"], ["three", "four"]]),
        (pa.list_(pa.string_view()), [["one"], ["two", "three"]]),
        (pa.list_view(pa.string()), [["one"], ["two", "three"]]),
    ],
    ids=str,
)
def test_types_of_parquet(tmp_path, read, kind, values):
    schema = pa.schema([("image", pa.string_view()), ("caption", kind)])
    plain = pa.list_(pa.string()) if isinstance(values[0], list) else pa.string()
    path = tmp_path / "t.parquet"
    table = pa.table([pa.array(["a.jpg", "b.jpg"], pa.string_view()), pa.array(values, kind)], schema=schema)
    try:
        pq.write_table(table, path)
    except pa.ArrowNotImplementedError:
        pytest.skip(f"this pyarrow writes no {kind} instead of {plain}")
    expected = [value if isinstance(value, list) else [value] for value in values]
    assert list(read(CaptionTable(path))[0].values()) == expected


def test_a_header_with_commas_makes_a_csv_of_any_name(write, read):
    path = write("captions.txt", 'image,caption,split\na.jpg,"one, two",train\nb.jpg,three,val\n')
    assert read(CaptionTable(path, split="train")) == ({"a.jpg": ["one, two"]}, [])
    with pytest.raises(
        ValueError, match="no column 'nothing' or no column of captions; its columns: 'image', 'caption'"
    ):
        list(CaptionTable(path, image_column="nothing"))
