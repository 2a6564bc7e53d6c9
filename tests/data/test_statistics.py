"""The statistics of a store's scores: what they are, and how they are kept."""

import json

import numpy as np
import pytest
import torch
from helpers import copy_tree

from st_kdmcse import FeatureStore
from st_kdmcse.config import SCORE_KINDS
from st_kdmcse.data import statistics
from st_kdmcse.data.statistics import store_statistics


@pytest.fixture
def own_store(store, tmp_path):
    folder = copy_tree(store.path, tmp_path / "store")
    (folder / "statistics.json").unlink(missing_ok=True)
    return FeatureStore.open(folder)


def all_pairs(store):
    """Scores of all pairs of captions of different images, by kind, and of all captions of one image."""
    batch = store.gather(np.arange(len(store)))
    texts, images = batch.text_features.astype(np.float64), batch.image_features.astype(np.float64)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    text_image = texts @ images.T
    scores = np.stack([texts @ texts.T, (text_image + text_image.T) / 2, images @ images.T, text_image])
    same = batch.image_rows[:, None] == batch.image_rows
    return scores[:, ~same], scores[0][same & ~np.eye(len(texts), dtype=bool)]


def test_they_are_those_of_all_pairs_but_for_the_sample(own_store):
    scores, same = all_pairs(own_store)
    found = store_statistics(own_store)
    assert len(SCORE_KINDS) == len(found.mean) == 4
    assert found.quantiles.shape == (4, 1001)
    np.testing.assert_allclose(found.mean, scores.mean(axis=1), atol=0.05)
    np.testing.assert_allclose(found.std, scores.std(axis=1), atol=0.05)
    np.testing.assert_allclose(found.correlation, np.corrcoef(scores), atol=0.1)
    np.testing.assert_allclose(found.quantiles[:, 500], np.median(scores, axis=1), atol=0.1)
    assert found.same_image_mean == pytest.approx(same.mean(), abs=0.1)
    assert found.same_image_std == pytest.approx(same.std(), abs=0.1)


def test_with_one_caption_an_image_and_all_pairs_they_are_exact(tmp_path):
    generator = np.random.default_rng(0)
    images, texts = generator.normal(size=(2, 31, 6))
    store = FeatureStore.from_arrays(
        tmp_path / "store", images, texts, ["a"] * 31, np.arange(31), [f"{i}.jpg" for i in range(31)], "t"
    )
    found = store_statistics(store)
    scores, _ = all_pairs(store)
    # Of text-image, a sample has one of the two directions.
    np.testing.assert_allclose(found.mean[:3], scores.mean(axis=1)[:3], atol=1e-6)
    np.testing.assert_allclose(found.std[:3], scores.std(axis=1)[:3], atol=1e-6)
    np.testing.assert_allclose(found.correlation[:3, :3], np.corrcoef(scores)[:3, :3], atol=1e-6)
    assert found.same_image_mean == found.same_image_std == 0


def test_they_are_kept_and_read_again(own_store, monkeypatch):
    first = store_statistics(own_store)
    content = (own_store.path / "statistics.json").read_bytes()
    monkeypatch.setattr(statistics, "_computed", None)
    again = store_statistics(FeatureStore.open(own_store.path, verify=True))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    monkeypatch.undo()
    (own_store.path / "statistics.json").unlink()
    store_statistics(own_store)
    assert (own_store.path / "statistics.json").read_bytes() == content


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:100],
        lambda text: "[]",
        lambda text: text.replace('"mean"', '"moon"'),
        lambda text: text.replace('"store": "', '"store": "0'),
        lambda text: json.dumps({**json.loads(text), "std": ["a"] * 4}),
        lambda text: json.dumps({**json.loads(text), "mean": [0.1]}),
        lambda text: json.dumps({**json.loads(text), "mean": [float("nan")] * 4}),
        lambda text: json.dumps({**json.loads(text), "quantiles": 1}),
        lambda text: json.dumps({**json.loads(text), "pairs": 5}),
    ],
)
def test_a_file_that_does_not_fit_is_replaced(own_store, damage):
    expected = store_statistics(own_store)
    path = own_store.path / "statistics.json"
    good = path.read_text()
    path.write_text(damage(good))
    assert path.read_text() != good
    found = store_statistics(own_store)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert path.read_text() == good


def test_a_folder_that_cannot_be_written_to_is_no_error(own_store, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(statistics, "write_json", refuse)
    found = store_statistics(own_store)
    assert found.mean.isfinite().all()
    assert not (own_store.path / "statistics.json").exists()


def test_nothing_is_written_into_a_folder_without_a_manifest(own_store):
    expected = store_statistics(own_store)
    for name in ("manifest.json", "statistics.json"):
        (own_store.path / name).unlink()
    found = store_statistics(FeatureStore.open(own_store.path))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not (own_store.path / "statistics.json").exists()


def test_a_sample_of_images_and_pairs_is_enough(tmp_path):
    generator = np.random.default_rng(0)
    images = generator.normal(size=(3000, 8))
    texts = images + generator.normal(size=(3000, 8))
    store = FeatureStore.from_arrays(
        tmp_path / "store", images, texts, ["a"] * 3000, np.arange(3000), [f"{i}.jpg" for i in range(3000)], "t"
    )
    many, few = store_statistics(store), store_statistics(store, pairs=5000, max_images=1000)
    np.testing.assert_allclose(many.mean, few.mean, atol=0.03)
    np.testing.assert_allclose(many.std, few.std, atol=0.03)
    np.testing.assert_allclose(many.quantiles[:, 100:901], few.quantiles[:, 100:901], atol=0.06)


def test_a_store_of_one_image_has_none(tmp_path):
    store = FeatureStore.from_arrays(
        tmp_path / "one", np.ones((1, 2)), np.ones((2, 2)), ["a", "b"], [0, 0], ["a.jpg"], "t"
    )
    with pytest.raises(ValueError, match="features of 1 image"):
        store_statistics(store)


def test_real_features(shared_data):
    found = store_statistics(FeatureStore.open(shared_data / "flickr8k_features"))
    assert (found.std > 0.01).all()
    assert found.same_image_mean > found.mean[0] + 2 * found.std[0]


def test_a_changed_digit_is_noticed(store, caplog):
    first = store_statistics(store)
    path = store.path / "statistics.json"
    kept = json.loads(path.read_text())
    kept["mean"][0] += 0.001
    path.write_text(json.dumps(kept))
    assert torch.equal(store_statistics(store).mean, first.mean)
    assert "was edited or damaged: it is computed again" in caplog.text
