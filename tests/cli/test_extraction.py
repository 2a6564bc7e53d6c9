"""The commands as a user types them."""

import json
import shutil

import pytest
from click.testing import CliRunner
from helpers import copy_tree
from small_runs import write_data

from st_kdmcse import FeatureStore
from st_kdmcse.cli.main import main


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def arguments(photo_set, tiny_open_clip):
    return ["--captions", photo_set / "captions.txt", "--images", photo_set / "Images", "--teacher", tiny_open_clip]


def test_extract_inspect(tmp_path, arguments):
    result = run("extract", tmp_path / "features", *arguments, "--workers", 0)
    assert result.exit_code == 0, result.output
    assert "45 images and 90 captions in " in result.output
    assert "st-kdmcse inspect" in result.output
    again = run("extract", tmp_path / "features", *arguments)
    assert (again.exit_code, "45 images had been finished before" in again.output) == (0, True)
    shown = run("inspect", tmp_path / "features")
    assert shown.exit_code == 0
    for text in ("tiny-open-clip@", "45", "90", "checksums  ok", "Photo "):
        assert text in shown.output
    report = json.loads(run("inspect", tmp_path / "features", "--json").output)
    assert (report["images"], report["rows"], report["checksums"]) == (45, 90, "ok")


def test_shards_and_merge(tmp_path, arguments):
    path = tmp_path / "features"
    small = [*arguments, "--workers", 0, "--batch-size", 8]
    for index in (0, 1):
        result = run("extract", path, *small, "--shard", f"{index}/2")
        assert result.exit_code == 0, result.output
        assert f"st-kdmcse merge {path}" in result.output
    assert run("merge", path).exit_code == 0
    assert len(FeatureStore.open(path, verify=True)) == 90


def test_one_caption_of_a_subset_in_float32(tmp_path, arguments):
    options = ["--captions-per-image", 1, "--limit", 7, "--subset-seed", 1, "--dtype", "float32", "--workers", 0]
    assert run("extract", tmp_path / "features", *arguments, *options).exit_code == 0
    store = FeatureStore.open(tmp_path / "features")
    assert (len(store), store.num_images, str(store.dtype)) == (7, 7, "float32")


def test_bad_data_is_listed_or_left_out(tmp_path, photo_set, tiny_open_clip):
    folder = copy_tree(photo_set, tmp_path / "set")
    (folder / "Images" / "photo 003.jpg").unlink()
    arguments = ["--captions", folder / "captions.txt", "--images", folder / "Images", "--teacher", tiny_open_clip]
    result = run("extract", tmp_path / "features", *arguments, "--workers", 0)
    assert result.exit_code == 2
    assert "1 bad row; mend them, or set --on-error to skip, which leaves them out" in result.output
    assert "captions.txt, line 8: the image" in result.output
    result = run("extract", tmp_path / "features", *arguments, "--workers", 0, "--on-error", "skip")
    assert result.exit_code == 0
    assert "left out: 1 x no image file" in result.output
    assert f"listed in {tmp_path / 'features.skipped.csv'}" in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--captions": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"--images": "nowhere"}, "nowhere"),
        ({"--teacher": "ViT-B-33"}, "ViT-B-32"),
        ({"--pretrained": "openai"}, "openai"),
        ({"--shard": "2/2"}, "expected I/N with I from 0 to N - 1"),
        ({"--shard": "half"}, "expected I/N"),
        ({"--split": "trian"}, "trian"),
        ({"--captions-format": "coco"}, "captions.txt"),
        ({"--image-column": "nothing"}, "nothing"),
    ],
)
def test_typos_are_one_line_and_leave_nothing(tmp_path, arguments, change, message):
    options = dict(zip(arguments[::2], arguments[1::2], strict=True)) | change
    result = run("extract", tmp_path / "features", *[part for item in options.items() for part in item])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_none(tmp_path, store):
    assert run("inspect", tmp_path / "nothing").exit_code == 2
    assert "no extraction to merge" in run("merge", tmp_path / "nothing").output
    damaged = tmp_path / "damaged"
    shutil.copytree(store.path, damaged)
    text = (damaged / "image_features.npy").read_bytes()
    (damaged / "image_features.npy").write_bytes(text[:-4] + b"\0\1\0\1")
    result = run("inspect", damaged)
    assert result.exit_code == 0, result.output
    assert "image_features.npy is damaged" in result.output


def test_captions_of_evaluation_sets_are_named(tmp_path, store, sentences):
    data = write_data(tmp_path, sentences, store)
    dev = data / "STS/STSBenchmark/sts-dev.csv"
    dev.write_text(dev.read_text() + f"main\tfile\t2012\t0\t2.5\t{store.caption(4)}\tnothing\n")
    listed = tmp_path / "overlap.csv"
    result = run("inspect", data / "features", "--against", data, "--out", listed)
    assert result.exit_code == 0, result.output
    assert "1 of 24 images have a caption that stands in the evaluation sets" in result.output
    assert f"train --exclude-images {listed}" in result.output
    assert listed.read_text() == f"image,caption,row,sets\n1.jpg,{store.caption(4)},4,STS-B dev\n"
    result = run("inspect", data / "features", "--against", data, "--json")
    assert json.loads(result.output)["overlap"]["by_set"] == {"STS-B dev": 1}
    assert "--out and --cxc go with --against" in run("inspect", data / "features", "--out", listed).output
    assert "there is no folder" in run("inspect", data / "features", "--against", tmp_path / "nowhere").output
