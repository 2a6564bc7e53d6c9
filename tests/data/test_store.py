import json
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.data import DataLoader

from st_kdmcse import files
from st_kdmcse.data import FeatureStore, FeatureStoreWriter, true_pair_score
from st_kdmcse.data import store as store_module
from st_kdmcse.data import writer as writer_module
from st_kdmcse.data.characters import control_character
from st_kdmcse.data.resident import ResidentFeatures
from st_kdmcse.data.statistics import store_statistics
from st_kdmcse.files import sha256_file

DIM = 8


def unit(rng, *shape):
    features = rng.standard_normal(shape)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def write(path, counts=(2, 1, 3), dtype="float16", **options):
    """A store of len(counts) images; returns it with the float64 features that went in."""
    rng = np.random.default_rng(0)
    images, texts = unit(rng, len(counts), DIM), unit(rng, sum(counts), DIM)
    start = 0
    with FeatureStoreWriter(path, DIM, dtype, teacher="some/teacher", **options) as writer:
        for image, count in enumerate(counts):
            rows = range(start, start + count)
            writer.add(f"{image}.jpg", images[image], [f"caption {row}" for row in rows], texts[rows])
            start += count
    return FeatureStore.open(path), images, texts


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "store")
    return tmp_path / "store"


def without_manifest(folder):
    """Turn a store into the plain layout: two arrays and a CSV."""
    table = pa.ipc.open_stream(folder / "captions.arrow").read_pandas()
    table.to_csv(folder / "captions.csv", index=False)
    (folder / "captions.arrow").unlink()
    (folder / "manifest.json").unlink()
    return folder


def edit_manifest(folder, fix_checksum, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.update(changes)
    if fix_checksum:
        manifest["checksum"] = files.manifest_checksum(manifest)
    path.write_text(json.dumps(manifest))


def flip_byte(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x01
    path.write_bytes(bytes(content))


# Writing, opening, reading


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_round_trip(tmp_path, dtype):
    store, images, texts = write(tmp_path / "store", dtype=dtype)
    store.verify()
    assert (len(store), store.num_images, store.dim, store.dtype) == (6, 3, DIM, np.dtype(dtype))
    assert store.teacher == "some/teacher"
    assert store.normalized
    assert store.path == tmp_path / "store"
    batch = store.gather([5, 0, 2, 0])
    assert batch.image_features.dtype == batch.text_features.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(batch.image_rows, [2, 0, 1, 0])
    np.testing.assert_array_equal(batch.image_features, images.astype(dtype)[[2, 0, 1, 0]])
    np.testing.assert_array_equal(batch.text_features, texts.astype(dtype)[[5, 0, 2, 0]])
    assert [store.caption(row) for row in (0, 5)] == ["caption 0", "caption 5"]
    assert [store.image_id(row) for row in range(6)] == ["0.jpg", "0.jpg", "1.jpg", "2.jpg", "2.jpg", "2.jpg"]


def test_files_are_plain_npy_and_arrow_with_a_manifest(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "captions.arrow",
        "image_features.npy",
        "manifest.json",
        "text_features.npy",
    ]
    assert np.load(folder / "image_features.npy").shape == (3, DIM)
    assert np.load(folder / "text_features.npy").shape == (6, DIM)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["images"], manifest["rows"], manifest["dim"], manifest["normalized"]) == (3, 6, DIM, True)
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}


def test_many_record_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "ROWS_PER_BATCH", 4)
    monkeypatch.setattr(store_module, "ROWS_PER_CHUNK", 3)
    store, _, texts = write(tmp_path / "store", counts=[3] * 7)
    store.verify()
    assert [batch.num_rows for batch in pa.ipc.open_stream(tmp_path / "store" / "captions.arrow")] == [4, 4, 4, 4, 4, 1]
    np.testing.assert_array_equal(store.gather(range(21)).text_features, texts.astype("float16"))
    assert store.image_rows.tolist() == [row // 3 for row in range(21)]
    assert store.dataset()["row"][:] == list(range(21))


def test_views_are_read_only(folder):
    store = FeatureStore.open(folder)
    for array in (store.image_features, store.text_features, store.image_rows):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@settings(max_examples=25, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["float16", "float32"]))
def test_from_arrays_gives_back_what_went_in(tmp_path_factory, data, dtype):
    num_images, rows, dim = (data.draw(st.integers(1, 6)) for _ in range(3))
    values = st.floats(-1000, 1000, width=16)
    images = data.draw(hnp.arrays(dtype, (num_images, dim), elements=values))
    texts = data.draw(hnp.arrays(dtype, (rows, dim), elements=values))
    image_rows = data.draw(hnp.arrays(np.int64, rows, elements=st.integers(0, num_images - 1)))
    text = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
    captions = data.draw(st.lists(text, min_size=rows, max_size=rows))
    ids = data.draw(
        st.lists(
            text.filter(lambda key: not control_character(key)), min_size=num_images, max_size=num_images, unique=True
        )
    )
    path = tmp_path_factory.mktemp("arrays") / "store"

    store = FeatureStore.from_arrays(path, images, texts, captions, image_rows, ids, "teacher")
    store.verify()

    assert store.dtype == np.dtype(dtype)
    wanted = data.draw(st.lists(st.integers(0, rows - 1)))
    batch = store.gather(wanted)
    np.testing.assert_array_equal(batch.text_features, texts[wanted])
    np.testing.assert_array_equal(batch.image_features, images[image_rows[wanted]])
    np.testing.assert_array_equal(batch.image_rows, image_rows[wanted])
    assert [store.caption(row) for row in range(rows)] == captions
    assert [store.image_id(row) for row in range(rows)] == [ids[row] for row in image_rows]
    assert store.dataset()["sentence"][:] == captions


@pytest.mark.parametrize("normalized", [None, True, False])
def test_normalized_is_read_off_or_taken_at_its_word(tmp_path, normalized):
    rng = np.random.default_rng(0)
    arguments = unit(rng, 2, DIM), unit(rng, 2, DIM), ["a", "b"], [0, 1], ["x", "y"], "t"
    assert FeatureStore.from_arrays(tmp_path / "a", *arguments, normalized=normalized).normalized == (
        normalized is not False
    )
    longer = (arguments[0], 3 * arguments[1], *arguments[2:])
    if normalized:
        with pytest.raises(ValueError, match=r"text_features, row 0: the norm is 3\.0"):
            FeatureStore.from_arrays(tmp_path / "b", *longer, normalized=True)
    else:
        assert not FeatureStore.from_arrays(tmp_path / "b", *longer, normalized=normalized).normalized


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("dim", [4, 512, 768])
def test_rounding_to_half_precision_keeps_features_normalized(tmp_path, dtype, dim):
    rng = np.random.default_rng(0)
    features = unit(rng, 200, dim)
    bfloat = torch.from_numpy(features).to(torch.bfloat16).float().numpy()
    for name, rounded in (("own", features), ("bfloat16", bfloat if dim > 4 else features)):
        ids = [str(row) for row in range(200)]
        store = FeatureStore.from_arrays(tmp_path / name, rounded.astype(dtype), rounded, ids, range(200), ids, "t")
        assert store.normalized


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": ["a", "b", "c"]}, "3 captions, 2 rows of text_features and 2 image_rows"),
        ({"image_rows": [0, 2]}, "row 2 is not an integer from 0 to 1: image_features has 2 rows"),
        ({"image_rows": [0, -1]}, "row -1 is not an integer"),
        ({"image_ids": ["x", "x"]}, "'x' came before"),
        ({"image_ids": ["x"]}, "1 image_ids for 2 rows"),
        ({"captions": ["a", " "]}, "row 1 .*caption is ' '"),
        ({"image_features": np.zeros(DIM)}, "expected \\(images, T\\)"),
        ({"text_features": np.zeros((2, DIM + 1))}, "text_features: shape \\(2, 9\\)"),
        ({"text_features": np.array([[0] * DIM, [np.inf] * DIM])}, "text_features, row 1: NaN or infinite"),
    ],
)
def test_from_arrays_refuses(tmp_path, changes, message):
    arguments = {
        "image_features": np.zeros((2, DIM)),
        "text_features": np.zeros((2, DIM)),
        "captions": ["a", "b"],
        "image_rows": [0, 1],
        "image_ids": ["x", "y"],
        "teacher": "t",
    }
    with pytest.raises(ValueError, match=message):
        FeatureStore.from_arrays(tmp_path / "store", **{**arguments, **changes})
    assert list(tmp_path.iterdir()) == []


# The writer


@pytest.mark.parametrize(
    ("image_id", "image", "captions", "texts", "message"),
    [
        ("0.jpg", np.ones(DIM), ["a"], np.ones((1, DIM)), "image '0.jpg' came before"),
        ("", np.ones(DIM), ["a"], np.ones((1, DIM)), "image id is ''"),
        ("x", np.ones(DIM + 1), ["a"], np.ones((1, DIM)), r"image 'x': image_feature: shape \(1, 9\).*the store is 8"),
        ("x", np.ones(DIM), ["a"], np.ones((1, DIM - 1)), r"image 'x': text_features: shape \(1, 7\)"),
        ("x", np.ones(DIM), ["a"], np.ones(DIM), r"image 'x': text_features: shape \(8,\)"),
        ("x", np.ones(DIM), ["a", "b"], np.ones((1, DIM)), "image 'x': 2 captions and 1 rows"),
        ("x", np.ones(DIM), ["a", "b"], [[1.0] * DIM, [1.0]], "image 'x': text_features: the rows have different"),
        ("x", ["1"] * DIM, ["a"], np.ones((1, DIM)), "image 'x': image_feature: expected numbers"),
        ("x", np.ones(DIM), [], np.ones((0, DIM)), "image 'x': no list of captions"),
        ("x", np.ones(DIM), "ab", np.ones((2, DIM)), "image 'x': no list of captions"),
        ("x", np.ones(DIM), [" "], np.ones((1, DIM)), "image 'x': caption is ' '"),
        ("x", np.ones(DIM), [3], np.ones((1, DIM)), "image 'x': caption is 3"),
        ("x", np.full(DIM, np.nan), ["a"], np.ones((1, DIM)), "image 'x': image_feature, row 0: NaN"),
        ("x", np.ones(DIM), ["a"], np.full((1, DIM), np.inf), "image 'x': text_features, row 0: NaN or inf"),
        ("x", np.full(DIM, 7e4), ["a"], np.ones((1, DIM)), "image 'x': .*7e.04 does not fit float16.*dtype='float32'"),
    ],
)
def test_writer_refuses_and_writes_nothing_of_the_image(tmp_path, image_id, image, captions, texts, message):
    with FeatureStoreWriter(tmp_path / "store", DIM) as writer:
        writer.add("0.jpg", np.ones(DIM), ["first"], np.ones((1, DIM)))
        with pytest.raises(ValueError, match=message):
            writer.add(image_id, image, captions, texts)
        writer.add("last.jpg", torch.zeros(DIM), ["last"], torch.zeros(1, DIM))
    store = FeatureStore.open(tmp_path / "store", verify=True)
    assert [store.caption(row) for row in range(len(store))] == ["first", "last"]


def test_large_values_fit_float32(tmp_path):
    with FeatureStoreWriter(tmp_path / "store", 1, "float32") as writer:
        writer.add("x", [7e4], ["a"], [[1e30]])
    assert FeatureStore.open(tmp_path / "store", verify=True).gather([0]).text_features.tolist() == [[np.float32(1e30)]]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    with pytest.raises(error), FeatureStoreWriter(tmp_path / "store", DIM) as writer:  # noqa: PT012
        writer.add("x", np.ones(DIM), ["a"], np.ones((1, DIM)))
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_process_leaves_no_store(tmp_path):
    def die():
        with FeatureStoreWriter(tmp_path / "store", 2) as writer:
            writer.add("x", [1.0, 0.0], ["a"], [[1.0, 0.0]])
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "store").exists()
    with FeatureStoreWriter(tmp_path / "store", 2) as writer:
        writer.add("x", [1.0, 0.0], ["a"], [[1.0, 0.0]])
    assert len(FeatureStore.open(tmp_path / "store")) == 1


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image was added"), FeatureStoreWriter(tmp_path / "store", DIM):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_up_front(folder):
    before = {path.name: sha256_file(path) for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="exists already"):
        FeatureStoreWriter(folder, DIM)
    assert {path.name: sha256_file(path) for path in folder.iterdir()} == before


def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(FileExistsError), FeatureStoreWriter(tmp_path / "store", 1) as writer:  # noqa: PT012
        writer.add("x", [1.0], ["a"], [[1.0]])
        (tmp_path / "store").write_text("somebody else's")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert (tmp_path / "store").read_text() == "somebody else's"


@pytest.mark.parametrize(("options", "message"), [({"dim": 0}, "dim is 0"), ({"dim": 4, "dtype": "int8"}, "'int8'")])
def test_writer_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FeatureStoreWriter(tmp_path / "store", **options)


# Rows


@pytest.mark.parametrize(
    "rows", [[1, 5], (1, 5), range(1, 6, 4), np.array([1, 5], dtype=np.int16), torch.tensor([1, 5]), np.uint64([1, 5])]
)
def test_gather_takes_any_integers(folder, rows):
    store = FeatureStore.open(folder)
    np.testing.assert_array_equal(store.gather(rows).text_features, store.text_features[[1, 5]])


def test_gather_nothing(folder):
    batch = FeatureStore.open(folder).gather([])
    assert batch.image_features.shape == batch.text_features.shape == (0, DIM)
    assert batch.image_rows.shape == (0,)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 6], "row 6 is not an integer from 0 to 5: .*store has 6 rows"),
        ([0, -1], "row -1 is not"),
        ([0, 1.5], r"row 1\.5 is not"),
        (torch.tensor([1.0]), r"row 1\.0 is not"),
        ([True], "row True is not"),
        (["1"], "row '1' is not"),
        ([2**70], f"row {2**70} is not"),
        ([0, -1, 2**63], "row -1 is not"),
        ([None, 1], "row None is not"),
        ([[0, 1]], r"shape \(1, 2\)"),
        (3, r"shape \(\)"),
    ],
)
def test_gather_refuses(folder, rows, message):
    with pytest.raises(ValueError, match=message):
        FeatureStore.open(folder).gather(rows)


@given(rows=st.lists(st.integers(-(2**63), 2**64)))
@settings(max_examples=50, deadline=None)
def test_gather_returns_the_rows_or_names_a_bad_one(shared_store, rows):
    bad = [row for row in rows if not 0 <= row < len(shared_store)]
    if not bad:
        assert len(shared_store.gather(rows).image_rows) == len(rows)
        return
    with pytest.raises(ValueError, match="|".join(f"row {row} " for row in bad)):
        shared_store.gather(rows)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "store")[0]


@pytest.mark.parametrize("row", [-1, 6, 1.5])
def test_caption_and_image_id_refuse_rows(folder, row):
    store = FeatureStore.open(folder)
    for read in (store.caption, store.image_id):
        with pytest.raises(ValueError, match=f"row {row} .*6 rows"):
            read(row)


# Damage


@pytest.mark.parametrize("name", ["image_features.npy", "text_features.npy", "captions.arrow"])
def test_open_names_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        FeatureStore.open(folder)


def test_open_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no feature store at .*nowhere.*st-kdmcse extract"):
        FeatureStore.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["image_features.npy", "text_features.npy", "captions.arrow"])
@pytest.mark.parametrize("manifest", [True, False])
def test_open_refuses_truncated_files(folder, name, manifest):
    path = folder / name
    content = path.read_bytes()
    if not manifest:
        (folder / "manifest.json").unlink()
    for size in (len(content) - 16, len(content) // 2, 100, 0):
        path.write_bytes(content[:size])
        # The last 8 bytes of a stream say that it ends there: only the manifest's size tells that they are gone.
        if name == "captions.arrow" and not manifest and size == len(content) - 16:
            continue
        with pytest.raises(ValueError, match=name):
            FeatureStore.open(folder)


@pytest.mark.parametrize("name", ["image_features.npy", "text_features.npy", "captions.arrow"])
def test_open_refuses_a_longer_file(folder, name):
    with (folder / name).open("ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(ValueError, match=f"{name} has"):
        FeatureStore.open(folder)


@pytest.mark.parametrize("name", ["image_features.npy", "text_features.npy", "captions.arrow"])
def test_verify_refuses_a_flipped_byte(folder, name):
    # In the values of an array, in the text of the last caption: nothing that the structure shows.
    position = -3 if name.endswith(".npy") else (folder / name).read_bytes().rindex(b"caption 5")
    flip_byte(folder / name, position)
    store = FeatureStore.open(folder)
    with pytest.raises(ValueError, match=f"{name} is damaged: its SHA-256"):
        store.verify()
    with pytest.raises(ValueError, match="SHA-256"):
        FeatureStore.open(folder, verify=True)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_flipped_byte_goes_unnoticed(tmp_path_factory, pristine, data):
    folder = tmp_path_factory.mktemp("flipped") / "store"
    shutil.copytree(pristine, folder)
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        unchanged = path.name == "manifest.json" and json.loads(content) == json.loads(
            (pristine / "manifest.json").read_bytes()
        )
    except ValueError:
        unchanged = False
    if unchanged:
        FeatureStore.open(folder, verify=True)
        return
    with pytest.raises(ValueError, match=path.name):
        FeatureStore.open(folder, verify=True)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("pristine") / "store"
    write(path)
    return path


def test_open_refuses_an_edited_manifest(folder):
    edit_manifest(folder, fix_checksum=False, teacher="a better teacher")
    with pytest.raises(ValueError, match=r"manifest\.json was edited or damaged"):
        FeatureStore.open(folder)


@pytest.mark.parametrize("changes", [{"images": 4}, {"rows": 7}, {"dim": 9}, {"dtype": "float32"}])
def test_open_refuses_counts_that_do_not_match(folder, changes):
    edit_manifest(folder, fix_checksum=True, **changes)
    with pytest.raises(ValueError, match=f"says {next(iter(changes))} ="):
        FeatureStore.open(folder)


@pytest.mark.parametrize(
    ("changes", "message"), [({"version": 2}, "version 2.*upgrade"), ({"format": "other"}, "has the format")]
)
def test_open_refuses_other_formats(folder, changes, message):
    edit_manifest(folder, fix_checksum=True, **changes)
    with pytest.raises(ValueError, match=message):
        FeatureStore.open(folder)


def test_open_refuses_a_manifest_that_is_not_json(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        FeatureStore.open(folder)


def test_verify_checks_the_claim_of_norm_1(folder):
    plain = without_manifest(folder)
    features = np.load(plain / "image_features.npy")
    store = FeatureStore.open(plain)
    features[1] *= 2
    np.save(plain / "image_features.npy", features)
    with pytest.raises(ValueError, match=r"image_features\.npy, row 1: the norm is 2\.0"):
        store.verify()
    assert not FeatureStore.open(plain, verify=True).normalized


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_verify_names_the_row_of_a_value_that_is_not_finite(folder, value):
    plain = without_manifest(folder)
    features = np.load(plain / "text_features.npy")
    features[4, 2] = value
    np.save(plain / "text_features.npy", features)
    with pytest.raises(ValueError, match=r"text_features\.npy, row 4: .*NaN"):
        FeatureStore.open(plain, verify=True)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image_row", 3, "row 4: image_row 3 is out of range, there are 3 rows"),
        ("text_row", -1, "row 4: text_row -1 is out of range, there are 6 rows"),
    ],
)
def test_row_numbers_out_of_range_are_noticed_without_verify(folder, column, value, message):
    plain = without_manifest(folder)
    table = pd.read_csv(plain / "captions.csv")
    table.loc[4, column] = value
    table.to_csv(plain / "captions.csv", index=False)
    store = FeatureStore.open(plain)
    with pytest.raises(ValueError, match=message):
        store.gather([0])
    with pytest.raises(ValueError, match=message):
        store.verify()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("caption", " ", "row 4: the caption is empty"),
        ("image", "", "row 4: the image is empty"),
        ("image", "0.jpg", "row 4: image '0.jpg' has image_row 2 here and 0 in an earlier row"),
    ],
)
def test_verify_checks_the_table(folder, column, value, message):
    plain = without_manifest(folder)
    table = pd.read_csv(plain / "captions.csv")
    table.loc[4, column] = value
    table.to_csv(plain / "captions.csv", index=False)
    with pytest.raises(ValueError, match=message):
        FeatureStore.open(plain, verify=True)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((3, DIM + 1), np.float16), "float16 of dim 9"),
        (np.zeros((3, DIM), np.float32), "float32 of dim 8"),
        (np.zeros((3, DIM), np.float64), "image_features.npy holds float64"),
        (np.zeros((3, DIM), ">f2"), "image_features.npy holds >f2"),
        (np.zeros(DIM, np.float16), r"holds float16 \(8,\)"),
        (np.zeros((0, DIM), np.float16), "image_features.npy"),
        (np.zeros((3, DIM), np.float16, order="F"), "Fortran order"),
        (np.array([[None]]), "image_features.npy is not a whole .npy file"),
    ],
)
def test_open_refuses_arrays(folder, images, message):
    plain = without_manifest(folder)
    np.save(plain / "image_features.npy", images)
    with pytest.raises(ValueError, match=message):
        FeatureStore.open(plain)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY", b"PK\x03\x04"])
def test_open_refuses_what_is_not_npy(folder, content):
    (folder / "image_features.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"image_features\.npy"):
        FeatureStore.open(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,caption,image_row\nx,a,0\n", "text_row"),
        ("image,caption,image_row,text_row\nx,a,0\n", "captions.csv is damaged"),
        ("image,caption,image_row,text_row\nx,a,0,b\n", "captions.csv is damaged"),
        ("image,caption,image_row,text_row\nx,a,0,\n", "'text_row' has missing values"),
        ("image,caption,image_row,text_row\n", "has no rows"),
        ("", "captions.csv is damaged"),
    ],
)
def test_open_refuses_tables(folder, content, message):
    plain = without_manifest(folder)
    (plain / "captions.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        FeatureStore.open(plain)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"image": ["x"], "caption": ["a"], "image_row": [0]}, "no int64 column 'text_row'"),
        ({"image": [1], "caption": ["a"], "image_row": [0], "text_row": [0]}, "no string column 'image'"),
        ({"image": ["x"], "caption": ["a"], "image_row": [0.0], "text_row": [0]}, "no int64 column 'image_row'"),
        (
            {"image": ["x", None], "caption": ["a"] * 2, "image_row": [0] * 2, "text_row": [0] * 2},
            "'image' has missing",
        ),
    ],
)
def test_open_refuses_arrow_tables(folder, table, message):
    (folder / "manifest.json").unlink()
    table = pa.table(table)
    with pa.ipc.new_stream(folder / "captions.arrow", table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(ValueError, match=message):
        FeatureStore.open(folder)


# The plain layout


def test_a_plain_folder_opens_and_stays_as_it_is(folder):
    reference = FeatureStore.open(folder)
    batch = reference.gather(range(6))
    plain = without_manifest(folder)
    before = {path.name: (path.stat().st_mtime_ns, sha256_file(path)) for path in plain.iterdir()}
    store = FeatureStore.open(plain, verify=True)
    assert (store.teacher, store.normalized, len(store), store.num_images) == ("unknown", True, 6, 3)
    assert store.manifest["rows"] == 6
    np.testing.assert_array_equal(store.gather(range(6)).text_features, batch.text_features)
    assert store.dataset()[3] == {"sentence": "caption 3", "row": 3}
    assert {path.name: (path.stat().st_mtime_ns, sha256_file(path)) for path in plain.iterdir()} == before


def test_csv_captions_with_commas_quotes_line_ends_and_nulls(folder):
    plain = without_manifest(folder)
    captions = ['says "hi", twice', "two\nlines", "NULL", "n/a", "ünï©ode 犬", "a, b"]
    table = pd.read_csv(plain / "captions.csv").assign(caption=captions)
    table.to_csv(plain / "captions.csv", index=False, encoding="utf-8-sig")
    store = FeatureStore.open(plain, verify=True)
    assert [store.caption(row) for row in range(6)] == captions
    assert store.dataset()["sentence"][:] == captions


def test_a_manifest_may_cover_the_csv_encoding(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    without_manifest(folder)
    del manifest["files"]["captions.arrow"]
    csv = folder / "captions.csv"
    manifest["files"]["captions.csv"] = {"bytes": csv.stat().st_size, "sha256": sha256_file(csv)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    edit_manifest(folder, fix_checksum=True)
    assert FeatureStore.open(folder, verify=True).teacher == "some/teacher"


def test_real_features(shared_data):
    store = FeatureStore.open(shared_data / "flickr8k_features", verify=True)
    assert (len(store), store.num_images, store.dim, store.normalized) == (4920, 984, 512, True)
    table = pd.read_csv(shared_data / "flickr8k_features" / "captions.csv", keep_default_na=False)
    assert store.dataset()["sentence"][:] == table["caption"].tolist()
    batch = store.gather([4919, 0])
    np.testing.assert_array_equal(batch.text_features[0], np.load(store.path / "text_features.npy")[4919])
    own = (store.gather(range(4920)).text_features.astype(float) * store.image_features[store.image_rows]).sum(1)
    assert own.mean() == pytest.approx(0.29, abs=0.005)  # the README of the data says so


# Training data


def test_dataset(folder):
    store = FeatureStore.open(folder)
    dataset = store.dataset()
    assert dataset.column_names == ["sentence", "row"]
    assert dataset.to_list() == [{"sentence": f"caption {row}", "row": row} for row in range(6)]
    assert dataset.cache_files[0]["filename"] == str(folder / "captions.arrow")


@settings(max_examples=50, deadline=None)
@given(
    image_rows=st.lists(st.integers(0, 5), min_size=1, max_size=40),
    per_image=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_drawn_captions(image_rows, per_image, seed):
    image_rows = np.array(image_rows)
    rows = store_module._draw_rows(image_rows, per_image, seed)
    np.testing.assert_array_equal(rows, np.unique(rows))
    for image in np.unique(image_rows):
        assert (image_rows[rows] == image).sum() == min(per_image, (image_rows == image).sum())
    np.testing.assert_array_equal(rows, store_module._draw_rows(image_rows, per_image, seed))


def test_one_caption_an_image_depends_on_the_seed(folder):
    store = FeatureStore.open(folder)
    draws = {tuple(store.dataset(captions_per_image=1, seed=seed)["row"]) for seed in range(60)}
    assert draws == {(first, 2, last) for first in (0, 1) for last in (3, 4, 5)}
    row = store.dataset(captions_per_image=1)[2]
    assert row["sentence"] == store.caption(row["row"])
    with pytest.raises(ValueError, match="captions_per_image is 0"):
        store.dataset(captions_per_image=0)


def test_pickle_and_workers(folder):
    store = FeatureStore.open(folder)
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.gather([3]).text_features, store.gather([3]).text_features)
    assert len(pickle.dumps(store)) < 1000
    batches = list(DataLoader(range(6), batch_size=2, num_workers=2, collate_fn=store.gather))
    np.testing.assert_array_equal(np.concatenate([batch.text_features for batch in batches]), store.text_features)


def test_a_relative_path_survives_a_change_of_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    store = FeatureStore.open(folder.name)
    monkeypatch.chdir("/")
    assert len(pickle.loads(pickle.dumps(store))) == 6


# Thresholds


def thresholds(store, **options):
    return tuple(true_pair_score(store, pair, **options) for pair in ("text-text", "text-image"))


def test_thresholds_against_a_slow_loop(tmp_path):
    store, images, texts = write(tmp_path / "store", counts=(2, 1, 4, 3), dtype="float32")
    between, own = [], []
    for i in range(len(store)):
        own.append(float(texts[i] @ images[store.image_rows[i]]))
        between += [float(texts[i] @ texts[j]) for j in range(i) if store.image_rows[i] == store.image_rows[j]]
    assert thresholds(store) == pytest.approx((np.median(between), np.median(own)), abs=1e-6)


def test_thresholds_do_not_depend_on_the_scale_or_order_of_the_features(tmp_path):
    rng = np.random.default_rng(0)
    images, texts = unit(rng, 3, DIM), unit(rng, 9, DIM)
    ids, rows = ["a", "b", "c"], np.arange(9) % 3
    one = FeatureStore.from_arrays(tmp_path / "one", images, texts, list("abcdefghi"), rows, ids, "t")
    scaled = texts * rng.uniform(0.5, 4, (9, 1))
    order = rng.permutation(9)
    other = FeatureStore.from_arrays(
        tmp_path / "other", 9 * images, scaled[order], list("abcdefghi"), rows[order], ids, "t"
    )
    assert thresholds(other) == pytest.approx(thresholds(one), abs=1e-6)


def test_thresholds_of_the_released_score_are_dot_products(tmp_path):
    images, texts = np.array([[3.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 5.0]])
    store = FeatureStore.from_arrays(tmp_path / "raw", images, texts, list("abc"), [0, 0, 1], ["x", "y"], "t")
    assert true_pair_score(store, "image-text", "dot") == np.median([3, 6, 10])
    assert true_pair_score(store, "text-text", "dot") == 2
    assert true_pair_score(store, "image-image", "dot") is None


def test_no_text_threshold_where_each_image_has_one_caption(tmp_path):
    store, images, texts = write(tmp_path / "store", counts=(1, 1, 1), dtype="float32")
    text, image = thresholds(store)
    assert text is None
    assert image == pytest.approx(np.median((images * texts).sum(1)), abs=1e-6)


def test_thresholds_of_real_features(shared_data):
    store = FeatureStore.open(shared_data / "flickr8k_features")
    text, image = thresholds(store)
    assert 0.4 < text < 0.55
    assert 0.25 < image < 0.33
    sampled = thresholds(store, max_images=300, seed=1)
    assert sampled == thresholds(store, max_images=300, seed=1)
    assert sampled == pytest.approx((text, image), abs=0.03)


def test_sha256_file(tmp_path):
    path = Path(tmp_path / "abc")
    path.write_bytes(b"abc")
    seen = []
    assert sha256_file(path, seen.append) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert seen == [3]


def test_the_captions_are_a_frame(store):
    frame = store.to_frame()
    assert list(frame.columns) == ["image", "caption", "image_row", "text_row"]
    assert len(frame) == len(store)
    assert frame.caption.tolist() == [store.caption(row) for row in range(len(store))]
    assert (frame.image_row.to_numpy() == store.image_rows).all()
    assert frame.groupby("image").size().eq(3).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: value}, f"manifest.json says {name} = ") for value in (None, [1], {"a": 1})
          for name in ("teacher", "dim", "dtype", "normalized", "images")),
        ({"rows": True}, "says rows = True, expected a whole number"),
        ({"shared_space": "yes"}, "says shared_space = 'yes', expected true or false"),
        ({"source": 3}, "says source = 3, expected an object"),
        *(({"files": files}, "says files = .*bytes and sha256") for files in (None, [], {}, {"captions.arrow": 1})),
        ({"files": {"../secret": {"bytes": 1, "sha256": "0" * 64}}}, "and of no other file"),
    ],
)  # fmt: skip
def test_open_refuses_a_forged_manifest(folder, changes, message):
    edit_manifest(folder, fix_checksum=True, **changes)
    with pytest.raises(ValueError, match=message):
        FeatureStore.open(folder)


@pytest.mark.parametrize("missing", ["teacher", "dim", "normalized", "files", "rows"])
def test_open_refuses_a_manifest_without_a_field(folder, missing):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[missing]
    path.write_text(json.dumps({**manifest, "checksum": files.manifest_checksum(manifest)}))
    with pytest.raises(ValueError, match=f"manifest.json says {missing} = None, expected"):
        FeatureStore.open(folder)


def test_open_refuses_files_that_the_manifest_names_elsewhere(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    entries = {**manifest["files"], "../outside.npy": manifest["files"]["image_features.npy"]}
    edit_manifest(folder, fix_checksum=True, files=entries)
    with pytest.raises(ValueError, match="and of no other file"):
        FeatureStore.open(folder)


def test_a_manifest_of_thousands_of_brackets_is_damaged(folder):
    (folder / "manifest.json").write_text("[" * 60_000)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*copy or write the store again"):
        FeatureStore.open(folder)


def test_texts_outside_of_the_table_are_refused_when_it_is_opened(folder):
    """Reading them would end the process."""
    table = pa.ipc.open_stream(folder / "captions.arrow").read_all()
    offsets = np.frombuffer(table.column("caption").chunk(0).buffers()[1], np.int32)[: len(table) + 1].copy()
    content = (folder / "captions.arrow").read_bytes()
    assert content.count(offsets.tobytes()) == 1
    for position, value in ((2, 2**31 - 1), (2, -5), (len(table), 2**30), (0, -1)):
        damaged = offsets.copy()
        damaged[position] = value
        (folder / "captions.arrow").write_bytes(content.replace(offsets.tobytes(), damaged.tobytes()))
        with pytest.raises(ValueError, match=r"captions\.arrow is damaged"):
            FeatureStore.open(folder)


@pytest.mark.parametrize("image_id", ["a\0b", "\x1b[31m", "a\x7f"])
def test_ids_hold_no_control_characters(tmp_path, folder, image_id):
    features = np.ones((2, DIM), np.float32)
    with pytest.raises(ValueError, match="image row 1: the image id .* holds the control character"):
        FeatureStore.from_arrays(tmp_path / "a", features, features, ["x", "y"], [0, 1], ["a", image_id], "t")
    with (
        pytest.raises(ValueError, match="image row 0: the image id .* holds the control character"),
        FeatureStoreWriter(tmp_path / "a", DIM) as writer,
    ):
        writer.add(image_id, features[0], ["x"], features[:1])
    plain = without_manifest(folder)
    table = pd.read_csv(plain / "captions.csv")
    table["image"] = table["image"].replace("1.jpg", image_id)
    table.to_csv(plain / "captions.csv", index=False)
    with pytest.raises(ValueError, match=r"captions\.csv, row 2: the image id .* holds a control character"):
        FeatureStore.open(plain, verify=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("name", "rows"), [("image_features.npy", [0, 2]), ("text_features.npy", [0, 1])])
def test_features_that_are_not_finite_are_never_handed_out(folder, name, rows, value):
    plain = without_manifest(folder)
    features = np.load(plain / name)
    features[1, 3] = value
    np.save(plain / name, features)
    store = FeatureStore.open(plain)
    store.gather([5])
    for read in (
        lambda: store.gather(rows),
        lambda: store_statistics(store),
        lambda: ResidentFeatures(store, torch.device("cpu")),
        lambda: true_pair_score(store, "text-image"),
    ):
        with pytest.raises(ValueError, match=rf"{name}, row 1: NaN or infinite values"):
            read()
