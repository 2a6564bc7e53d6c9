import itertools
import json
import os
import pickle
from collections import Counter
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st_kdmcse.data.images import FileSlice
from st_kdmcse.data.readers import BadRowError, CaptionedImage, ImageCaptionReader, Problem, open_captions


class Listed(ImageCaptionReader):
    """Records that are in memory; a string stands for a bad row."""

    name = "the list"

    def __init__(self, rows, **options):
        super().__init__(**options)
        self.rows = rows

    @cached_property
    def num_images(self):
        return self._count()

    def _records(self):
        for number, row in enumerate(self.rows, start=1):
            if isinstance(row, str):
                self.problems.add(row, f"row {number}", "is bad: mend it")
            else:
                yield row


def rows_of(count, captions=5):
    return [
        CaptionedImage(f"{image}.jpg", None, tuple(f"{image}-{caption}" for caption in range(captions)))
        for image in range(count)
    ]


def ids(reader):
    return [record.image_id for record in reader]


def test_a_record_unpacks():
    image_id, image, captions = CaptionedImage("a.jpg", Path("x/a.jpg"), ("one", "two"), "row 1")
    assert (image_id, image, captions) == ("a.jpg", Path("x/a.jpg"), ("one", "two"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions_per_image": 0}, "captions_per_image is 0, expected at least 1"),
        ({"limit": 0}, "limit is 0, expected at least 1"),
        ({"limit": -3}, "limit is -3"),
        ({"on_error": "ignore"}, "on_error is 'ignore', expected 'raise' or 'skip'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        Listed(rows_of(1), **options)


def test_length():
    assert len(Listed(rows_of(7))) == 7
    assert len(Listed(rows_of(7), limit=3)) == 3
    assert len(Listed(rows_of(7), limit=30)) == 7
    assert len(Listed([*rows_of(3), "bad", *rows_of(3)], on_error="raise")) == 3

    class Streamed(Listed):
        num_images = None

    with pytest.raises(TypeError, match="number of images of a Streamed is not known"):
        len(Streamed(rows_of(2)))
    assert len(list(Streamed(rows_of(2)))) == 2


@settings(max_examples=60, deadline=None)
@given(images=st.integers(1, 60), limit=st.integers(1, 80), seed=st.integers(0, 5), data=st.data())
def test_a_subset_has_the_exact_count_and_keeps_the_order(images, limit, seed, data):
    rows = rows_of(images, 1)
    found = ids(Listed(rows, limit=limit, seed=seed))
    assert len(found) == min(limit, images)
    assert found == [record.image_id for record in rows if record.image_id in set(found)]
    reader = Listed(rows, limit=limit, seed=seed)
    assert ids(reader) == ids(reader) == found
    # Which images are drawn depends on the images and the seed alone, not on their order.
    assert set(ids(Listed(data.draw(st.permutations(rows)), limit=limit, seed=seed))) == set(found)


def test_a_subset_with_large_numbers():
    """More images than are sorted at once."""
    rows = [CaptionedImage(str(image), None, ("a",)) for image in range(150_000)]
    assert len(ids(Listed(rows, limit=1_000))) == 1_000


def test_subsets_are_random():
    rows = rows_of(40, 1)
    counts = Counter(itertools.chain.from_iterable(ids(Listed(rows, limit=10, seed=seed)) for seed in range(200)))
    assert len(counts) == 40
    assert all(25 <= count <= 80 for count in counts.values())  # 50 expected, six standard deviations
    smaller, larger = (set(ids(Listed(rows, limit=limit, seed=1))) for limit in (10, 20))
    assert smaller < larger


def test_duplicates_do_not_count_into_a_subset():
    rows = [row for row in rows_of(20, 1) for _ in range(3)]
    reader = Listed(rows, limit=8, on_error="skip")
    assert len(set(ids(reader))) == len(ids(reader)) == 8


def test_a_whole_pass_of_a_subset_reports_a_bad_row():
    rows = [*rows_of(5), "bad"]
    with pytest.raises(BadRowError, match="row 6: is bad: mend it"):
        ids(Listed(rows, limit=2))


@settings(max_examples=60, deadline=None)
@given(captions=st.integers(1, 8), count=st.integers(1, 10), seed=st.integers(0, 5))
def test_drawn_captions(captions, count, seed):
    rows = rows_of(6, captions)
    drawn = {record.image_id: record.captions for record in Listed(rows, captions_per_image=count, seed=seed)}
    for record in rows:
        texts = drawn[record.image_id]
        assert len(set(texts)) == len(texts) == min(count, captions)
        assert list(texts) == [text for text in record.captions if text in texts]
    # The draw of an image does not depend on the others.
    alone = list(Listed(rows[3:4], captions_per_image=count, seed=seed))
    assert alone[0].captions == drawn["3.jpg"]


def test_drawn_captions_are_random():
    rows = rows_of(300)
    for seed in range(3):
        positions = Counter(r.captions[0][-1] for r in Listed(rows, captions_per_image=1, seed=seed))
        assert sorted(positions) == list("01234")
        assert all(30 <= count <= 95 for count in positions.values())
    first, second = ([r.captions for r in Listed(rows, captions_per_image=1, seed=seed)] for seed in (0, 1))
    assert first != second


def test_duplicates():
    rows = [
        CaptionedImage("a.jpg", None, ("one",), "row 1"),
        CaptionedImage("b.jpg", None, ("two",), "row 2"),
        CaptionedImage("a.jpg", None, ("other",), "row 3"),
    ]
    reader = Listed(rows, on_error="skip")
    assert [(record.image_id, record.captions) for record in reader] == [("a.jpg", ("one",)), ("b.jpg", ("two",))]
    assert reader.problems.listed == [
        Problem("duplicate id", "row 3", "image 'a.jpg' came before: give each image once")
    ]
    with pytest.raises(BadRowError, match="row 3: image 'a.jpg' came before"):
        list(Listed(rows))


def test_bad_rows_are_all_counted_and_listed_up_to_a_hundred():
    rows = [*["wrong columns"] * 150, *rows_of(2), *["encoding"] * 3]
    reader = Listed(rows, on_error="skip")
    for _ in range(2):  # each pass counts anew
        assert ids(reader) == ["0.jpg", "1.jpg"]
        assert reader.problems.counts == {"wrong columns": 150, "encoding": 3}
        assert len(reader.problems.listed) == 100
    reader = Listed(rows)
    with pytest.raises(BadRowError) as caught:
        next(iter(reader))
    assert caught.value.problem == Problem("wrong columns", "row 1", "is bad: mend it")
    assert pickle.loads(pickle.dumps(caught.value)).problem == caught.value.problem


def test_the_summary_counts_whatever_the_option_says(tmp_path):
    rows = ["encoding", *rows_of(3, 2), "no caption", "encoding"]
    reader = Listed(rows)
    summary = reader.summary(show_progress_bar=False)
    assert (summary.images, summary.captions) == (3, 6)
    assert str(summary).splitlines() == [
        "3 images, 6 captions",
        "2 x encoding",
        "1 x no caption",
        "  row 1: is bad: mend it",
        "  row 5: is bad: mend it",
        "  row 6: is bad: mend it",
    ]
    assert not reader.problems.counts
    assert reader.problems.on_error == "raise"
    assert Listed(rows, limit=2, captions_per_image=1).summary().captions == 2


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_no_record_at_all(on_error):
    with pytest.raises(ValueError, match="the list has no image with captions that could be used$"):
        list(Listed([], on_error=on_error))
    with pytest.raises(ValueError, match=r"row 1: is bad" if on_error == "raise" else r"used \(2 x bad; .*row 1: is"):
        list(Listed(["bad", "bad"], on_error=on_error))


def test_image_files(tmp_path, jpeg):
    (tmp_path / "good.jpg").write_bytes(jpeg())
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    sources = {name: tmp_path / f"{name}.jpg" for name in ("good", "missing", "empty", "folder", "nul\0")}
    sources["good slice"] = FileSlice(tmp_path / "good.jpg", 0, 10, "x.jpg")
    sources["empty slice"] = FileSlice(tmp_path / "good.jpg", 0, 0, "x.jpg")
    sources["good bytes"], sources["empty bytes"] = jpeg(), b""
    rows = [CaptionedImage(name, source, ("a",), f"row of {name}") for name, source in sources.items()]
    rows[4] = replace(rows[4], image_id="nul")  # the id itself may not hold one
    reader = Listed(rows, on_error="skip")
    assert ids(reader) == ["good", "good slice", "good bytes"]
    assert [(problem.kind, problem.where) for problem in reader.problems.listed] == [
        ("no image file", "row of missing"),
        ("empty image file", "row of empty"),
        ("no image file", "row of folder"),
        ("no image file", "row of nul\0"),
        ("empty image file", "row of empty slice"),
        ("empty image file", "row of empty bytes"),
    ]
    assert f"the image {tmp_path / 'missing.jpg'} does not exist" in reader.problems.listed[0].message
    assert len(list(reader.records(check_files=False))) == len(rows)
    with pytest.raises(BadRowError, match=r"row of missing: the image .*missing.jpg does not exist: add it"):
        list(Listed(rows))


def test_text_that_is_not_unicode():
    rows = [
        CaptionedImage("a\udcff.jpg", None, ("one",), "row 1"),
        CaptionedImage("b.jpg", None, ("\ud800",), "row 2"),
        *rows_of(1),
    ]
    reader = Listed(rows, on_error="skip", captions_per_image=1, limit=5)
    assert ids(reader) == ["0.jpg"]
    assert [(problem.kind, problem.where) for problem in reader.problems.listed] == [
        ("encoding", "row 1"),
        ("encoding", "row 2"),
    ]


def test_readers_go_to_other_processes():
    reader = pickle.loads(pickle.dumps(Listed(rows_of(4), limit=2)))
    assert len(ids(reader)) == 2


def test_ids_hold_no_control_characters():
    rows = [CaptionedImage(name, None, ("a",), f"row of {name!r}") for name in ("a\0b", "a", "b\x1f", "c\td")]
    reader = Listed(rows, on_error="skip")
    assert ids(reader) == ["a", "c\td"]
    assert [problem.kind for problem in reader.problems.listed] == ["control character"] * 2
    with pytest.raises(BadRowError, match=r"row of 'a.x00b': the image id .* holds the control character '.x00'"):
        list(Listed(rows))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "inner/../../secret.png"])
@pytest.mark.parametrize("kind", ["token", "csv", "tsv", "json", "coco", "karpathy", "parquet"])
def test_images_outside_of_their_folder_are_not_read(tmp_path, images, kind, name):
    rows = [("a.jpg", "one"), (name, "two"), ("inner/../b.jpg", "three")]
    content = {
        "token": "".join(f"{image}#0\t{caption}\n" for image, caption in rows),
        "csv": "image,caption\n" + "".join(f"{image},{caption}\n" for image, caption in rows),
        "tsv": "".join(f"{image}\t{caption}\n" for image, caption in rows),
        "json": json.dumps([{"image": image, "caption": caption} for image, caption in rows]),
        "coco": json.dumps(
            {
                "images": [{"id": number, "file_name": image} for number, (image, _) in enumerate(rows)],
                "annotations": [
                    {"id": number, "image_id": number, "caption": caption} for number, (_, caption) in enumerate(rows)
                ],
            }
        ),
        "karpathy": json.dumps(
            {"images": [{"filename": image, "sentences": [{"raw": caption}]} for image, caption in rows]}
        ),
    }
    path = tmp_path / f"f.{'json' if kind in ('coco', 'karpathy') else kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"image": [image for image, _ in rows], "caption": ["one", "two", "three"]}), path)
    else:
        path.write_text(content[kind])
    reader = open_captions(path, images=images, on_error="skip")
    assert [str(record.captions[0]) for record in reader.records(check_files=False)] == ["one", "three"]
    assert [problem.kind for problem in reader.problems.listed] == ["outside path"]
    with pytest.raises(BadRowError, match="is outside of the folder of images .* as `images`"):
        list(open_captions(path, images=images))
    if name.startswith("/"):  # asked for
        assert len(list(open_captions(path, images="/").records(check_files=False))) == 3


def test_what_is_no_regular_file_is_not_waited_for(tmp_path, images):
    os.mkfifo(images / "pipe.jpg")
    (images / "endless.jpg").symlink_to("/dev/zero")
    path = tmp_path / "f.tsv"
    path.write_text("a.jpg\tone\npipe.jpg\ttwo\nendless.jpg\tthree\n")
    reader = open_captions(path, images=images, on_error="skip")
    assert ids(reader) == ["a.jpg"]
    assert ["is no regular file" in problem.message for problem in reader.problems.listed] == [True, True]
