import json
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st_kdmcse.data.released import import_released_json
from st_kdmcse.data.store import FeatureStore


def record(value=0.5, captions=("a", "b"), dim=3):
    return {"image_feat": [value] * dim, "captions": list(captions), "lang_feat": [[value] * dim for _ in captions]}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_real_file(shared_data, tmp_path):
    source = shared_data / "flickr8k_features" / "released_format_60.json"
    store = import_released_json(source, tmp_path / "store", teacher="ViT-B-32")
    store.verify()
    content = json.loads(source.read_text())
    assert (store.num_images, len(store), store.dim, store.normalized) == (60, 300, 512, True)
    assert (store.teacher, store.dtype) == ("ViT-B-32", np.float16)
    row = 0
    for image, (image_id, expected) in enumerate(content.items()):
        for caption, features in zip(expected["captions"], expected["lang_feat"], strict=True):
            batch = store.gather([row])
            assert (store.image_id(row), store.caption(row), batch.image_rows[0]) == (image_id, caption, image)
            np.testing.assert_array_equal(batch.text_features[0], np.float16(features))
            np.testing.assert_array_equal(batch.image_features[0], np.float16(expected["image_feat"]))
            row += 1


def test_the_released_file_agrees_with_the_plain_folder(shared_data, tmp_path):
    folder = shared_data / "flickr8k_features"
    plain = FeatureStore.open(folder)
    store = import_released_json(folder / "released_format_60.json", tmp_path / "store", dtype="float32")
    row_of_caption = {(plain.image_id(row), plain.caption(row)): row for row in range(len(plain))}
    rows = [row_of_caption[store.image_id(row), store.caption(row)] for row in range(len(store))]
    ours, theirs = store.gather(range(len(store))), plain.gather(rows)
    np.testing.assert_allclose(ours.text_features, theirs.text_features, atol=1e-3)
    np.testing.assert_allclose(ours.image_features, theirs.image_features, atol=1e-3)


def test_integers_and_unicode(tmp_path):
    source = write(
        tmp_path / "f.json", {"犬.jpg": {"image_feat": [1, 0], "captions": ["ein Hündchen"], "lang_feat": [[0, 1.0]]}}
    )
    store = import_released_json(source, tmp_path / "store")
    assert (store.image_id(0), store.caption(0), store.normalized) == ("犬.jpg", "ein Hündchen", True)


def without(key):
    return {name: value for name, value in record().items() if name != key}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (without("image_feat"), "no list image_feat; the layout is"),
        (without("captions"), "no list captions"),
        (without("lang_feat"), "no list lang_feat"),
        ({}, "no list image_feat, captions, lang_feat"),
        ([1, 2], "has list as its value"),
        (None, "has NoneType as its value"),
        ({**record(), "captions": "a b"}, "no list captions"),
        ({**record(), "image_feat": []}, "image_feat is not a flat list"),
        ({**record(), "image_feat": [[0.5] * 3]}, "image_feat is not a flat list"),
        ({**record(), "image_feat": [0.5, [0.5], 0.5]}, "image_feature: the rows have different lengths"),
        ({**record(), "image_feat": ["0.5"] * 3}, "image_feature: expected numbers"),
        ({**record(), "image_feat": [0.5, None, 0.5]}, "image_feature: expected numbers"),
        (record(dim=4), r"image_feature: shape \(1, 4\), expected \(n, 3\)"),
        ({**record(), "lang_feat": [[0.5] * 4] * 2}, r"text_features: shape \(2, 4\), expected \(n, 3\)"),
        ({**record(), "lang_feat": [[0.5] * 3]}, "2 captions and 1 rows of text_features"),
        ({**record(), "lang_feat": [[0.5] * 3, [0.5]]}, "text_features: the rows have different lengths"),
        ({**record(), "captions": ["a", ""]}, "caption is ''"),
        ({**record(), "captions": ["a", 1]}, "caption is 1"),
        ({**record(), "captions": [], "lang_feat": []}, "no list of captions"),
        (record(value=1e5), "does not fit float16.*dtype='float32'"),
    ],
)
def test_a_malformed_image_is_named_and_nothing_stays(tmp_path, second, message):
    source = write(tmp_path / "features.json", {"one.jpg": record(), "two.jpg": second})
    with pytest.raises(ValueError, match=rf"features.json, image number 2: image 'two.jpg'.*{message}"):
        import_released_json(source, tmp_path / "store")
    assert list(tmp_path.iterdir()) == [source]


def test_a_duplicate_image_is_named(tmp_path):
    one = json.dumps(record())
    source = write(tmp_path / "f.json", f'{{"x": {one}, "y": {one}, "x": {one}}}')
    with pytest.raises(ValueError, match=r"f.json, image number 3: image 'x' came before"):
        import_released_json(source, tmp_path / "store")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("content", ["{}", "[]", '[{"a": 1}]', "3", '"text"'])
def test_a_file_without_images(tmp_path, content):
    with pytest.raises(ValueError, match=r"f.json holds no images, expected an object"):
        import_released_json(write(tmp_path / "f.json", content), tmp_path / "store")


@pytest.mark.parametrize("content", ["", "   ", "not json", "{'x': 1}", '{"x": {"image_feat": [NaN]}}', '{"x"; 1}'])
def test_a_file_that_is_not_json(tmp_path, content):
    with pytest.raises(ValueError, match=r"f.json is not whole, valid JSON"):
        import_released_json(write(tmp_path / "f.json", content), tmp_path / "store")


WHOLE = json.dumps({f"{image}.jpg": record() for image in range(4)})


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, len(WHOLE) - 1))
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path_factory, length):
    folder = tmp_path_factory.mktemp("cut")
    source = write(folder / "f.json", WHOLE[:length])
    with pytest.raises(ValueError, match=r"f.json is not whole, valid JSON.*download it again"):
        import_released_json(source, folder / "store")
    assert list(folder.iterdir()) == [source]


def test_the_error_of_a_truncated_file_names_the_last_whole_image(tmp_path):
    source = write(tmp_path / "f.json", WHOLE[: WHOLE.index('"3.jpg"') + 20])
    with pytest.raises(ValueError, match=r"after image number 3 \('2\.jpg'\)"):
        import_released_json(source, tmp_path / "store")


def test_trailing_garbage(tmp_path):
    with pytest.raises(ValueError, match="not whole, valid JSON"):
        import_released_json(write(tmp_path / "f.json", WHOLE + "}"), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*missing.json"):
        import_released_json(tmp_path / "missing.json", tmp_path / "store")
    source = write(tmp_path / "f.json", WHOLE)
    (tmp_path / "store").mkdir()
    with pytest.raises(FileExistsError, match="store exists already"):
        import_released_json(source, tmp_path / "store")


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(images):
        one = json.dumps(record(0.0441941738, captions=["a caption of some length"] * 5, dim=512))
        source = tmp_path / f"{images}.json"
        with source.open("w") as file:
            file.write("{" + ", ".join(f'"{image}.jpg": {one}' for image in range(images)) + "}")
        tracemalloc.start()
        store = import_released_json(source, tmp_path / f"store-{images}")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert store.num_images == images
        return most, source.stat().st_size

    small, _ = peak(20)
    large, size = peak(400)
    assert size > 15_000_000
    assert large < size / 5
    assert large - small < 2_000_000  # most of it is the checksum, which reads small files in one chunk


def test_progress(tmp_path, capsys):
    source = write(tmp_path / "f.json", WHOLE)
    import_released_json(source, tmp_path / "shown", show_progress_bar=True)
    assert "Importing f.json: 100%" in capsys.readouterr().err
    import_released_json(source, tmp_path / "hidden", show_progress_bar=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
        (b"\x93NUMPY\x01\0", "a NumPy array"),
        (pickle.dumps({"a": 1}), "a pickle"),
        (b"PAR1", "a Parquet table"),
    ],
)
def test_features_in_other_formats_are_called_by_their_name(tmp_path, content, what):
    path = tmp_path / "features.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"features.json is {what}.*FeatureStore.from_arrays"):
        import_released_json(path, tmp_path / "store")


def test_brackets_without_end_are_refused(tmp_path):
    path = tmp_path / "features.json"
    path.write_text('{"a.jpg": {"image_feat": ' + "[" * 60_000)
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        import_released_json(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()
