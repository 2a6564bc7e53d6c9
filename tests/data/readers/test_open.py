import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from st_kdmcse.data import readers
from st_kdmcse.data.readers import (
    FORMATS,
    CaptionsCSV,
    CaptionTable,
    Coco,
    FlickrCSV,
    FlickrTokens,
    HubDataset,
    Karpathy,
    WebDataset,
    open_captions,
)

COCO = json.dumps(
    {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "one"}]}
)
COCO_TURNED = json.dumps(dict(reversed(json.loads(COCO).items())))
KARPATHY = json.dumps({"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "one"}]}]})
PIPES = "image_name| comment_number| comment\na.jpg| 0| one\n"


@pytest.mark.parametrize(
    ("name", "content", "reader"),
    [
        ("results_20130124.token", "a.jpg#0\tone\n", FlickrTokens),
        ("Flickr8k.token.txt", "\ufeffa.jpg#0\tone\r\n", FlickrTokens),
        ("captions.tsv", "a.jpg#0\tone\n", FlickrTokens),
        ("results.csv", PIPES, FlickrCSV),
        ("results.txt", "\ufeff" + PIPES, FlickrCSV),
        ("captions.txt", "image,caption\r\na.jpg,one\r\n", CaptionsCSV),
        ("captions.csv", "\ufeffimage,caption\na.jpg,one\n", CaptionsCSV),
        ("dataset_coco.json", KARPATHY, Karpathy),
        ("any.JSON", "\ufeff" + KARPATHY, Karpathy),
        ("captions_val2017.json", COCO, Coco),
        ("turned.json", COCO_TURNED, Coco),
        ("cc12m.tsv", "http://x.org/a.jpg\tone\n", CaptionTable),
        ("list.txt", "\na.jpg\tone\n", CaptionTable),
        ("list.csv", "a.jpg,one\n", CaptionTable),
        ("list.csv", "path,number,text\na.jpg,1,one\n", CaptionTable),
    ],
)
def test_text_formats(write, name, content, reader):
    opened = open_captions(write(name, content))
    assert type(opened) is reader
    assert [record.captions for record in opened] == [("one",)]


def test_other_formats(tmp_path, jpeg):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, content in (("1.jpg", jpeg()), ("1.json", b'{"alt": "one"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    shard = tmp_path / "00000.tar"
    for shards in (shard, str(shard), [shard], tmp_path, f"{tmp_path}/{{00000..00000}}.tar"):
        opened = open_captions(shards, caption_column="alt")
        assert type(opened) is WebDataset
        assert [record.captions for record in opened] == [("one",)]

    pq.write_table(pa.table({"image": [jpeg()], "alt": ["one"]}), tmp_path / "t.parquet")
    for name in ("without_suffix", "t.txt", "t.csv"):
        (tmp_path / name).write_bytes((tmp_path / "t.parquet").read_bytes())
    (tmp_path / "t.pq").write_text(f"image\talt\n{tmp_path}/a.jpg\tone\n")
    (tmp_path / "a.jpg").write_bytes(jpeg())
    for name in ("t.parquet", "without_suffix", "t.txt", "t.csv", "t.pq"):
        opened = open_captions(tmp_path / name, caption_column="alt")
        assert type(opened) is CaptionTable
        assert [record.captions for record in opened] == [("one",)]


def test_folders(tmp_path, write, images):
    write("coco/annotations/captions_val2017.json", COCO)
    opened = open_captions(tmp_path / "coco", split="val2017", images=images)
    assert type(opened) is Coco
    assert [record.image for record in opened] == [images / "a.jpg"]
    Dataset.from_dict({"photo": [str(images / "a.jpg")], "alt": ["one"]}).save_to_disk(tmp_path / "saved")
    for choice in ("auto", "hub"):
        opened = open_captions(tmp_path / "saved", format=choice, image_column="photo", caption_column="alt")
        assert type(opened) is HubDataset
        assert [record.captions for record in opened] == [("one",)]
    with pytest.raises(ValueError, match=r"images has no .tar, no annotations/captions_\*.json, .* and no parquet"):
        open_captions(images)


def test_a_given_format_is_not_guessed(write):
    path = write("captions.txt", "image,caption\na.jpg,one\n")
    assert type(open_captions(path, format="captions-csv")) is CaptionsCSV
    with pytest.raises(ValueError, match="expected the header 'image_name"):
        list(open_captions(path, format="flickr-csv"))


def test_columns_of_a_csv_with_the_header_of_flickr8k(write):
    path = write("captions.csv", "image,caption\na.jpg,one\n")
    opened = open_captions(path, image_column="image")
    assert type(opened) is CaptionTable
    assert [record.captions for record in opened] == [("one",)]


def test_options_reach_the_reader(write, images):
    path = write("captions.csv", "image,caption\na.jpg,one\na.jpg,two\nb.jpg,three\nc.jpg,\n")
    write("train.txt", "a\nb\n")
    reader = open_captions(path, images=images, split="train", captions_per_image=1, limit=1, seed=3, on_error="skip")
    records = list(reader)
    assert (len(records), len(records[0].captions)) == (1, 1)
    assert records[0].image == images / records[0].image_id
    assert reader.problems.counts == {"no caption": 1}
    with pytest.raises(ValueError, match="limit is 0"):
        open_captions(path, limit=0)
    with pytest.raises(TypeError, match="colour"):
        open_captions(path, colour="red")


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("t.token", "a.jpg#0\tone\n", {"image_column": "x"}, "read as 'flickr-tokens', .* no option 'image_column'"),
        ("t.json", COCO, {"caption_column": "x"}, "read as 'coco', which has no option 'caption_column'"),
        ("t.tar", "", {"split": "train"}, "read as 'webdataset', .* no option 'split'; it has: caption_column"),
        ("t.tsv", "a.jpg\tone\n", {"format": "flickr"}, "format is 'flickr', expected one of: auto, flickr-tokens"),
    ],
)
def test_wrong_options(write, name, content, options, message):
    with pytest.raises(ValueError, match=message):
        open_captions(write(name, content), **options)


def test_images_that_a_format_brings_itself(write, images):
    with pytest.raises(ValueError, match="has no option 'images'"):
        open_captions(write("t.tar", ""), images=images)


def test_several_files_are_shards(write):
    path = write("t.tsv", "a.jpg\tone\n")
    with pytest.raises(ValueError, match="the format 'table' is read from one file or folder, got 2"):
        open_captions([path, path], format="table")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "One sentence.\nTwo sentences.\n", "cannot tell its format from its name or its first line 'One sen"),
        ("a.bin", b"\xff\xfe\x00\x01", "cannot tell its format"),
        ("a.txt", "", "a.txt is empty"),
        ("a.txt", "\ufeff", "a.txt is empty"),
        (
            "a.json",
            '{"data": []}',
            "neither COCO's annotations nor Karpathy's sentences, and is no list of objects; give a file",
        ),
        ("a.json", '{"images": [', "is not whole, valid JSON"),
        ("a.json", "", "is not whole, valid JSON"),
    ],
)
def test_a_file_that_is_not_recognised(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        open_captions(write(name, content))


@pytest.mark.parametrize("format_", ["auto", *(name for name in FORMATS if name != "hub")])
def test_missing_files(tmp_path, write, format_):
    with pytest.raises(FileNotFoundError, match="missing"):
        open_captions(tmp_path / "missing.csv", format=format_)
    with pytest.raises(FileNotFoundError, match="there is no folder .*no-images"):
        open_captions(write("t.csv", "a.jpg,one\n"), images=tmp_path / "no-images", format=format_)


def test_a_name_on_the_hub_is_asked_for():
    with pytest.raises(FileNotFoundError, match="owner/name does not exist; .* give its format, 'hub'"):
        open_captions("owner/name")
    with pytest.raises(ConnectionError, match="owner/name"):  # the tests are offline
        open_captions("owner/name", format="hub")


def test_real_files(shared_data):
    for name, reader, count in (
        ("flickr30k/results_20130124.token", FlickrTokens, None),
        ("flickr8k/captions.txt", CaptionsCSV, 1_000),
        ("coco/annotations/captions_val2017.json", Coco, 5_000),
        ("flickr8k_features/captions.csv", CaptionTable, None),
    ):
        opened = open_captions(shared_data / name)
        assert type(opened) is reader
        if count is not None:
            assert len(opened) == count


def test_everything_is_exported():
    assert {name for name in readers.__all__ if name[0].isupper()} >= {
        *("FORMATS", "FlickrTokens", "FlickrCSV", "CaptionsCSV", "Karpathy", "Coco", "WebDataset", "CaptionTable"),
        "HubDataset",
    }
    assert all(hasattr(readers, name) for name in readers.__all__)
