"""Dropout from few random numbers."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from st_kdmcse.dropout import FastDropout, dropout, fast_dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_zeros_is_p_and_the_mean_stays(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, dtype=dtype)
    y = dropout(x, p)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    share = (y == 0).float().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-17
    assert torch.allclose(y[y != 0].float(), torch.tensor(1 / (1 - p)), rtol=1e-4 if dtype == torch.float32 else 4e-3)


def test_neighbours_are_independent():
    torch.manual_seed(0)
    kept = (dropout(torch.ones(2**20), 0.3) != 0).float()
    for distance in (1, 2, 3, 4, 5, 64):
        both = (kept[distance:] * kept[:-distance]).mean().item()
        assert abs(both - 0.7**2) < 5 * (0.49 * 0.51 / len(kept)) ** 0.5


def test_each_place_in_a_random_number_drops_equally_often():
    torch.manual_seed(0)
    kept = (dropout(torch.ones(2**18, 4), 0.1) != 0).float().mean(dim=0)
    assert (kept - 0.9).abs().max() < 5 * (0.09 / 2**18) ** 0.5


def test_gradients_pass_where_the_value_does():
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.4)
    y.sum().backward()
    assert torch.allclose(x.grad * x, y)


def test_the_generator_of_torch_decides():
    x = torch.ones(3, 11)
    torch.manual_seed(1)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5), first)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_a_p_out_of_range_is_refused(p):
    with pytest.raises(ValueError, match="p must be in"):
        dropout(torch.ones(2), p)


def test_nothing_is_dropped_from_nothing():
    assert dropout(torch.ones(0, 3), 0.5).shape == (0, 3)


def test_modules_are_fast_inside_of_the_block_only():
    class Own(nn.Dropout):
        pass

    model = nn.Sequential(nn.Dropout(0.5), Own(0.5), nn.Dropout(1.0))
    with fast_dropout(model):
        assert [type(module) for module in model] == [FastDropout, Own, nn.Dropout]
        torch.manual_seed(0)
        expected = dropout(torch.ones(40), 0.5)
        torch.manual_seed(0)
        assert torch.equal(model[0](torch.ones(40)), expected)
        assert torch.equal(model[0].eval()(torch.ones(4)), torch.ones(4))
    assert [type(module) for module in model] == [nn.Dropout, Own, nn.Dropout]


def test_modules_are_as_before_after_an_error():
    layer = nn.Dropout(0.5)
    with pytest.raises(RuntimeError), fast_dropout(layer):
        raise RuntimeError
    assert type(layer) is nn.Dropout


def test_a_student_has_other_views_and_the_same_embeddings(student, sentences):
    assert isinstance(student, SentenceTransformer)
    features = student.preprocess(sentences[:4])
    with fast_dropout(student), torch.no_grad():
        student.train()
        first, second = (student(dict(features))["sentence_embedding"] for _ in range(2))
        assert not torch.allclose(first, second)
        student.eval()
        inside = student(dict(features))["sentence_embedding"]
    assert torch.equal(inside, student(dict(features))["sentence_embedding"])
