"""Captions of a store that stand in evaluation sets."""

import csv

import numpy as np
import pytest
from small_runs import write

from st_kdmcse import FeatureStore
from st_kdmcse.data.exclusion import read_left_out, whole_images
from st_kdmcse.data.overlap import EvaluationTexts, find_overlap, load_evaluation_texts, write_overlap
from st_kdmcse.data.sts import STSPairs, STSTask, load_sts_splits


def task(*pairs):
    return STSTask("T", (STSPairs([one for one, _ in pairs], [two for _, two in pairs], [1.0] * len(pairs), "t"),))


@pytest.fixture
def evaluated(store):
    one, two = store.caption(4), store.caption(5)
    first = task((f"  {one.upper()} .", "nothing like it"), ("a. b.", two))
    return EvaluationTexts({"first": first, "second": task((two, "else"))})


def test_capitals_full_stops_and_white_space_do_not_count(store, evaluated):
    overlap = find_overlap(store, evaluated)
    assert [(each.row, each.image, each.sets) for each in overlap.captions] == [
        (4, "1.jpg", ("first",)),
        (5, "1.jpg", ("first", "second")),
    ]
    assert (overlap.images, overlap.of_images, overlap.by_set()) == (1, 24, {"first": 2, "second": 1})
    assert "1 of 24 images have a caption that stands in the evaluation sets (first, second)" in str(overlap)
    assert evaluated.count(["A  b", "a b c", "ELSE"]) == 2
    assert whole_images(overlap.rows, store).rows.tolist() == [3, 4, 5]
    assert find_overlap(store, EvaluationTexts({"other": task(("x", "y"))})).captions == ()


def test_the_list_is_one_that_a_training_takes(store, evaluated, tmp_path):
    write_overlap(tmp_path / "list.csv", find_overlap(store, evaluated))
    with (tmp_path / "list.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["caption"], row["sets"]) for row in rows] == [
        (store.caption(4), "first"),
        (store.caption(5), "first; second"),
    ]
    assert read_left_out(tmp_path / "list.csv", store).rows.tolist() == [3, 4, 5]


def test_all_images_cannot_be_left_out(store):
    with pytest.raises(ValueError, match="all images of the feature store .* none is left to train on"):
        whole_images(np.arange(0, 72, 3), store)


def test_all_splits_of_a_folder(tmp_path):
    for split in ("train", "dev", "test"):
        lines = [f"g\tf\t2012\t1\t{gold}\ta {split}\tb {gold}" for gold in (1.0, 2.0)]
        write(tmp_path / f"STS/STSBenchmark/sts-{split}.csv", "\n".join(lines) + "\n")
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\n"
    write(tmp_path / "SICK/SICK_trial.txt", f"{header}1\tA man.\tTwo men\t3\n2\tA cat\tA dog\t2\n")
    assert list(load_sts_splits(tmp_path)) == ["STS-B", "STS-B dev", "STS-B train", "SICK-R dev"]
    evaluated = load_evaluation_texts(tmp_path)
    assert evaluated.sets_with("a man") == ("SICK-R dev",)
    assert evaluated.sets_with("B 1.0") == ("STS-B", "STS-B dev", "STS-B train")
    before = evaluated.checksum
    write(tmp_path / "SICK/SICK_trial.txt", f"{header}1\tA man.\tTwo men\t3\n2\tA cat\tA dog\t4\n")
    assert load_evaluation_texts(tmp_path).checksum != before


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a SentEval folder"):
        load_evaluation_texts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds none of STS12"):
        load_evaluation_texts(tmp_path)


def test_flickr8k(shared_data):
    folder = shared_data / "flickr8k_features"
    store = FeatureStore.open(folder)
    cxc = (shared_data / "cxc/sts_val.csv", [shared_data / "coco/annotations/captions_val2017.json"])
    overlap = find_overlap(store, load_evaluation_texts(shared_data / "senteval", *cxc))
    listed = read_left_out(folder / "overlap.csv", store)
    assert set(overlap.rows) <= set(listed.rows)
    assert overlap.images == 143
