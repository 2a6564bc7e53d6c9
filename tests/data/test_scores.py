"""Further tests of true_pair_score are in test_store.py."""

import numpy as np
import pytest

from st_kdmcse import FeatureStore
from st_kdmcse.data.scores import draw_captions, draw_images, negatives_removed, true_pair_score, unit_rows


def own_scores(store):
    batch = store.gather(np.arange(len(store)))
    return (batch.text_features * batch.image_features).sum(axis=1)


@pytest.mark.parametrize("quantile", [0, 0.1, 0.5, 0.87, 1])
def test_a_quantile_of_the_scores_of_true_pairs(store, quantile):
    found = true_pair_score(store, "text-image", quantile=quantile)
    assert found == pytest.approx(np.quantile(own_scores(store), quantile), abs=1e-6)
    share = (own_scores(store) >= found - 1e-6).mean()
    assert share == pytest.approx(1 - quantile, abs=1.5 / len(store))


def test_the_default_is_the_median(store):
    assert true_pair_score(store, "text-text") == true_pair_score(store, "text-text", quantile=0.5)
    assert true_pair_score(store, "text-text", quantile=0.4) < true_pair_score(store, "text-text")


@pytest.mark.parametrize("quantile", [-0.1, 1.1, float("nan")])
def test_a_quantile_out_of_range_is_refused(store, quantile):
    with pytest.raises(ValueError, match="expected a number from 0 to 1"):
        true_pair_score(store, "text-text", quantile=quantile)


def test_images_are_drawn_once_each(store):
    drawn = draw_images(store, 10, seed=3)
    assert len(set(drawn.tolist())) == 10
    assert set(drawn.tolist()) <= set(range(24))
    assert drawn.tolist() == draw_images(store, 10, seed=3).tolist() != draw_images(store, 10, seed=4).tolist()
    assert draw_images(store, 24, seed=3).tolist() == list(range(24))


def test_unit_rows():
    rows = unit_rows(np.array([[3, 4], [0, 0], [-2, 0]], dtype=np.float16))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0], [-1, 0]], atol=1e-7)


@pytest.mark.parametrize("pair", ["text-text", "text-image", "image-text", "image-image"])
@pytest.mark.parametrize(("score", "inclusive"), [("cosine", True), ("dot", True), ("dot", False)])
def test_negatives_removed_are_counted_as_in_a_loop(tmp_path, pair, score, inclusive):
    generator = np.random.default_rng(0)
    images = generator.integers(-2, 3, size=(30, 4)).astype(np.float32)
    texts = generator.integers(-2, 3, size=(90, 4)).astype(np.float32)
    rows = np.repeat(np.arange(30), 3)
    names = [f"{row}.jpg" for row in range(30)]
    captions = [f"caption {row}" for row in range(90)]
    store = FeatureStore.from_arrays(tmp_path / "store", images, texts, captions, rows, names, teacher="t")
    drawn, _ = draw_captions(store.image_rows, 12, np.random.default_rng(5))
    features = {"text": texts[drawn], "image": images[rows[drawn]]}
    anchor, candidate = (features[name].astype(np.float64) for name in pair.split("-"))
    threshold, hits = 1.0 if score == "dot" else 0.4511, 0
    for i in range(12):
        for j in range(12):
            value = anchor[i] @ candidate[j]
            if score == "cosine":
                value /= max(np.linalg.norm(anchor[i]) * np.linalg.norm(candidate[j]), 1e-30)
            hits += i != j and (value >= threshold if inclusive else value > threshold)
    found = negatives_removed(store, pair, threshold, score, inclusive, max_images=12, seed=5)
    assert 0 < found < 1
    assert found == pytest.approx(hits / (12 * 11), abs=1e-12)


def test_a_store_of_one_image_has_no_negatives(tmp_path):
    store = FeatureStore.from_arrays(
        tmp_path / "one", np.ones((1, 2)), np.ones((2, 2)), ["a", "b"], [0, 0], ["a.jpg"], "t"
    )
    assert negatives_removed(store, "text-text", -1.0) == 0
