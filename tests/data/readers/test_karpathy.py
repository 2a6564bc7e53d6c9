import json
import re

import pytest

from st_kdmcse.data.readers import BadRowError, Karpathy


def entry(name, split="train", raw=("one", "two"), **more):
    sentences = [{"tokens": text.split(), "raw": text, "imgid": 0, "sentid": 0} for text in raw]
    return {"sentids": [0], "imgid": 0, "sentences": sentences, "split": split, "filename": name, **more}


@pytest.fixture
def dataset(write):
    """A file in the layout of dataset_flickr30k.json, or with `filepath` in that of dataset_coco.json."""

    def to_file(*entries, start=""):
        return write("dataset.json", start + json.dumps({"images": entries, "dataset": "flickr30k"}))

    return to_file


ENTRIES = [
    entry("a.jpg", raw=(" A dog, \t", "Ein Hündchen 犬")),
    entry("b.jpg", "val"),
    entry("c.jpg", "restval", ["three"]),
    entry("d.jpg", "test"),
    entry("e.jpg", "train", ["five"]),
]


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("split", "names"),
    [
        (None, ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]),
        ("train", ["a.jpg", "e.jpg"]),
        ("val", ["b.jpg"]),
        ("train+restval", ["a.jpg", "c.jpg", "e.jpg"]),
        ("restval+train", ["a.jpg", "c.jpg", "e.jpg"]),
    ],
)
def test_splits(dataset, read, start, split, names):
    path = dataset(*ENTRIES, start=start)
    found, problems = read(Karpathy(path, split=split))
    expected = {image["filename"]: [text["raw"] for text in image["sentences"]] for image in ENTRIES}
    assert (found, problems) == ({name: expected[name] for name in names}, [])
    assert list(found) == names
    assert len(Karpathy(path, split=split)) == len(names)


@pytest.mark.parametrize("split", ["trian", "train+restvall", "", "Train"])
def test_an_unknown_split(dataset, split):
    with pytest.raises(ValueError, match=r"dataset.json has no split .*; its splits: restval, test, train, val$"):
        Karpathy(dataset(*ENTRIES), split=split)


def test_image_files(dataset, images, jpeg, read):
    (images / "val2014").mkdir()
    for name in ("a.jpg", "d.jpg"):
        (images / "val2014" / name).write_bytes(jpeg())
    path = dataset(*(entry(f"{name}.jpg", filepath="val2014") for name in "abdx"), entry("c.jpg"))
    reader = Karpathy(path, images=images, on_error="skip")
    assert [record.image.relative_to(images).as_posix() for record in reader] == [
        "val2014/a.jpg",  # in both places
        "b.jpg",
        "val2014/d.jpg",
        "c.jpg",
    ]
    problem = reader.problems.listed[0]
    assert (problem.kind, problem.where) == ("no image file", f"{path}, image number 4 (x.jpg)")
    assert f"{images / 'val2014' / 'x.jpg'} does not exist" in problem.message
    assert next(iter(Karpathy(path))).image is None


@pytest.mark.parametrize(
    ("bad", "kind", "place", "message"),
    [
        ({"split": "train", "sentences": [{"raw": "x"}]}, "wrong columns", "image number 2", "no filename"),
        ("x.jpg", "wrong columns", "image number 2", "no filename"),
        ({**entry("x.jpg"), "filename": ""}, "wrong columns", "image number 2", "no filename"),
        (entry("x.jpg", raw=()), "no caption", "image number 2 (x.jpg)", "the image has no sentences"),
        ({"filename": "x.jpg", "split": "train"}, "no caption", "image number 2 (x.jpg)", "no sentences"),
        (
            entry("x.jpg", raw=[" "]),
            "no caption",
            "image number 2 (x.jpg), sentence number 1",
            "the caption is empty",
        ),
        (
            {**entry("x.jpg"), "sentences": [{"tokens": ["x"]}]},
            "no caption",
            "image number 2 (x.jpg), sentence number 1",
            "the caption is None",
        ),
        (entry("a.jpg", raw=["other"]), "duplicate id", "image number 2 (a.jpg)", "image 'a.jpg' came before"),
    ],
)
def test_a_bad_image_is_named_and_shifts_nothing(dataset, read, bad, kind, place, message):
    path = dataset(entry("a.jpg"), bad, entry("b.jpg", raw=["three"]))
    found, problems = read(Karpathy(path, on_error="skip"))
    assert found == {"a.jpg": ["one", "two"], "b.jpg": ["three"]}
    assert [problem[:2] for problem in problems] == [(kind, f"{path}, {place}")]
    with pytest.raises(BadRowError, match=re.escape(f"{path}, {place}: ") + f".*{message}"):
        list(Karpathy(path))


def test_one_empty_sentence_leaves_the_others(dataset, read):
    found, problems = read(Karpathy(dataset(entry("a.jpg", raw=["one", "", "three"])), on_error="skip"))
    assert found == {"a.jpg": ["one", "three"]}
    assert problems[0][1].endswith("image number 1 (a.jpg), sentence number 2")


@pytest.mark.parametrize("content", ["{}", "[]", '{"images": []}', '{"images": {"a": 1}}'])
def test_another_layout(write, content):
    path = write("d.json", content)
    with pytest.raises(ValueError, match=r"d.json has no images; the layout is .*sentences"):
        list(Karpathy(path, on_error="skip"))
    with pytest.raises(ValueError, match=r"no split 'train'; its splits: none"):
        Karpathy(path, split="train")


def test_a_file_that_is_cut_off(write):
    content = json.dumps({"images": ENTRIES})
    records = iter(Karpathy(write("d.json", content[: content.index("e.jpg")]), on_error="skip"))
    assert [next(records).image_id for _ in range(4)] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    with pytest.raises(ValueError, match=r"d.json is not whole, valid JSON.*download it again"):
        next(records)


def test_missing_paths(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.json does not exist"):
        Karpathy(tmp_path / "missing.json")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Karpathy(dataset(*ENTRIES), images=tmp_path / "no")
