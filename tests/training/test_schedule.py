"""Algorithm 1 as a batch sampler."""

from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import ConcatDataset, RandomSampler

from st_kdmcse.training.schedule import StepRatioBatchSampler, pair_interval


def sampler(texts, pairs, batch_size, **options):
    sources = []
    if texts:
        sources.append(Dataset.from_dict({"sentence": [str(i) for i in range(texts)]}))
    if pairs:
        sources.append(Dataset.from_dict({"sentence": [str(i) for i in range(pairs)], "row": list(range(pairs))}))
    samplers = [
        DefaultBatchSampler(RandomSampler(source), batch_size=batch_size, drop_last=False) for source in sources
    ]
    return StepRatioBatchSampler(ConcatDataset(sources), samplers, **options)


def kinds(batches, texts):
    """ "T" or "P" a batch; fails on a mixed one."""
    result = ""
    for batch in batches:
        is_pair = {index >= texts for index in batch}
        assert len(is_pair) == 1
        result += "P" if is_pair.pop() else "T"
    return result


def test_the_papers_interval():
    assert pair_interval(1_000_000, 29_783) == 34
    assert pair_interval(1_000_000, 5 * 29_783) == 7
    assert pair_interval(10, 1_000) == 2


def test_every_pth_step_is_a_pair_batch():
    batches = list(sampler(120, 40, 10, pair_every=4))
    assert kinds(batches, 120) == "TTTPTTTPTTTPTTTP"


def test_the_run_of_the_paper_has_54_687_steps():
    # 15,625 text batches of 64 in an epoch and a pair batch after every sixth.
    steps = sampler(1_000_000, 148_915, 64).steps
    assert steps == 15_625 + 15_624 // 6
    assert 3 * steps == 54_687


@settings(deadline=None, max_examples=60)
@given(
    texts=st.integers(1, 90),
    pairs=st.integers(1, 90),
    batch_size=st.integers(1, 12),
    every=st.none() | st.integers(2, 5),
    runs=st.integers(1, 3),
)
def test_an_epoch_passes_over_both_sources(texts, pairs, batch_size, every, runs):
    if min(texts, pairs) < batch_size * runs:
        return
    schedule = sampler(texts, pairs, batch_size, pair_every=every, run_length=runs)
    batches = list(schedule)
    assert len(batches) == len(schedule)
    every = pair_interval(texts, pairs, every)
    expected = "".join(("P" if step % every == 0 else "T") * runs for step in range(1, schedule.steps + 1))
    assert kinds(batches, texts) == expected
    for kind, size in (("T", texts), ("P", pairs)):
        drawn = [index for batch in batches if kinds([batch], texts) == kind for index in batch]
        whole = size // (batch_size * runs) * batch_size * runs  # incomplete steps are left out
        assert len(drawn) >= whole
        assert len(set(drawn[: size // batch_size * batch_size])) == min(len(drawn), size // batch_size * batch_size)
    assert all(len(batch) == batch_size for batch in batches)


def test_the_smaller_source_is_shuffled_anew_when_it_runs_out():
    schedule = sampler(200, 20, 10, pair_every=2)
    passes = [batch for batch in schedule if batch[0] >= 200]
    assert len(passes) == 19
    first, second = (sorted(passes[2 * k] + passes[2 * k + 1]) for k in range(2))
    assert first == second == list(range(200, 220))
    assert passes[:2] != passes[2:4]


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        torch.rand(3)  # the global generator must not matter
        schedule = sampler(50, 30, 5, seed=seed)
        schedule.set_epoch(epoch)
        return list(schedule)

    assert order(1, 0) == order(1, 0)
    assert len({str(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_one_source_alone():
    assert kinds(sampler(45, 0, 10), 45) == "TTTT"
    assert kinds(sampler(0, 45, 10), 0) == "PPPP"


def test_a_source_smaller_than_a_batch():
    assert [len(batch) for batch in islice(sampler(100, 3, 10, pair_every=2), 4)] == [10, 3, 10, 3]
    with pytest.raises(ValueError, match="3 rows does not fill a batch of 10"):
        sampler(100, 3, 10, run_length=2)


@pytest.mark.parametrize("every", [1, 0, -3])
def test_an_interval_that_leaves_no_text_is_refused(every):
    with pytest.raises(ValueError, match="at least 2"):
        sampler(20, 20, 5, pair_every=every)


def test_two_sources_of_a_kind_are_refused():
    source = Dataset.from_dict({"sentence": ["a", "b"]})
    samplers = [DefaultBatchSampler(RandomSampler(source), batch_size=1, drop_last=False)] * 2
    with pytest.raises(ValueError, match="concatenate_datasets"):
        StepRatioBatchSampler(ConcatDataset([source, source]), samplers)


def images_of(captions):
    """The image of each caption, for images with so many captions, in an order of no meaning."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(captions)), captions))


@settings(deadline=None, max_examples=60)
@given(captions=st.lists(st.integers(1, 6), min_size=1, max_size=30), per_image=st.integers(1, 4))
def test_a_pass_has_each_caption_once_in_groups_of_an_image(captions, per_image):
    images = images_of(captions)
    one_pass = sampler(0, len(images), len(images), image_rows=images, captions_per_image=per_image)
    ((*order,),) = one_pass
    assert sorted(order) == list(range(len(images)))
    found = images[order]
    for image, count in enumerate(captions):
        side_by_side = "".join("x" if each == image else " " for each in found).split()
        assert len(side_by_side) <= -(-count // per_image)


def test_a_batch_has_groups_of_different_images():
    images = images_of([4] * 64)
    schedule = sampler(0, 256, 16, image_rows=images, captions_per_image=2)
    batches = [np.unique(images[batch], return_counts=True)[1].tolist() for batch in schedule]
    assert batches == [[2] * 8] * 16


def test_what_is_left_over_is_spread_over_the_pass():
    images = images_of([5] * 64)
    schedule = sampler(0, 320, 32, image_rows=images, captions_per_image=2)
    singles = [(np.unique(images[batch], return_counts=True)[1] == 1).sum() for batch in schedule]
    assert min(singles) > 0
    assert max(singles) < 16


def test_one_caption_of_an_image_is_the_order_of_before():
    images = images_of([3] * 20)
    plain = list(sampler(100, 60, 8, pair_every=3))
    assert list(sampler(100, 60, 8, pair_every=3, image_rows=images, captions_per_image=1)) == plain
    grouped = list(sampler(100, 60, 8, pair_every=3, image_rows=images, captions_per_image=2))
    assert [batch for batch in grouped if batch[0] < 100] == [batch for batch in plain if batch[0] < 100]
    assert grouped != plain


def test_groups_need_the_image_of_each_pair():
    for images in (None, np.arange(7)):
        with pytest.raises(ValueError, match="images for 60 pairs"):
            sampler(100, 60, 8, image_rows=images, captions_per_image=2)
    with pytest.raises(ValueError, match="`captions_per_image_in_batch` must be at least 1"):
        sampler(100, 60, 8, captions_per_image=-1)
