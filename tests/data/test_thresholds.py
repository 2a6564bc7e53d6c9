"""Further tests of true_pair_score are in test_store.py."""

import numpy as np
import pytest

from st_kdmcse.data.thresholds import draw_images, true_pair_score, unit_rows


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
