"""Caption pairs of CxC."""

import json

import pytest

from st_kdmcse.data import load_cxc

HEADER = "caption1,caption2,agg_score,sampling_method\n"


def write(folder, rows, captions):
    lines = [
        f"COCO_val2014:sentid:{one},COCO_val2014:sentid:{two},{score},{method}" for one, two, score, method in rows
    ]
    (folder / "sts_val.csv").write_text(HEADER + "\n".join(lines) + "\n")
    for number, some in enumerate(captions):
        annotations = [{"id": key, "image_id": 1, "caption": text} for key, text in some.items()]
        (folder / f"captions_{number}.json").write_text(json.dumps({"images": [], "annotations": annotations}))
    return folder / "sts_val.csv", [folder / f"captions_{number}.json" for number in range(len(captions))]


@pytest.fixture
def files(tmp_path):
    rows = [(7, 8, 2.5, "c2c_isim"), (7, 9, 5.0, "c2c_cocaption"), (9, 8, 0.0, "c2c_isim")]
    return write(tmp_path, rows, [{7: "A dog . ", 8: "A  cat."}, {9: "Two dogs."}])


def test_pairs_by_sampling_method(files):
    task = load_cxc(*files)
    assert task.name == "CxC"
    assert [subset.name for subset in task.subsets] == ["c2c_cocaption", "c2c_isim"]
    assert task.sentences1 == ["A dog .", "A dog .", "Two dogs."]
    assert task.sentences2 == ["Two dogs.", "A cat.", "A cat."]
    assert task.scores == [5.0, 2.5, 0.0]
    assert task.places[0].endswith("sts_val.csv, line 3")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (HEADER, "caption1,caption2,score\n", "has no column agg_score, sampling_method: give sts_val.csv"),
        ("sentid:8,2.5", "sentid:88,2.5", r"line 2: caption 88 is not in .*captions_0\.json, .*captions_1\.json"),
        ("2.5", "5.5", r"line 2: the score '5\.5' is not a number from 0 to 5"),
        ("COCO_val2014:sentid:9,COCO", "9,COCO", "line 4: '9' is no caption id"),
        (",c2c_isim\nCOCO_val2014:sentid:7,", "\n", "line 2: '' is no caption id|line 3"),
    ],
)
def test_a_malformed_file_is_named(files, before, after, message):
    text = files[0].read_text()
    assert before in text
    files[0].write_text(text.replace(before, after, 1))
    with pytest.raises(ValueError, match=message):
        load_cxc(*files)


def test_files_that_are_not_there(files):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_cxc("nowhere.csv", files[1])
    with pytest.raises(FileNotFoundError, match="absent"):
        load_cxc(files[0], "absent.json")
    files[0].write_text(HEADER)
    with pytest.raises(ValueError, match="is empty"):
        load_cxc(*files)


def test_the_shared_pairs(shared_data):
    task = load_cxc(shared_data / "cxc/sts_val.csv", shared_data / "coco/annotations/captions_val2017.json")
    assert {subset.name: len(subset) for subset in task.subsets} == {"c2c_cocaption": 3040, "c2c_isim": 269}
    assert max(task.scores) == 5.0
