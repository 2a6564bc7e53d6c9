import json
import math

import numpy as np
import pyarrow as pa
import pytest

from st_kdmcse.data.inspection import inspect_store
from st_kdmcse.data.layout import SCHEMA
from st_kdmcse.data.store import FeatureStore
from st_kdmcse.data.writer import FeatureStoreWriter
from st_kdmcse.files import manifest_checksum

DIM = 6


def write(path, counts, seed=0, teacher="some/teacher", captions=None, image_scale=1.0, **options):
    """A store of len(counts) images with that many captions each, in shuffled rows; the features are not normalised."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    images = image_scale * rng.standard_normal((len(counts), DIM)).astype(np.float32)
    texts = (images[rows] + rng.standard_normal((len(rows), DIM))).astype(np.float32)
    captions = captions or [f"caption {row}" for row in range(len(rows))]
    ids = [f"{image}.jpg" for image in range(len(counts))]
    return FeatureStore.from_arrays(path, images, texts, captions, rows, ids, teacher, **options)


def cosine(a, b):
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def quantiles(values):
    """By the definition: linear between the two values that are nearest in rank."""
    values = sorted(values)
    found = {}
    for percent in (5, 25, 50, 75, 95):
        position = percent / 100 * (len(values) - 1)
        low, high = values[math.floor(position)], values[math.ceil(position)]
        found[f"{percent}%"] = low + (high - low) * (position % 1)
    return pytest.approx(found, abs=2e-6)


def as_json(report):
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert "nan" not in str(report).replace(report.path, "")
    return json.loads(text)


def edit_table(store, **columns):
    """Replace columns of the table, without a manifest that would tell."""
    path = store.path / "captions.arrow"
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    for name, values in columns.items():
        table = table.set_column(SCHEMA.get_field_index(name), name, values)
    (store.path / "manifest.json").unlink()
    with pa.ipc.new_stream(path, SCHEMA) as stream:
        stream.write_table(table)
    return FeatureStore.open(store.path)


def test_counts_and_norms(tmp_path):
    store = write(tmp_path / "store", [3, 1, 2, 4])
    report = inspect_store(store)
    assert (report.path, report.teacher, report.dim, report.dtype) == (
        str(tmp_path / "store"),
        "some/teacher",
        DIM,
        "float32",
    )
    assert (report.images, report.rows, report.normalized, report.checksums) == (4, 10, False, "ok")
    assert report.captions_per_image == {"min": 1, "mean": 2.5, "max": 4}
    assert report.bytes_on_disk == sum(path.stat().st_size for path in store.path.iterdir())
    for measured, features in ((report.image_norms, store.image_features), (report.text_norms, store.text_features)):
        norms = [math.sqrt(sum(float(value) ** 2 for value in row)) for row in features]
        expected = {"min": min(norms), "mean": sum(norms) / len(norms), "max": max(norms)}
        assert measured == pytest.approx(expected, abs=2e-6)


def test_norms_of_several_chunks(tmp_path, monkeypatch):
    store = write(tmp_path / "store", [2] * 7)
    whole = inspect_store(store)
    monkeypatch.setattr("st_kdmcse.data.inspection.ROWS_PER_CHUNK", 3)
    assert inspect_store(store) == whole


def test_cosines_against_a_loop(tmp_path):
    store = write(tmp_path / "store", [1] * 40)
    report = inspect_store(store)
    own, other, captions, first = [], [], [], 0
    for row in range(40):
        text = store.text_features[row].astype(np.float64)
        scores = [cosine(text, image) for image in store.image_features.astype(np.float64)]
        image = store.image_rows[row]
        own.append(scores[image])
        other += scores[:image] + scores[image + 1 :]
        first += scores[image] == max(scores)
        captions += [cosine(text, store.text_features[earlier].astype(np.float64)) for earlier in range(row)]
    assert report.sampled_images == 40
    assert report.cosine_own_image == quantiles(own)
    assert report.cosine_other_image == quantiles(other)
    assert report.cosine_other_captions == quantiles(captions)
    assert report.own_image_first == pytest.approx(first / 40)
    assert 0 < first < 40


def test_cosines_of_two_captions_of_an_image(tmp_path):
    store = write(tmp_path / "store", [2, 1, 2, 2, 1, 2])
    pairs = [cosine(*store.text_features[store.image_rows == image].astype(np.float64)) for image in (0, 2, 3, 5)]
    assert inspect_store(store).cosine_same_image_captions == quantiles(pairs)


def test_the_scale_of_features_does_not_matter_to_cosines(tmp_path):
    images = np.eye(3, dtype=np.float32)
    reports = [
        inspect_store(
            FeatureStore.from_arrays(
                tmp_path / str(scale), scale * images, images, ["a", "b", "c"], [0, 1, 2], ["x", "y", "z"], "t"
            )
        )
        for scale in (1, 1e20)
    ]
    for report in reports:
        assert set(report.cosine_own_image.values()) == {1}
        assert set(report.cosine_other_image.values()) == {0}
        assert report.own_image_first == 1
    assert reports[1].image_norms["max"] == pytest.approx(1e20)


def test_a_seeded_sample(tmp_path):
    store = write(tmp_path / "store", [3] * 200)
    report = inspect_store(store, seed=1, sample=50)
    assert report == inspect_store(store, seed=1, sample=50)
    assert report != inspect_store(store, seed=2, sample=50)
    assert report.sampled_images == 50
    everything = inspect_store(store)
    assert everything.sampled_images == 200
    assert report.cosine_own_image["50%"] == pytest.approx(everything.cosine_own_image["50%"], abs=0.15)
    assert report.image_norms == everything.image_norms
    with pytest.raises(ValueError, match="sample is 0"):
        inspect_store(store, sample=0)


def test_examples_are_rows_of_the_store(tmp_path):
    store = write(tmp_path / "store", [3] * 20)
    examples = inspect_store(store).examples
    assert len({example.row for example in examples}) == 5
    for example in examples:
        assert (example.image_id, example.caption) == (store.image_id(example.row), store.caption(example.row))


def test_one_caption_an_image(tmp_path):
    report = inspect_store(write(tmp_path / "store", [1] * 5))
    assert report.cosine_same_image_captions is None
    assert report.cosine_own_image
    assert as_json(report)["cosine_same_image_captions"] is None
    assert "two captions of one image" in str(report)
    assert "n/a" in str(report)


@pytest.mark.parametrize("captions", [1, 3])
def test_one_image(tmp_path, captions):
    report = inspect_store(write(tmp_path / "store", [captions]))
    assert report.cosine_other_image is report.cosine_other_captions is report.own_image_first is None
    assert report.cosine_own_image
    assert (report.cosine_same_image_captions is None) == (captions == 1)
    assert len(report.examples) == captions
    as_json(report)


def test_captions_and_images_in_spaces_of_their_own(tmp_path):
    features = np.eye(4, dtype=np.float32)
    with FeatureStoreWriter(tmp_path / "store", 4, shared_space=False) as writer:
        for image in range(4):
            writer.add(f"{image}.jpg", features[image], ["a", "b"], features[[image, image]])
    report = inspect_store(FeatureStore.open(tmp_path / "store"))
    assert not report.shared_space
    assert report.cosine_own_image is report.cosine_other_image is report.own_image_first is None
    assert set(report.cosine_same_image_captions.values()) == {1}
    assert set(report.cosine_other_captions.values()) == {0}
    assert "captions and images share no space" in str(report)
    as_json(report)


def test_images_without_captions(tmp_path):
    features = np.eye(3, dtype=np.float32)
    store = FeatureStore.from_arrays(tmp_path / "store", features, features[:2], ["a", "b"], [0, 0], list("xyz"), "t")
    report = inspect_store(store)
    assert report.captions_per_image == pytest.approx({"min": 0, "mean": 2 / 3, "max": 2}, abs=1e-6)
    assert (report.images, report.sampled_images) == (3, 1)


def test_zero_vectors(tmp_path):
    store = write(tmp_path / "store", [2] * 4, image_scale=0.0)
    report = inspect_store(store)
    assert report.image_norms == {"min": 0, "mean": 0, "max": 0}
    assert set(report.cosine_own_image.values()) == {0}
    assert report.own_image_first == 0
    assert report.checksums == "ok"
    as_json(report)


def test_a_folder_without_manifest(tmp_path):
    store = write(tmp_path / "store", [2] * 4)
    (store.path / "manifest.json").unlink()
    (store.path / "notes.txt").write_text("not part of the store")
    report = inspect_store(FeatureStore.open(store.path))
    assert (report.checksums, report.teacher) == ("no checksums", "unknown")
    names = ("image_features.npy", "text_features.npy", "captions.arrow")
    assert report.bytes_on_disk == sum((store.path / name).stat().st_size for name in names)


# Damaged stores that open


@pytest.mark.parametrize("name", ["image_features.npy", "text_features.npy", "captions.arrow"])
def test_a_flipped_byte(tmp_path, name):
    store = write(tmp_path / "store", [2] * 4)
    content = bytearray((store.path / name).read_bytes())
    position = content.rindex(b"caption 5") + 8 if name == "captions.arrow" else len(content) - 1
    content[position] ^= 0x01
    (store.path / name).write_bytes(content)
    report = inspect_store(FeatureStore.open(store.path))
    assert f"{name} is damaged: its SHA-256 is not the one in manifest.json" in report.checksums
    assert report.checksums in str(report)
    assert report.images == 4
    as_json(report)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["image_features.npy", "text_features.npy"])
def test_features_that_are_not_finite(tmp_path, name, value):
    store = write(tmp_path / "store", [2] * 8)
    features = np.load(store.path / name)
    features[0, 0] = value
    np.save(store.path / name, features)
    report = inspect_store(FeatureStore.open(store.path))
    assert f"{name} is damaged" in report.checksums
    assert report.sampled_images == 7 if name == "image_features.npy" else report.sampled_images in (7, 8)
    assert report.own_image_first is not None
    as_json(report)


def test_features_that_are_all_nan(tmp_path):
    store = write(tmp_path / "store", [2] * 3)
    path = store.path / "image_features.npy"
    np.save(path, np.full_like(np.load(path), np.nan))
    report = inspect_store(FeatureStore.open(store.path))
    assert report.image_norms is report.cosine_own_image is report.cosine_other_captions is None
    assert report.sampled_images == 0
    assert report.text_norms
    as_json(report)


def test_row_numbers_out_of_range(tmp_path):
    store = edit_table(write(tmp_path / "store", [2] * 3), image_row=pa.array([0, 1, 2, 0, 1, 3]))
    report = inspect_store(store)
    assert "captions.arrow, row 5: image_row 3 is out of range" in report.checksums
    assert report.captions_per_image is report.cosine_own_image is None
    assert report.image_norms
    assert len(report.examples) == 5
    as_json(report)


def test_captions_that_are_not_utf_8(tmp_path):
    captions = pa.array([b"one", b"Z\xfcrich", b"three"]).view(pa.string())
    report = inspect_store(edit_table(write(tmp_path / "store", [1] * 3), caption=captions))
    assert "captions.arrow is damaged" in report.checksums
    assert [example.caption for example in report.examples] == ["one", "three"]
    as_json(report)


def test_norms_that_are_not_as_said(tmp_path):
    store = write(tmp_path / "store", [2] * 3)
    manifest = store.manifest | {"normalized": True}
    manifest["checksum"] = manifest_checksum(manifest)
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    report = inspect_store(FeatureStore.open(store.path))
    assert "said to be normalised" in report.checksums
    assert report.normalized


# The text


def test_text(tmp_path):
    text = str(inspect_store(write(tmp_path / "store", [3, 1, 2, 4])))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[:7] == [
        str(tmp_path / "store"),
        "teacher some/teacher",
        f"features {DIM} x float32, not normalised",
        "images 4",
        "captions 10 (1 to 4 an image, mean 2.50)",
        "on disk 0.0 MB",
        "checksums ok",
    ]
    assert max(map(len, text.splitlines()[1:])) <= 120


def test_captions_are_shown_on_one_line_without_control_characters(tmp_path):
    strange = "first line\n\x1b[31msecond\u202e line, 犬 " + "x" * 500
    report = inspect_store(write(tmp_path / "store", [1], captions=[strange], teacher="t\x1b[0m"))
    assert report.examples[0].caption == strange
    assert as_json(report)["examples"][0]["caption"] == strange
    last = str(report).splitlines()[-1]
    assert last.startswith("  0  0.jpg  first line [31msecond line, 犬 xxx")
    assert last.endswith("xxx...")
    assert len(last) < 130
    assert "\x1b" not in str(report)


def test_progress(tmp_path, capsys):
    store = write(tmp_path / "store", [2] * 3)
    inspect_store(store, show_progress_bar=False)
    assert capsys.readouterr().err == ""
    inspect_store(store, show_progress_bar=True)
    shown = capsys.readouterr().err
    assert "Verifying store: 100%" in shown
    assert "Measuring store: 100%" in shown


def test_real_store(shared_data):
    store = FeatureStore.open(shared_data / "flickr8k_features")
    report = inspect_store(store)
    assert (report.images, report.rows, report.dim, report.sampled_images) == (984, 4920, 512, 984)
    assert (report.captions_per_image, report.checksums) == ({"min": 5, "mean": 5, "max": 5}, "no checksums")
    batch = store.gather(range(len(store)))
    own = (batch.text_features.astype(np.float64) * batch.image_features).sum(axis=1)
    assert report.cosine_own_image["50%"] == pytest.approx(np.median(own), abs=0.02)
    assert report.cosine_own_image["5%"] > report.cosine_other_image["50%"] > -0.05
    assert report.cosine_same_image_captions["5%"] > report.cosine_other_captions["75%"]
    best = (batch.text_features.astype(np.float64) @ store.image_features.astype(np.float64).T).argmax(axis=1)
    assert report.own_image_first == pytest.approx((best == store.image_rows).mean(), abs=0.04)
    assert report.image_norms["min"] > 0.999
    as_json(report)
