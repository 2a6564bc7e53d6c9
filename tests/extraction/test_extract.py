import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import copy_tree, free_port
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_set import IMAGES, content
from PIL import Image
from safetensors.torch import load_file, save_file

from st_kdmcse import FeatureStore
from st_kdmcse.data.readers import BadRowError, CaptionsCSV, Coco
from st_kdmcse.extraction import ExtractionOptions, extract, extract_dataset, merge
from st_kdmcse.extraction.parts import PartsFolder
from st_kdmcse.files import locked

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"workers": 0, "part_size": 8}


@pytest.fixture
def reader(photo_set):
    return CaptionsCSV(photo_set / "captions.txt", photo_set / "Images")


@pytest.fixture(scope="session")
def teacher(tiny_open_clip):
    from st_kdmcse.teachers import OpenCLIPTeacher

    return OpenCLIPTeacher(f"local-dir:{tiny_open_clip}", batch_size=4)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, photo_set, teacher):
    """The store of an extraction that nothing interrupts, in parts of 8 images."""
    reader = CaptionsCSV(photo_set / "captions.txt", photo_set / "Images")
    path = tmp_path_factory.mktemp("whole") / "features"
    return extract(reader, teacher, path, workers=0, part_size=8).store


def open_clip_one_by_one(folder):
    """Functions that encode one image file, or one caption, with a plain open_clip model."""
    import open_clip

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

    def image(path):
        with Image.open(path) as opened:
            return model.encode_image(preprocess(opened).unsqueeze(0))[0]

    return image, lambda caption: model.encode_text(tokenizer([caption]))[0]


def clip_one_by_one(folder):
    """The same with a plain CLIPModel."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    processor, tokenizer = CLIPImageProcessor.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)

    def image(path):
        with Image.open(path) as opened:
            pixels = processor(opened.convert("RGB"), return_tensors="pt")["pixel_values"]
        return model.visual_projection(model.vision_model(pixels).pooler_output)[0]

    def text(caption):
        tokens = tokenizer([caption], truncation=True, max_length=24, return_tensors="pt")
        return model.text_projection(model.text_model(**tokens).pooler_output)[0]

    return image, text


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
@pytest.mark.parametrize("data", ["photo_set", "flickr8k", "coco"])
def test_rows_are_what_the_model_gives_one_by_one(request, tmp_path, photo_set, kind, data):
    if data == "photo_set":
        captions, images = photo_set / "captions.txt", photo_set / "Images"
    else:
        shared = request.getfixturevalue("shared_data") / data
        names = ("captions.txt", "Images") if data == "flickr8k" else ("annotations/captions_val2017.json", "val2017")
        captions, images = (shared / name for name in names)
    model = request.getfixturevalue("tiny_open_clip" if kind == "open_clip" else "tiny_clip")
    options = ExtractionOptions(
        str(captions), images, teacher=f"{kind}:{model}", dtype="float32", workers=2, on_error="skip"
    )
    store = extract_dataset(options, tmp_path / "features").store
    reader = (Coco if data == "coco" else CaptionsCSV)(captions, images, on_error="skip")
    records = list(reader)
    assert store.num_images == len(records) == {"photo_set": IMAGES, "flickr8k": 1000, "coco": 40}[data]
    # In the order of the data set, every caption beside its own image.
    expected = [(record.image_id, caption) for record in records for caption in record.captions]
    assert [(store.image_id(row), store.caption(row)) for row in range(len(store))] == expected
    assert store.image_rows.tolist() == [row for row, record in enumerate(records) for _ in record.captions]
    encode_image, encode_text = (open_clip_one_by_one if kind == "open_clip" else clip_one_by_one)(model)
    captions_before = np.cumsum([0, *(len(record.captions) for record in records)])
    with torch.inference_mode():
        for row in np.random.default_rng(0).choice(len(records), 25, replace=False):
            batch = store.gather(range(captions_before[row], captions_before[row + 1]))
            image = encode_image(records[row].image)
            assert image.norm() > 0.1
            torch.testing.assert_close(torch.from_numpy(batch.image_features[0]), image, rtol=1e-4, atol=1e-4)
            texts = torch.stack([encode_text(caption) for caption in records[row].captions])
            torch.testing.assert_close(torch.from_numpy(batch.text_features), texts, rtol=1e-4, atol=1e-4)


def test_features_are_stored_raw_with_their_origin(whole, teacher):
    norms = np.linalg.norm(whole.image_features.astype(np.float32), axis=1)
    assert not whole.normalized
    assert np.abs(norms - 1).max() > 0.1
    assert whole.teacher == teacher.name
    assert whole.dtype == np.float16
    whole.verify()


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_that_decode_change_nothing(tmp_path, reader, teacher, whole, workers):
    store = extract(reader, teacher, tmp_path / "features", workers=workers, part_size=8).store
    assert content(store.path) == content(whole.path)


class StoppedError(Exception):
    pass


STEPS = {
    "part written": (PartsFolder, "write", 6),
    "part begun": (PartsFolder, "header", 6),
    "end noted": (PartsFolder, "write_end", 1),
    "part joined": (PartsFolder, "read", 6),
    "tidied up": (PartsFolder, "remove", 1),
}


@settings(max_examples=25, deadline=None)
@given(step=st.sampled_from(sorted(STEPS)), calls=st.integers(0, 5), after=st.booleans())
def test_stopped_at_any_step_the_store_is_the_same(tmp_path_factory, photo_set, teacher, whole, step, calls, after):
    owner, name, most = STEPS[step]
    path = tmp_path_factory.mktemp("stopped") / "features"
    reader = CaptionsCSV(photo_set / "captions.txt", photo_set / "Images")
    original = getattr(owner, name)
    left = calls % most

    def stop(*arguments):
        nonlocal left
        if left == 0 and not after:
            raise StoppedError
        result = original(*arguments)
        if left == 0:
            raise StoppedError
        left -= 1
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(StoppedError):
            extract(reader, teacher, path, **SMALL)
    finished = len(list(path.with_name("features.parts").glob("part-*.arrow")))
    with pytest.MonkeyPatch.context() as patch:
        encoded = []
        patch.setattr(type(teacher), "encode_texts", counting(type(teacher).encode_texts, encoded))
        if path.exists() and not path.with_name("features.parts").exists():
            with pytest.raises(FileExistsError):
                extract(reader, teacher, path, **SMALL)
        else:
            extract(reader, teacher, path, **SMALL)
            assert len(encoded) == (0 if step == "tidied up" else 6 - finished)  # nothing is done twice
    assert content(path) == content(whole.path)
    assert names(path.parent) == ["features"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def counting(function, calls):
    def counted(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    return counted


def test_killed_at_file_operations_the_store_is_the_same(tmp_path, photo_set, tiny_open_clip, whole):
    worker = Path(__file__).with_name("killed_worker.py")
    result = subprocess.run(
        [sys.executable, str(worker), str(photo_set), str(tiny_open_clip), str(tmp_path / "features")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[-1]) >= 5, "the worker must have been killed several times"
    assert content(tmp_path / "features") == content(whole.path)
    assert names(tmp_path) == ["features"]


@pytest.mark.parametrize("count", [2, 4, 9])
def test_shards_in_any_order_make_the_same_store(tmp_path, reader, teacher, whole, count):
    path = tmp_path / "features"
    order = np.random.default_rng(count).permutation(count)
    for index in order[:-1]:
        assert extract(reader, teacher, path, shard=(int(index), count), **SMALL).store is None
    if order[-1] < 6:  # more shards than parts leave some without work
        with pytest.raises(ValueError, match=rf"of 6 parts are missing \({order[-1]}.*shard k mod n"):
            merge(path)
    extract(reader, teacher, path, shard=(int(order[-1]), count), **SMALL)
    assert content(merge(path).path) == content(whole.path)


def test_torchrun_shares_the_work(tmp_path, photo_set, tiny_open_clip):
    arguments = ["--captions", str(photo_set / "captions.txt"), "--images", str(photo_set / "Images"), "--workers", "1"]
    arguments += ["--teacher", str(tiny_open_clip), "--batch-size", "4"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    for name, launcher in (("one", []), ("two", launch)):
        result = subprocess.run(
            [sys.executable, *launcher, "-m", "st_kdmcse", "extract", str(tmp_path / name), *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, result.stderr[-5000:]
        assert result.stdout.count("FeatureStore(") == 1
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert names(tmp_path) == ["one", "two"]


@pytest.fixture
def broken(tmp_path, photo_set):
    """The data set with five images that cannot be read, in several parts."""
    folder = copy_tree(photo_set, tmp_path / "broken")
    names_of_images = names(folder / "Images")
    damage = {
        names_of_images[0]: ("no image file", lambda path: path.unlink()),
        names_of_images[9]: ("empty image file", lambda path: path.write_bytes(b"")),
        names_of_images[10]: ("undecodable image", lambda path: path.write_bytes(path.read_bytes()[:-200])),
        names_of_images[11]: ("undecodable image", lambda path: path.write_text("no image at all")),
        names_of_images[44]: ("decompression bomb", lambda path: Image.new("1", (13_000, 13_000)).save(path)),
    }
    for name, (_, change) in damage.items():
        change(folder / "Images" / name)
    return folder, {name: kind for name, (kind, _) in damage.items()}


def test_unreadable_images_are_left_out_and_nothing_shifts(tmp_path, broken, teacher, whole):
    folder, kinds = broken
    reader = CaptionsCSV(folder / "captions.txt", folder / "Images", on_error="skip")
    report = extract(reader, teacher, tmp_path / "features", **SMALL)
    left = [row for row in range(len(whole)) if whole.image_id(row) not in kinds]
    store = report.store
    assert [store.caption(row) for row in range(len(store))] == [whole.caption(row) for row in left]
    expected, actual = whole.gather(left), store.gather(range(len(left)))
    np.testing.assert_allclose(actual.image_features, expected.image_features, rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(actual.text_features, expected.text_features, rtol=5e-3, atol=5e-3)
    assert report.skipped == {
        "no image file": 1,
        "empty image file": 1,
        "undecodable image": 2,
        "decompression bomb": 1,
    }
    with (tmp_path / "features.skipped.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == set(kinds.values())
    for name, kind in kinds.items():
        (row,) = [row for row in rows if name in row["message"]]
        assert row["kind"] == kind
        assert "captions.txt, line " in row["where"]


def test_an_unreadable_image_stops_the_extraction_and_costs_nothing(tmp_path, broken, photo_set, teacher, whole):
    folder, kinds = broken
    for name in (name for name, kind in kinds.items() if kind != "undecodable image"):
        shutil.copy(photo_set / "Images" / name, folder / "Images" / name)
    reader = CaptionsCSV(folder / "captions.txt", folder / "Images")
    with pytest.raises(BadRowError, match=r"captions.txt, line \d+: .*photo 010.png cannot be decoded"):
        extract(reader, teacher, tmp_path / "features", **SMALL)
    assert not (tmp_path / "features").exists()
    for name in kinds:
        shutil.copy(photo_set / "Images" / name, folder / "Images" / name)
    # Whatever the second call is to do about bad rows.
    reader = CaptionsCSV(folder / "captions.txt", folder / "Images", on_error="skip")
    report = extract(reader, teacher, tmp_path / "features", **SMALL)
    assert report.earlier == 8
    assert content(report.path) == content(whole.path)


def test_bad_rows_are_refused_all_at_once_before_the_teacher_is_loaded(tmp_path, broken, monkeypatch):
    folder, _ = broken
    options = ExtractionOptions(str(folder / "captions.txt"), folder / "Images", teacher="local-dir:nowhere")
    with pytest.raises(
        ValueError,
        match=r"2 bad rows.*`on_error` to skip, which leaves them out:\n43 images.*\n1 x empty.*\n1 x no image file",
    ) as e:
        extract_dataset(options, tmp_path / "features")
    assert "photo 000.png does not exist" in str(e.value)
    assert names(tmp_path) == ["broken"]


def test_a_subset_and_one_caption_an_image(tmp_path, photo_set, teacher):
    reader = CaptionsCSV(photo_set / "captions.txt", photo_set / "Images", captions_per_image=1, limit=20, seed=3)
    store = extract(reader, teacher, tmp_path / "features", **SMALL).store
    assert (store.num_images, len(store)) == (20, 20)
    assert [store.image_id(row) for row in range(20)] == [record.image_id for record in reader]


def test_parts_of_other_data_or_settings_are_not_mixed(tmp_path, photo_set, reader, teacher):
    path = tmp_path / "features"
    extract(reader, teacher, path, shard=(0, 2), **SMALL)
    with pytest.raises(ValueError, match="dtype was 'float16', is 'float32'"):
        extract(reader, teacher, path, dtype="float32", **SMALL)
    folder = copy_tree(photo_set, tmp_path / "changed")
    text = (folder / "captions.txt").read_text()
    (folder / "captions.txt").write_text(text.replace("Photo 17,", "Picture 17,"))
    changed = CaptionsCSV(folder / "captions.txt", folder / "Images")
    with pytest.raises(ValueError, match=r"changed since part 2 of .*features.parts was made"):
        extract(changed, teacher, path, **SMALL)


def test_shards_of_different_data_are_not_joined(tmp_path, photo_set, reader, teacher):
    path = tmp_path / "features"
    folder = copy_tree(photo_set, tmp_path / "other")
    lines = (folder / "captions.txt").read_text().splitlines()
    (folder / "captions.txt").write_text("\n".join([lines[0], *lines[60:], *lines[1:60]]) + "\n")
    other = CaptionsCSV(folder / "captions.txt", folder / "Images")
    extract(reader, teacher, path, shard=(0, 2), **SMALL)
    with pytest.raises(ValueError, match=r"shards in .*features.parts were made from different data"):
        extract(other, teacher, path, shard=(1, 2), **SMALL)
    with pytest.raises(ValueError, match="made from different data"):
        merge(path)


def test_a_finished_store_is_only_taken_for_the_same_data_and_teacher(tmp_path, photo_set, tiny_open_clip):
    folder, model = copy_tree(photo_set, tmp_path / "set"), copy_tree(tiny_open_clip, tmp_path / "model")
    options = ExtractionOptions(str(folder / "captions.txt"), folder / "Images", teacher=str(model), workers=0)
    path = tmp_path / "features"
    extract_dataset(options, path)
    text = (folder / "captions.txt").read_text()
    (folder / "captions.txt").write_text(text.replace("Photo 17,", "Picture 17,"))
    with pytest.raises(FileExistsError, match="made with records_sha256"):
        extract_dataset(options, path)
    (folder / "captions.txt").write_text(text)
    assert extract_dataset(options, path).earlier == IMAGES
    weights = load_file(model / "open_clip_model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, model / "open_clip_model.safetensors")
    with pytest.raises(FileExistsError, match="made with teacher 'open_clip:local-dir:model@"):
        extract_dataset(options, path)


def test_a_wrong_folder_of_images_can_be_mended(tmp_path, photo_set, teacher, whole):
    (tmp_path / "wrong").mkdir()
    path = tmp_path / "features"
    wrong = CaptionsCSV(photo_set / "captions.txt", tmp_path / "wrong", on_error="skip")
    with pytest.raises(ValueError, match=r"no image could be read.*photo 000.png does not exist.*`images`"):
        extract(wrong, teacher, path, **SMALL)
    right = CaptionsCSV(photo_set / "captions.txt", photo_set / "Images")
    assert content(extract(right, teacher, path, **SMALL).path) == content(whole.path)


def test_parts_with_holes_are_not_taken_by_who_wants_none(tmp_path, broken, photo_set, teacher, whole):
    folder, kinds = broken
    path = tmp_path / "features"
    lenient = CaptionsCSV(folder / "captions.txt", folder / "Images", on_error="skip")
    extract(lenient, teacher, path, shard=(0, 2), **SMALL)
    strict = CaptionsCSV(folder / "captions.txt", folder / "Images")
    with pytest.raises(BadRowError, match=r"line 2: .*photo 000.png does not exist"):
        extract(strict, teacher, path, shard=(0, 2), **SMALL)
    for name in kinds:  # once the images are there, they are read
        shutil.copy(photo_set / "Images" / name, folder / "Images" / name)
    assert content(extract(strict, teacher, path, **SMALL).path) == content(whole.path)


def test_processes_keep_out_of_each_others_way(tmp_path, reader, teacher):
    path = tmp_path / "features"
    extract(reader, teacher, path, shard=(0, 2), **SMALL)
    parts = PartsFolder(tmp_path / "features.parts")
    with locked(parts.path, shared=True):  # another shard is at work
        extract(reader, teacher, path, shard=(1, 2), **SMALL)
        for call in (lambda: merge(path), lambda: extract(reader, teacher, path, **SMALL)):
            with pytest.raises(ValueError, match=r"another process is writing to .*features.parts"):
                call()
    merge(path)
    assert names(tmp_path) == ["features"]
    assert merge(path).num_images == IMAGES  # joined already


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_an_image_that_would_fill_the_memory_once_scaled(tmp_path, photo_set, teacher, size):
    folder = copy_tree(photo_set, tmp_path / "set")
    Image.new("RGB", size).save(folder / "Images" / "photo 002.jpg")
    reader = CaptionsCSV(folder / "captions.txt", folder / "Images", on_error="skip")
    assert extract(reader, teacher, tmp_path / "features", **SMALL).skipped == {"decompression bomb": 1}


def test_images_are_asked_for_before_the_teacher_is_loaded(tmp_path, photo_set):
    options = ExtractionOptions(str(photo_set / "captions.txt"), teacher="local-dir:nowhere")
    with pytest.raises(ValueError, match=r"captions.txt holds no images: give their folder as `images`"):
        extract_dataset(options, tmp_path / "features")


def test_a_damaged_part_is_made_again(tmp_path, reader, teacher, whole, caplog):
    path = tmp_path / "features"
    extract(reader, teacher, path, shard=(0, 2), **SMALL)
    part = path.with_name("features.parts") / "part-0000002.arrow"
    part.write_bytes(part.read_bytes()[:-9])
    assert content(extract(reader, teacher, path, **SMALL).path) == content(whole.path)
    assert "part-0000002.arrow is damaged and is made again" in caplog.text


def test_what_is_there_is_not_overwritten(tmp_path, photo_set, reader, teacher, tiny_open_clip):
    path = tmp_path / "features"
    path.mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        extract(reader, teacher, path, **SMALL)
    options = ExtractionOptions(
        str(photo_set / "captions.txt"), photo_set / "Images", teacher=str(tiny_open_clip), workers=0
    )
    with pytest.raises(FileExistsError, match="no whole feature store"):
        extract_dataset(options, path)
    path.rmdir()
    first = extract_dataset(options, path)
    assert extract_dataset(options, path).earlier == IMAGES  # complete: it is left as it is
    other = ExtractionOptions(**{**vars(options), "captions_per_image": 1})
    with pytest.raises(FileExistsError, match="captions_per_image None instead of 1"):
        extract_dataset(other, path)
    assert first.store.manifest["source"]["captions"] == "captions.txt"  # no folder of this machine


def test_options_out_of_range(tmp_path, photo_set, reader, teacher):
    with pytest.raises(ValueError, match="shard 2/2"):
        extract(reader, teacher, tmp_path / "features", shard=(2, 2))
    with pytest.raises(ValueError, match="part_size is 0"):
        extract(reader, teacher, tmp_path / "features", part_size=0)
    with pytest.raises(FileNotFoundError, match="no extraction to merge"):
        merge(tmp_path / "features")
    captions_only = CaptionsCSV(photo_set / "captions.txt")
    with pytest.raises(ValueError, match=r"line 2: the data set was opened without images.*`images`"):
        extract(captions_only, teacher, tmp_path / "features", **SMALL)


def test_features_beyond_float16_are_named(tmp_path, reader, teacher, monkeypatch):
    plain = type(teacher).encode_texts
    monkeypatch.setattr(type(teacher), "encode_texts", lambda *a, **k: plain(*a, **k) * 1e6)
    with pytest.raises(
        ValueError, match=r"line 2: the features of the caption are not finite in float16: set `dtype` to float32"
    ):
        extract(reader, teacher, tmp_path / "features", **SMALL)


def test_captions_of_another_teacher(tmp_path, photo_set, tiny_open_clip, tiny_clip, student):
    from st_kdmcse import KDMCSEConfig, KDMCSELoss

    options = ExtractionOptions(
        str(photo_set / "captions.txt"),
        photo_set / "Images",
        teacher=str(tiny_clip),
        text_teacher=str(tiny_open_clip),
        workers=0,
    )
    store = extract_dataset(options, tmp_path / "features").store
    assert (store.dim, store.shared_space) == (24, False)
    assert not store.image_features[:, 20:].any()
    with pytest.raises(
        ValueError, match=r"`image_soft_label` is 'text-image'.*two teachers.*'image-image' or 'text-text'"
    ):
        KDMCSELoss(student, KDMCSEConfig.paper(), teacher_dim=24, features=store)
    within = KDMCSEConfig(image_soft_label="image-image", image_filter="image-image")
    KDMCSELoss(student, within, teacher_dim=24, features=store)


def test_the_manifest_of_a_store_is_json_with_its_source(tmp_path, reader, teacher):
    store = extract(reader, teacher, tmp_path / "features", source={"captions": "captions.txt"}, **SMALL).store
    source = json.loads((store.path / "manifest.json").read_text())["source"]
    assert source["captions"] == "captions.txt"
    assert len(source["records_sha256"]) == 64
    assert FeatureStore.open(store.path, verify=True).shared_space


@pytest.mark.parametrize("where", ["image_features", "text_features", "captions"])
def test_a_flipped_bit_in_a_finished_part_is_noticed(tmp_path, reader, teacher, whole, where, caplog):
    path = tmp_path / "features"
    extract(reader, teacher, path, shard=(1, 2), **SMALL)
    part = sorted(path.with_name("features.parts").glob("part-*.arrow"))[0]
    damaged, batch = bytearray(part.read_bytes()), pa.ipc.open_file(part).get_batch(0)
    column = batch.column(where)
    while not pa.types.is_floating(column.type) and not pa.types.is_string(column.type):
        column = column.flatten()
    needle = column.buffers()[-1].to_pybytes()[:40]
    damaged[damaged.index(needle) + 1] ^= 1
    part.write_bytes(damaged)
    extract(reader, teacher, path, shard=(0, 2), **SMALL)
    with pytest.raises(ValueError, match=r"part-0000001.arrow is missing or damaged .*it makes it again"):
        merge(path)
    extract(reader, teacher, path, shard=(1, 2), **SMALL)
    assert "is damaged and is made again" in caplog.text
    assert content(merge(path).path) == content(whole.path)


@pytest.mark.parametrize("name", ["run.json", "end.json"])
def test_a_changed_note_of_an_extraction_is_noticed(tmp_path, reader, teacher, whole, name):
    path = tmp_path / "features"
    for shard in ((0, 2), (1, 2)):
        extract(reader, teacher, path, shard=shard, **SMALL)
    note = path.with_name("features.parts") / name
    before = note.read_text()
    note.write_text(before.replace("open_clip:", "open_clap:") if name == "run.json" else before.replace("a", "b"))
    with pytest.raises(ValueError, match=r"run.json is damaged|no process has reached the end"):
        merge(path)
    if name == "end.json":
        extract(reader, teacher, path, shard=(0, 2), **SMALL)
    else:
        note.write_text(before)
    assert content(merge(path).path) == content(whole.path)
