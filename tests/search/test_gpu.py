"""Tests of st_kdmcse.search.gpu that need no GPU; the others are in tests/test_gpu.py."""

import numpy as np
import pytest

from st_kdmcse.search.factory import new_index
from st_kdmcse.search.gpu import _lists, _whole_vectors

VECTORS = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)


def trained(factory):
    index = new_index(16, factory)
    index.train(VECTORS)
    index.add(VECTORS)
    return index


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF4,PQ8x4fs,RFlat", "SQ8,RFlat"])
def test_whole_vectors_are_found(factory):
    index = trained(factory)
    assert _whole_vectors(index).ntotal == 2000


@pytest.mark.parametrize("factory", ["IVF4,Flat", "IVF4,SQ8", "IVF4,PQ4np", "IVF4_HNSW8,Flat"])
def test_lists_that_a_gpu_can_search(factory):
    index = trained(factory)
    assert _whole_vectors(index) is None
    assert _lists(index).ntotal == 2000
    index.nprobe = 3000
    with pytest.raises(ValueError, match="looks at 3,000 lists"):
        _lists(index)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("IVF4,PQ8x4fs", "no IndexIVFPQFastScan for GPUs"),
        ("IVF4,PQ8x4fs,RFlat", "refinement or transforms"),
        ("PCA8,IVF4,Flat", "refinement or transforms"),
        ("SQ8", "no IndexScalarQuantizer for GPUs"),
    ],
)
def test_lists_that_stay_on_the_cpu(factory, message):
    index = trained(factory)
    with pytest.raises(ValueError, match=message):
        _lists(index)
