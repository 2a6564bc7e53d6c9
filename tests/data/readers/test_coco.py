import json
import re

import pytest

from st_kdmcse.data.readers import BadRowError, Coco

IMAGES = [{"id": 30, "file_name": "c.jpg"}, {"id": 10, "file_name": "a.jpg"}, {"id": 20, "file_name": "b.jpg"}]
ANNOTATIONS = [
    {"id": 1, "image_id": 10, "caption": "A dog ."},
    {"id": 2, "image_id": 20, "caption": " A cat .\n"},
    {"id": 3, "image_id": 10, "caption": "Ein Hündchen 犬"},
    {"id": 9, "image_id": 30, "caption": "A bird ."},
]
EXPECTED = {"c.jpg": ["A bird ."], "a.jpg": ["A dog .", "Ein Hündchen 犬"], "b.jpg": [" A cat .\n"]}


@pytest.fixture
def annotations(write):
    def to_file(images=IMAGES, annotations=ANNOTATIONS, name="captions.json", start=""):
        return write(name, start + json.dumps({"info": {}, "images": images, "annotations": annotations}))

    return to_file


def test_real_captions(shared_data):
    path = shared_data / "coco" / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    names = {image["id"]: image["file_name"] for image in content["images"]}
    expected = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        expected[names[annotation["image_id"]]].append(annotation["caption"])
    reader = Coco(path)
    found = {record.image_id: list(record.captions) for record in reader}
    assert list(found) == list(expected)
    assert found == expected
    assert (len(reader), sum(map(len, found.values()))) == (5_000, 25_014)


@pytest.mark.parametrize("layout", ["folder of the images", "root for the images", "root alone"])
def test_real_images(shared_data, layout):
    root = shared_data / "coco"
    path = root / "annotations" / "captions_val2017.json"
    if layout == "root alone":
        reader = Coco(root, split="val2017", on_error="skip")
    else:
        reader = Coco(path, images=root / "val2017" if layout == "folder of the images" else root, on_error="skip")
    records = list(reader)
    assert len(records) == 40
    assert all(record.image == root / "val2017" / record.image_id for record in records)
    assert reader.problems.counts == {"no image file": 4_960}


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_order(annotations, read, start):
    found, problems = read(Coco(annotations(start=start)))
    assert (found, problems, list(found)) == (EXPECTED, [], ["c.jpg", "a.jpg", "b.jpg"])


def test_annotations_before_images(write, read):
    path = write("captions.json", json.dumps({"annotations": ANNOTATIONS, "images": IMAGES}))
    assert read(Coco(path)) == (EXPECTED, [])


@pytest.mark.parametrize(
    ("images", "annotation", "kind", "place", "message"),
    [
        (
            [],
            {"id": 4, "image_id": 99, "caption": "x"},
            "unknown image",
            "annotation number 5 (id 4)",
            "with the id 99",
        ),
        ([], {"id": 3, "image_id": 10, "caption": "x"}, "duplicate id", "annotation number 5 (id 3)", "came before"),
        ([], {"id": 4, "image_id": 10, "caption": " "}, "no caption", "annotation number 5 (id 4)", "is empty"),
        ([], {"id": 4, "image_id": 10}, "no caption", "annotation number 5 (id 4)", "the caption is None"),
        ([], {"id": 4, "caption": "x"}, "wrong columns", "annotation number 5", "no image_id"),
        ([], "x", "wrong columns", "annotation number 5", "no id or"),
        ([{"id": 40, "file_name": "d.jpg"}], None, "no caption", "image id 40 (d.jpg)", "has no annotation"),
        ([{"id": 10, "file_name": "d.jpg"}], None, "duplicate id", "image number 4", "image id 10 came before"),
        ([{"id": 40}], None, "wrong columns", "image number 4", "no file_name"),
        ([{"id": None, "file_name": "d.jpg"}], None, "wrong columns", "image number 4", "no id"),
        (
            [{"id": 40, "file_name": "a.jpg"}],
            {"id": 4, "image_id": 40, "caption": "x"},
            "duplicate id",
            "image id 40 (a.jpg)",
            "image 'a.jpg' came before",
        ),
    ],
)
def test_a_bad_entry_is_named_and_shifts_nothing(annotations, read, images, annotation, kind, place, message):
    path = annotations(IMAGES + images, ANNOTATIONS + ([annotation] if annotation else []))
    found, problems = read(Coco(path, on_error="skip"))
    assert found == EXPECTED
    assert [problem[:2] for problem in problems] == [(kind, f"{path}, {place}")]
    with pytest.raises(BadRowError, match=re.escape(f"{path}, {place}: ") + f".*{message}"):
        list(Coco(path))


def test_a_root_with_its_splits(annotations, images, tmp_path, jpeg):
    for split in ("train2017", "val2017"):
        annotations(name=f"annotations/captions_{split}.json")
    annotations(name="annotations/instances_val2017.json")
    assert next(iter(Coco(tmp_path, split="train2017"))).image is None  # no images there
    images.rename(tmp_path / "train2017")
    assert [record.image for record in Coco(tmp_path, split="train2017")] == [
        tmp_path / "train2017" / name for name in EXPECTED
    ]
    # The images of another split are not taken for these.
    with pytest.raises(BadRowError, match="c.jpg does not exist"):
        list(Coco(tmp_path, images=tmp_path, split="val2017"))
    with pytest.raises(FileNotFoundError, match="no annotations/captions_test.json; .* there: train2017, val2017$"):
        Coco(tmp_path, split="test")
    with pytest.raises(ValueError, match="is a folder: choose a split; .* there: train2017, val2017$"):
        Coco(tmp_path)
    with pytest.raises(ValueError, match="captions_val2017.json is one split already"):
        Coco(tmp_path / "annotations" / "captions_val2017.json", split="val2017")


@pytest.mark.parametrize("content", ["{}", "[]", '{"annotations": []}', '{"images": []}'])
def test_another_layout(write, content):
    with pytest.raises(ValueError, match=r"c.json has no images; the layout is .*annotations"):
        list(Coco(write("c.json", content), on_error="skip"))


def test_annotations_that_are_no_captions(annotations):
    path = annotations(annotations=[{"id": 1, "image_id": 10, "bbox": [0, 0, 1, 1]}])
    with pytest.raises(ValueError, match=r"no image with captions .*4 x no caption.*the caption is None, no text"):
        list(Coco(path, on_error="skip"))


def test_a_file_that_is_cut_off(write):
    content = json.dumps({"images": IMAGES, "annotations": ANNOTATIONS})
    for length in (20, len(content) // 2, len(content) - 1):
        with pytest.raises(ValueError, match=r"c.json is not whole, valid JSON.*download it again"):
            list(Coco(write("c.json", content[:length]), on_error="skip"))


def test_missing_paths(annotations, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.json does not exist"):
        Coco(tmp_path / "missing.json")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Coco(annotations(), images=tmp_path / "no")


def test_ids_may_be_texts(write, read):
    content = {
        "images": [{"id": "x1", "file_name": "a.jpg"}],
        "annotations": [{"id": "c1", "image_id": "x1", "caption": "one"}],
    }
    assert read(Coco(write("captions.json", json.dumps(content)))) == ({"a.jpg": ["one"]}, [])
