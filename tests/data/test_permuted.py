"""A feature store with the wrong pictures."""

import pickle

import numpy as np

from st_kdmcse.data.permuted import PermutedFeatureStore


def test_every_image_has_the_features_of_another_one(store):
    permuted = PermutedFeatureStore(store.path, 3)
    rows = np.arange(len(store))
    batch, expected = permuted.gather(rows), store.gather(rows)
    np.testing.assert_array_equal(batch.text_features, expected.text_features)
    assert (batch.image_rows != expected.image_rows).all()
    np.testing.assert_array_equal(batch.image_features, store.image_features[batch.image_rows])
    pairs = set(zip(expected.image_rows.tolist(), batch.image_rows.tolist(), strict=True))
    assert len(pairs) == len({new for _, new in pairs}) == store.num_images
    assert permuted.checksum == store.checksum
    permuted.verify()


def test_the_permutation_is_that_of_the_seed(store):
    same, other = (PermutedFeatureStore(store.path, seed) for seed in (3, 4))
    again = pickle.loads(pickle.dumps(PermutedFeatureStore(store.path, 3)))
    np.testing.assert_array_equal(again.image_rows, same.image_rows)
    assert (other.image_rows != same.image_rows).any()
