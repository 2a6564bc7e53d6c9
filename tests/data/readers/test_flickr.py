import csv
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st_kdmcse.data.readers import BadRowError, CaptionsCSV, FlickrCSV, FlickrEntities, FlickrTokens, open_captions

TOKENS = "a.jpg#0\tA dog .\na.jpg#1\tA brown dog .\nb.jpg#0\tTwo cats .\nb.jpg#1\tCats .\nc.jpg#0\tA bird .\n"
PIPES = (
    "image_name| comment_number| comment\n"
    "a.jpg| 0| A dog .\na.jpg| 1| A brown dog .\nb.jpg| 0| Two cats .\nb.jpg| 1| Cats .\nc.jpg| 0| A bird .\n"
)
CSV = "image,caption\na.jpg,A dog .\na.jpg,A brown dog .\nb.jpg,Two cats .\nb.jpg,Cats .\nc.jpg,A bird .\n"
FORMATS = [(FlickrTokens, TOKENS), (FlickrCSV, PIPES), (CaptionsCSV, CSV)]
EXPECTED = {"a.jpg": ["A dog .", "A brown dog ."], "b.jpg": ["Two cats .", "Cats ."], "c.jpg": ["A bird ."]}


@pytest.fixture(params=FORMATS, ids=lambda param: param[0].__name__)
def layout(request):
    return request.param


def test_real_flickr30k(shared_data):
    folder = shared_data / "flickr30k"
    path = folder / "results_20130124.token"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    expected = {}
    for head, caption in rows:
        expected.setdefault(head[:-2], []).append(caption)
    reader = FlickrTokens(path)
    found = {record.image_id: list(record.captions) for record in reader}
    assert list(found) == list(expected)
    assert found == expected
    assert (len(reader), len(found), sum(map(len, found.values()))) == (31_014, 31_014, 155_070)
    assert {len(captions) for captions in found.values()} == {5}


def test_real_split_of_flickr30k(shared_data):
    path = shared_data / "flickr30k" / "results_20130124.token"
    by_name = FlickrTokens(path, split="train")
    by_path = FlickrTokens(path, split=shared_data / "flickr30k" / "train.txt", captions_per_image=1, limit=500)
    assert len(by_name) == 29_000
    names = (shared_data / "flickr30k" / "train.txt").read_text().split()
    records = list(by_path)
    assert len(records) == 500
    assert {record.image_id for record in records} <= {f"{name}.jpg" for name in names}
    assert {len(record.captions) for record in records} == {1}


def test_real_flickr8k(shared_data):
    folder = shared_data / "flickr8k"
    reader = CaptionsCSV(folder / "captions.txt", images=folder / "Images")
    with (folder / "captions.txt").open(encoding="utf-8", newline="") as file:
        expected = [(row["image"], row["caption"]) for row in csv.DictReader(file)]
    records = list(reader)
    assert [(record.image_id, caption) for record in records for caption in record.captions] == expected
    assert (len(records), len(expected), len(reader)) == (1_000, 5_000, 1_000)
    assert all(record.image == folder / "Images" / record.image_id for record in records)
    assert any(caption.count(",") > 1 for _, caption in expected)
    assert any('"' in caption for _, caption in expected)


def test_the_formats_agree(write, images, read, layout):
    reader, content = layout
    path = write("captions", content)
    assert read(reader(path)) == (EXPECTED, [])
    assert len(reader(path)) == 3
    records = list(reader(path, images=images))
    assert [record.image for record in records] == [images / f"{name}.jpg" for name in "abc"]
    # The row of its first caption.
    first = content.splitlines().index(next(row for row in content.splitlines() if row.startswith("b.jpg"))) + 1
    assert records[1].where == f"{path}, line {first}"
    assert next(iter(reader(path))).image is None


def test_a_byte_order_mark_windows_line_ends_and_no_last_line_end(write, read, layout):
    reader, content = layout
    assert read(reader(write("captions", "\ufeff" + content.replace("\n", "\r\n")[:-2]))) == (EXPECTED, [])


def test_scattered_rows_are_brought_together(write, read, layout):
    reader, content = layout
    header = content.splitlines()[: 0 if reader is FlickrTokens else 1]
    rows = content.splitlines()[len(header) :]
    path = write("captions", "\n".join([*header, *(rows[position] for position in (4, 2, 0, 3, 1))]))
    found, problems = read(reader(path))
    assert (found, problems) == (EXPECTED, [])
    assert list(found) == ["c.jpg", "b.jpg", "a.jpg"]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n\t")).filter(str.strip)


@settings(max_examples=80, deadline=None)
@given(captions=st.lists(TEXT, min_size=1, max_size=5))
def test_captions_keep_their_text(tmp_path_factory, captions):
    folder = tmp_path_factory.mktemp("captions")
    (folder / "t").write_text("".join(f"a.jpg#{k}\t{c}\n" for k, c in enumerate(captions)), "utf-8", newline="")
    header = "image_name| comment_number| comment\n"
    pipes = header + "".join(f"a.jpg| {k}| {c}\n" for k, c in enumerate(captions))
    (folder / "p").write_text(pipes, "utf-8", newline="")
    with (folder / "c").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *(("a.jpg", caption) for caption in captions)])
    for reader in (FlickrTokens(folder / "t"), FlickrCSV(folder / "p"), CaptionsCSV(folder / "c")):
        assert [record.captions for record in reader] == [tuple(captions)]


@pytest.mark.parametrize(
    ("reader", "content", "row", "kind", "message"),
    [
        (FlickrTokens, TOKENS, "b.jpg#2 no tab", "wrong columns", "1 columns, expected IMAGE.jpg#k<TAB>caption"),
        (FlickrTokens, TOKENS, "b.jpg#2\tone\ttwo", "wrong columns", "3 columns, expected"),
        (FlickrTokens, TOKENS, "b.jpg\tone", "wrong columns", "'b.jpg', expected IMAGE.jpg#k<TAB>caption"),
        (FlickrTokens, TOKENS, "#1\tone", "wrong columns", "'#1', expected"),
        (FlickrTokens, TOKENS, "b.jpg#1\tagain", "duplicate id", "caption 1 of the image 'b.jpg' came before"),
        (FlickrTokens, TOKENS, "b.jpg#2\t", "no caption", "the caption is empty"),
        (FlickrTokens, TOKENS, "b.jpg#2\t \u3000", "no caption", "the caption is empty"),
        (FlickrTokens, TOKENS, b"b.jpg#2\tcaf\xe9", "encoding", "not UTF-8 .*iconv -f latin-1"),
        (FlickrTokens, TOKENS, b"b.jpg#2\ta\0b", "encoding", "NUL"),
        (FlickrCSV, PIPES, "b.jpg| 2   A dog runs .", "wrong columns", "is not IMAGE.jpg| NUMBER| CAPTION"),
        (FlickrCSV, PIPES, "b.jpg| 2   A dog | a cat", "wrong columns", "is not IMAGE.jpg| NUMBER| CAPTION"),
        (FlickrCSV, PIPES, "b.jpg| 1| again", "duplicate id", "caption 1 of the image 'b.jpg' came before"),
        (FlickrCSV, PIPES, "b.jpg| 2| ", "no caption", "the caption is empty"),
        (FlickrCSV, PIPES, "| 2| a dog", "wrong columns", "is not IMAGE.jpg"),
        (FlickrCSV, PIPES, b"b.jpg| 2| caf\xe9", "encoding", "iconv"),
        (CaptionsCSV, CSV, "b.jpg,one, two", "wrong columns", "3 columns, expected image,caption"),
        (CaptionsCSV, CSV, "b.jpg", "wrong columns", "1 columns, expected"),
        (CaptionsCSV, CSV, ",one", "wrong columns", "no image name"),
        (CaptionsCSV, CSV, 'b.jpg,"one', "wrong columns", "a quote"),
        (CaptionsCSV, CSV, "b.jpg,", "no caption", "the caption is empty"),
        (CaptionsCSV, CSV, b"b.jpg,caf\xe9", "encoding", "iconv"),
    ],
)
def test_a_bad_row_is_named_and_shifts_nothing(write, read, reader, content, row, kind, message):
    lines = content.encode().splitlines()
    place = next(position for position, line in enumerate(lines) if line.startswith(b"c.jpg"))
    lines.insert(place, row if isinstance(row, bytes) else row.encode())
    path = write("captions", b"\n".join(lines))
    found, problems = read(reader(path, on_error="skip"))
    assert found == EXPECTED
    assert [problem[:2] for problem in problems] == [(kind, f"{path}, line {place + 1}")]
    with pytest.raises(BadRowError, match=re.escape(f"{path}, line {place + 1}: ")) as caught:
        list(reader(path))
    assert re.search(message.replace("|", r"\|"), str(caught.value))


def test_only_the_blank_of_the_separator_is_taken_off(write):
    rows = "image_name| comment_number| comment\na.jpg| 0|   two blanks \na.jpg| 1|none\na.jpg| 2| a | b|c\n"
    assert next(iter(FlickrCSV(write("results.csv", rows)))).captions == ("  two blanks ", "none", "a | b|c")


@pytest.mark.parametrize("reader", [FlickrCSV, CaptionsCSV])
@pytest.mark.parametrize("content", [TOKENS, "a,b,c\n", "\n\n"])
def test_a_wrong_header(write, reader, content):
    with pytest.raises(ValueError, match="captions.*expected the header 'image"):
        list(reader(write("captions", content), on_error="skip"))


def test_a_file_of_another_format(write):
    path = write("captions.token", CSV)
    with pytest.raises(BadRowError, match=r"captions.token, line 1: 1 columns, expected IMAGE.jpg#k<TAB>caption"):
        list(FlickrTokens(path))
    with pytest.raises(ValueError, match=r"no image with captions.*6 x wrong columns.*expected IMAGE.jpg#k<TAB>capt"):
        list(FlickrTokens(path, on_error="skip"))
    with pytest.raises(ValueError, match=r"captions.token is empty"):
        list(FlickrTokens(write("captions.token", "")))


def test_an_image_without_any_good_caption_is_left_out(write, read):
    found, problems = read(FlickrTokens(write("t", "a.jpg#0\t\nb.jpg#0\ttwo\na.jpg#1\t \n"), on_error="skip"))
    assert found == {"b.jpg": ["two"]}
    assert [kind for kind, _, _ in problems] == ["no caption", "no caption"]


def test_missing_image_files(write, images, read, layout):
    reader, content = layout
    (images / "b.jpg").unlink()
    (images / "c.jpg").write_bytes(b"")
    found, problems = read(reader(write("captions", content), images=images, on_error="skip"))
    assert list(found) == ["a.jpg"]
    assert [kind for kind, _, _ in problems] == ["no image file", "empty image file"]


@pytest.mark.parametrize("content", ["c\na\n", "a.jpg\nc.jpg\n", "\ufeffa\r\n\r\n c.jpg \r\n"])
def test_splits(write, read, layout, content):
    reader, captions = layout
    path, split = write("captions", captions), write("train.txt", content)
    for choice in ("train", split, str(split)):
        assert read(reader(path, split=choice)) == ({name: EXPECTED[name] for name in ("a.jpg", "c.jpg")}, [])
    assert len(reader(path, split="train")) == 2


def test_ids_of_a_split_are_whole_names(write, read):
    """Neither a prefix nor another suffix makes an image the one that is listed."""
    path = write("t", "12.jpg#0\tone\n1.jpg#0\ttwo\n1.png#0\tthree\n1#0\tfour\n1.jpg.jpg#0\tfive\n")
    assert read(FlickrTokens(path, split=write("s.txt", "1.jpg\n12\n")))[0] == {"12.jpg": ["one"], "1.jpg": ["two"]}
    assert read(FlickrTokens(path, split=write("s.txt", "1.png\n1\n")))[0] == {"1.png": ["three"], "1": ["four"]}


def test_problems_of_a_split(write, read):
    path, split = write("t.token", TOKENS), write("train.txt", "a\nmissing\nc.jpg\n\nc\n")
    found, problems = read(FlickrTokens(path, split="train", on_error="skip"))
    assert list(found) == ["a.jpg", "c.jpg"]
    assert problems == [
        (
            "no caption",
            f"{split}, line 2",
            f"the image 'missing' has no caption in {path}: add one, or leave the image out",
        ),
        ("duplicate id", f"{split}, line 5", "the image 'c' came before: list each image once"),
    ]
    with pytest.raises(BadRowError, match=r"train.txt, line 2: the image 'missing' has no caption"):
        list(FlickrTokens(path, split="train"))
    with pytest.raises(ValueError, match=r"empty.txt is empty"):
        list(FlickrTokens(path, split=write("empty.txt", "")))


def test_an_unknown_split(write, layout):
    reader, content = layout
    path = write("captions.txt", content)
    for name in ("train", "val"):
        write(f"{name}.txt", "a\n")
    with pytest.raises(
        FileNotFoundError, match=r"there is no split 'trian'.*beside the captions there are: train, val$"
    ):
        reader(path, split="trian")


def test_missing_paths(write, tmp_path, layout):
    reader, content = layout
    with pytest.raises(FileNotFoundError, match="missing does not exist: give the file with the captions"):
        reader(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="there is no folder .*no-images"):
        reader(write("captions", content), images=tmp_path / "no-images")


def test_flickr30k_entities(tmp_path, write, images, read):
    write(
        "e/Sentences/a.txt",
        "[/EN#283585/people Two young guys] with [/EN#0/notvisual/other shaggy hair] look .\nThree .\n",
    )
    write("e/Sentences/b.txt", "A dog .\n")
    write("e/Sentences/c.txt", "")
    write("e/train.txt", "a\n")
    reader = open_captions(tmp_path / "e", images=images, split="train")
    assert type(reader) is FlickrEntities
    assert read(open_captions(tmp_path / "e", on_error="skip")) == (
        {"a.jpg": ["Two young guys with shaggy hair look .", "Three ."], "b.jpg": ["A dog ."]},
        [("no caption", str(tmp_path / "e/Sentences/c.txt"), "the file is empty: add a caption, or remove it")],
    )
    (tmp_path / "e/Sentences/c.txt").unlink()
    assert [(each.image_id, each.image) for each in reader] == [("a.jpg", images / "a.jpg")]
    assert list(open_captions(tmp_path / "e/Sentences", split="train").records()) != []
    with pytest.raises(FileNotFoundError, match="images has no folder Sentences"):
        FlickrEntities(images)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.token", "a.jpg#0\tone\na.jpg#" + "1" * 5_000 + "\ttwo\n"),
        ("f.csv", "image_name| comment_number| comment\na.jpg| " + "1" * 5_000 + "| two\na.jpg| 0| one\n"),
    ],
)
def test_a_number_of_thousands_of_digits(write, read, name, content):
    found, ((kind, where, _),) = read(open_captions(write(name, content), on_error="skip"))
    assert (found, kind) == ({"a.jpg": ["one"]}, "wrong columns")
    assert where.endswith("line 2")


def test_lists_in_cells_of_a_captions_csv(write, read):
    path = write("captions.csv", 'image,caption\na.jpg,"[""one"", ""two""]"\n')
    assert read(open_captions(path)) == ({"a.jpg": ["one", "two"]}, [])
