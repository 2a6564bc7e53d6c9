import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, NamedSplit, Value

from st_kdmcse.data.images import load_image
from st_kdmcse.data.readers import BadRowError, HubDataset, open_captions


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def dataset(jpeg):
    contents = [{"bytes": jpeg(number), "path": "image.jpg"} for number in range(3)]
    captions = [["A dog, .", " A brown dog . "], ["Zwei Kätzchen 犬"], ["A bird ."]]
    kinds = Features({"image": Image(), "caption": List(Value("string")), "key": Value("string")})
    return Dataset.from_dict({"image": contents, "caption": captions, "key": ["x", "y", "z"]}, features=kinds)


EXPECTED = [("A dog, .", " A brown dog . "), ("Zwei Kätzchen 犬",), ("A bird .",)]


@pytest.fixture(params=["parquet", "saved", "saved splits"])
def stored(request, dataset, tmp_path):
    """The data set in a folder, its images within."""
    folder = tmp_path / "stored"
    if request.param == "parquet":
        folder.mkdir()
        dataset.to_parquet(folder / "train-00000-of-00001.parquet")
    elif request.param == "saved":
        dataset.save_to_disk(folder)
    else:
        DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(folder)
    return folder


def test_a_folder(stored, jpeg):
    reader = HubDataset(stored)
    records = list(reader)
    assert [record.captions for record in records] == EXPECTED
    assert [record.image_id for record in records] == ["0", "1", "2"]
    assert [record.image for record in records] == [jpeg(number) for number in range(3)]  # as stored, not decoded
    assert records[1].where == f"{stored}, row 1"
    assert len(reader) == 3
    assert [record.image_id for record in HubDataset(stored, id_column="key")] == ["x", "y", "z"]


def test_splits(dataset, tmp_path):
    folder = tmp_path / "saved"
    DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(folder)
    assert [record.captions for record in HubDataset(folder, split="test")] == EXPECTED[2:]
    with pytest.raises(ValueError, match="saved has no split 'trian'; its splits: train, test"):
        HubDataset(folder, split="trian")
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
    with pytest.raises(ValueError, match="trian"):
        HubDataset(tmp_path / "parquet", split="trian")
    named = Dataset(dataset.data, split=NamedSplit("validation"))
    named.save_to_disk(tmp_path / "named")
    assert len(HubDataset(tmp_path / "named", split="validation")) == 3
    with pytest.raises(ValueError, match="no split 'train'; its splits: validation"):
        HubDataset(tmp_path / "named")


def test_a_folder_of_images(images, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(images, folder)
    (folder / "metadata.csv").write_text('file_name,text\nc.jpg,"A bird, ."\na.jpg,A dog .\nb.jpg,A cat .\n')
    found = {record.image.name: record for record in HubDataset(folder, caption_column="text")}
    assert {name: record.captions for name, record in found.items()} == {
        "a.jpg": ("A dog .",),
        "b.jpg": ("A cat .",),
        "c.jpg": ("A bird, .",),
    }
    for name, record in found.items():
        assert load_image(record.image).tobytes() == load_image(images / name).tobytes()


def test_a_column_of_paths(images):
    Dataset.from_dict({"photo": ["a.jpg", "d.jpg"], "title": ["one", "two"]}).save_to_disk(images)
    reader = HubDataset(images, image_column="photo", caption_column="title", on_error="skip")
    assert [(record.image, record.captions) for record in reader] == [(images / "a.jpg", ("one",))]
    assert [(problem.kind, problem.where) for problem in reader.problems.listed] == [
        ("no image file", f"{images}, row 1")
    ]


def test_image_files(tmp_path, images):
    """Where a data set names its files instead of holding them, they are given as files."""
    paths = [str(images / f"{name}.jpg") for name in "ab"]
    kinds = Features({"image": Image(), "caption": Value("string")})
    (tmp_path / "parquet").mkdir()
    rows = {"image": paths, "caption": ["one", "two"]}
    Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "parquet" / "train.parquet")
    assert [record.image for record in HubDataset(tmp_path / "parquet")] == [images / "a.jpg", images / "b.jpg"]


def test_bad_rows(tmp_path, images, read):
    path = str(images / "a.jpg")
    kinds = Features({"image": Image(), "caption": Value("string"), "key": Value("string")})
    columns = {
        "image": [path, None, path, path, {"bytes": b"", "path": None}, path, path],
        "caption": ["one", "two", "  ", None, "five", "six", "seven"],
        "key": ["k0", "k1", "k2", "k3", "k4", "k0", None],
    }
    Dataset.from_dict(columns, features=kinds).save_to_disk(tmp_path / "bad")
    found, problems = read(HubDataset(tmp_path / "bad", id_column="key", on_error="skip"))
    assert found == {"k0": ["one"]}
    assert [(kind, where.rpartition(", ")[2]) for kind, where, _ in problems] == [
        ("no image file", "row 1"),
        ("no caption", "row 2"),
        ("no caption", "row 3"),
        ("empty image file", "row 4"),
        ("duplicate id", "row 5"),
        ("no id", "row 6"),
    ]
    with pytest.raises(BadRowError, match=r"bad, row 1: the row has no image"):
        list(HubDataset(tmp_path / "bad"))


def test_empty_lists_of_captions(tmp_path, dataset, read):
    dataset.map(lambda row, number: {"caption": row["caption"] if number else []}, with_indices=True).save_to_disk(
        tmp_path / "saved"
    )
    found, problems = read(HubDataset(tmp_path / "saved", on_error="skip"))
    assert list(found) == ["1", "2"]
    assert [kind for kind, _, _ in problems] == ["no caption"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_column": "photo"},
            "no column 'photo' or no column of captions; its columns: 'image', 'caption', 'key'",
        ),
        ({"caption_column": "text"}, "no column of images or no column 'text'"),
        ({"id_column": "id"}, "has no column 'id'"),
        ({"image_column": "caption", "caption_column": "key"}, "the column 'caption' is .*expected images or paths"),
    ],
)
def test_wrong_columns(dataset, tmp_path, options, message):
    dataset.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"saved.*{message}"):
        HubDataset(tmp_path / "saved", **options)


def test_a_data_set_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no"):
        HubDataset(tmp_path / "no")
    with pytest.raises(ConnectionError, match="owner/name"):  # the tests are offline
        HubDataset("owner/name")


def test_subsets(stored):
    reader = HubDataset(stored, limit=2, captions_per_image=1)
    assert len(reader) == len(list(reader)) == 2
    assert all(len(record.captions) == 1 for record in reader)


def test_several_columns_lists_in_cells_and_a_column_of_splits(tmp_path, images, read):
    rows = {
        "image": [str(images / f"{name}.jpg") for name in "abc"],
        "caption_0": ["one", '["two", "three"]', "four"],
        "caption_1": ["more", "", None],
        "split": ["train", "val", "train"],
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "d" / "test-00000.parquet")
    assert read(HubDataset(tmp_path / "d", split="test")) == (
        {"0": ["one", "more"], "1": ["two", "three"], "2": ["four"]},
        [],
    )
    train = HubDataset(tmp_path / "d", split="train")
    assert (len(train), [record.image_id for record in train]) == (2, ["0", "2"])
    assert next(iter(train)).where.endswith("row 0")
    assert [each.image_id for each in HubDataset(tmp_path / "d", split="train+val")] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="no split 'dev'; its splits: test; in its column 'split': train, val"):
        HubDataset(tmp_path / "d", split="dev")


def test_what_datasets_cannot_read_is_one_line(tmp_path, write):
    write("script/script.py", "import datasets\n")
    with pytest.raises(ValueError, match="script cannot be read|no data"):
        open_captions(tmp_path / "script", format="hub")
    for shard, columns in enumerate((["image", "caption"], ["image", "text", "n"])):
        (tmp_path / "unequal").mkdir(exist_ok=True)
        pq.write_table(pa.table({name: ["x"] for name in columns}), tmp_path / "unequal" / f"{shard}.parquet")
    with pytest.raises(ValueError, match="unequal cannot be read: .*same columns"):
        HubDataset(tmp_path / "unequal")
    for kept in (0.5, 0.9):
        path = tmp_path / f"damaged{kept}" / "train.parquet"
        path.parent.mkdir()
        pq.write_table(pa.table({"image": [f"{n}.jpg" for n in range(1000)], "caption": ["one"] * 1000}), path)
        content = path.read_bytes()
        middle = len(content) // 3
        path.write_bytes(
            content[: int(kept * len(content))]
            if kept < 0.9
            else content[:middle] + bytes(200) + content[middle + 200 :]
        )
        with pytest.raises(ValueError, match="cannot be read: "):
            HubDataset(path.parent)


@pytest.mark.parametrize("name", ["../secret.jpg", "inner/../../secret.jpg"])
def test_relative_paths_stay_in_the_folder(tmp_path, images, read, name):
    Dataset.from_dict({"image": ["images/a.jpg", name], "caption": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    found, problems = read(HubDataset(tmp_path / "saved", images=tmp_path, on_error="skip"))
    assert found == {"0": ["one"]}
    assert [kind for kind, *_ in problems] == ["outside path"]
    (tmp_path / "saved" / "images").symlink_to(images)
    found, problems = read(HubDataset(tmp_path / "saved", on_error="skip"))
    assert (found, [kind for kind, *_ in problems]) == ({"0": ["one"]}, ["outside path"])
