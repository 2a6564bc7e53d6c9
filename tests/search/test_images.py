"""Images that sentences and images find."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("faiss")
pytest.importorskip("torchvision")

from PIL import Image
from sentence_transformers import SentenceTransformer

from st_kdmcse import FeatureStore
from st_kdmcse.files import manifest_checksum
from st_kdmcse.search.images import captions_by_image, index_images
from st_kdmcse.search.semantic_index import SemanticIndex


@pytest.fixture(scope="module")
def model(tiny_multimodal):
    return SentenceTransformer(str(tiny_multimodal), device="cpu")


@pytest.fixture
def folder(photos, tmp_path):
    """Eight images, of which one lies in a folder; and what is not to be indexed."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number, photo in enumerate(photos[:8]):
        shutil.copy(photo, folder / ("more/7.JPG" if number == 7 else f"{number}.jpg"))
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_bytes(b"no image")
    return folder


def test_rows_are_found_by_sentences_and_images(model, tiny_multimodal, folder, tmp_path):
    index = index_images(folder, str(tiny_multimodal), tmp_path / "index")
    names = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg", "6.jpg", "more/7.JPG"]
    assert [(hit.text, hit.metadata) for hit in index.get(names)] == [(name, {"image": name}) for name in names]
    images = model.encode([Image.open(folder / name) for name in names], normalize_embeddings=True)
    for query, hits in zip(("a dog", "snow"), index.search(["a dog", "snow"], k=8), strict=True):
        expected = images @ model.encode(query, normalize_embeddings=True)
        assert {hit.id: hit.score for hit in hits} == pytest.approx(dict(zip(names, expected, strict=True)), abs=1e-5)
    loaded = SemanticIndex.load(tmp_path / "index")
    for query in (folder / "3.jpg", Image.open(folder / "3.jpg"), (folder / "3.jpg").read_bytes()):
        (hits,) = loaded.search_images([query], k=8)
        expected = dict(zip(names, images @ images[3], strict=True))
        assert {hit.id: hit.score for hit in hits} == pytest.approx(expected, abs=1e-5)
        assert hits[0].id == "3.jpg"
    assert loaded.images == folder


def test_a_query_that_names_an_image_is_a_text(model, folder, tmp_path):
    index = index_images(folder, model, tmp_path / "index")
    path = str(folder / "3.jpg")
    expected = index_images(folder, model, tmp_path / "other").backend.search(
        np.asarray(model.encode([{"text": path}], normalize_embeddings=True)), 8
    )
    assert [hit.id for hit in index.search(path, k=8)] == [hit.id for hit in expected[0]]
    assert index.search(path, k=1)[0].score < 0.99
    index.search("https://example.invalid/dog.jpg")  # is not fetched


def test_captions_of_a_feature_store(model, folder, tmp_path):
    names, rows = ["0.jpg", "1.jpg", "more/7.JPG"], [0, 0, 1, 2]
    features = np.random.default_rng(0).normal(size=(4, 5))
    store = FeatureStore.from_arrays(tmp_path / "store", features[:3], features, list("abcd"), rows, names, teacher="t")
    index = index_images(folder, model, tmp_path / "index", captions=captions_by_image(store))
    assert [hit.text for hit in index.get(names)] == ["a\nb", "c", "d"]
    assert len(index) == 3
    assert index.info()["rows_are"] == "images"
    (folder / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images are not in .*, the first is 1\.jpg"):
        index_images(folder, model, tmp_path / "again", captions=captions_by_image(store))
    assert not (tmp_path / "again").exists()


def test_an_index_that_searches_some_is_tuned_on_sentences(model, folder, tmp_path):
    by_image = {f"{number}.jpg": [f"a dog {number}", f"snow {number}"] for number in range(7)}
    for number, (options, queries) in enumerate([({"captions": by_image}, 14), ({"tune_queries": ["a", "b"]}, 2)]):
        tuning = index_images(folder, model, tmp_path / str(number), factory="HNSW8", **options).backend.tuning
        assert (tuning.queries, tuning.source) == (queries, "queries")
    with pytest.raises(ValueError, match="`tune_queries` are"):
        index_images(folder, model, tmp_path / "none", tune_queries=[])


def test_images_are_removed_but_texts_not_added(tiny_multimodal, folder, tmp_path):
    index_images(folder, str(tiny_multimodal), tmp_path / "index")
    index = SemanticIndex.load(tmp_path / "index")
    with pytest.raises(ValueError, match="an index of images"):
        index.add(["a dog"])
    with pytest.raises(ValueError, match="an index of images"):
        index.update(["0.jpg"], ["a dog"])
    index.remove(["0.jpg"])
    index.save()
    assert len(SemanticIndex.load(tmp_path / "index")) == 7


def test_an_image_that_cannot_be_decoded(model, folder, tmp_path, caplog):
    content = (folder / "2.jpg").read_bytes()
    (folder / "2.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"2\.jpg cannot be decoded .*skip leaves it out \(`on_error`\)"):
        index_images(folder, model, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    index = index_images(folder, model, tmp_path / "index", on_error="skip")
    assert len(index) == 7
    assert "2.jpg cannot be decoded" in caplog.text
    assert index.search_images([folder / "4.jpg"], k=1)[0][0].id == "4.jpg"
    with pytest.raises(ValueError, match=r"2\.jpg cannot be decoded"):
        index.search_images([folder / "2.jpg"])


def test_what_cannot_be_indexed(model, student, folder, tmp_path):
    with pytest.raises(ValueError, match="encodes no images: make one of sentences and images"):
        index_images(folder, student, tmp_path / "index")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        index_images(tmp_path / "nowhere", model, tmp_path / "index")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        index_images(tmp_path / "empty", model, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    index_images(folder, model, tmp_path / "index")
    with pytest.raises(ValueError, match="there is an index at"):
        index_images(folder, model, tmp_path / "index")
    texts = SemanticIndex.build(student, ["a dog"])
    with pytest.raises(ValueError, match="the model of this index encodes no images"):
        texts.search_images([folder / "1.jpg"])


def test_an_index_with_an_encoder_of_its_own(tiny_multimodal, folder, tmp_path):
    index_images(folder, str(tiny_multimodal), tmp_path / "index")
    path = tmp_path / "index" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["encoder"] = {"modules.json": "0"}
    manifest["checksum"] = manifest_checksum(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="made by an earlier version.*export a model of sentences and images"):
        SemanticIndex.load(tmp_path / "index")
