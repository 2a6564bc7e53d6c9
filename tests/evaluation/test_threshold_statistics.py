import json
import tracemalloc

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import copy_tree, load_command
from scipy.stats import rankdata

from st_kdmcse import FeatureStore, KDMCSEConfig, KDMCSELoss
from st_kdmcse.data import FeatureStoreWriter, true_pair_score
from st_kdmcse.data.scores import draw_images
from st_kdmcse.evaluation import threshold_statistics as module
from st_kdmcse.evaluation.threshold_plots import plot_threshold_statistics
from st_kdmcse.evaluation.threshold_statistics import (
    BINS,
    PAPER_THRESHOLD,
    threshold_statistics,
)

DIM = 6


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Images with 1 to 5 captions in mixed order, and an image without any."""
    generator = np.random.default_rng(2)
    images = generator.normal(size=(12, DIM))
    rows = generator.permutation(np.repeat(np.arange(12), [1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 3]))
    texts = images[rows] + 0.9 * generator.normal(size=(len(rows), DIM))
    captions = [f"caption {number}" for number in range(len(rows))]
    folder = tmp_path_factory.mktemp("uneven") / "store"
    # Not normalised: cosines are wanted all the same.
    return FeatureStore.from_arrays(folder, images, texts, captions, rows, [f"{row}.jpg" for row in range(12)], "t")


def cosine(one, other):
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def slow(store, images, batch_size=64):
    """Scores of true pairs and of others on both branches, and the ranks, pair by pair."""
    owners, texts = store.image_rows, store.text_features
    scores = {"text-text": ([], []), "text-image": ([], [])}
    ranks, best = [], []
    for image in images:
        own = np.flatnonzero(owners == image)
        for i in own:
            for j in range(len(store)):
                if i != j:
                    scores["text-text"][int(owners[j] != image)].append(cosine(texts[i], texts[j]))
        to_all = np.array([cosine(store.image_features[image], text) for text in texts])
        for j in range(len(store)):
            scores["text-image"][int(owners[j] != image)].append(to_all[j])
        of_image = rankdata(-to_all)[own]
        ranks += of_image.tolist()
        best.append(of_image.min())
    return scores, np.array(ranks), np.array(best)


def agrees(store, statistics, images):
    scores, ranks, best = slow(store, images)
    for branch in statistics.branches:
        true, non = map(np.array, scores[branch.name])
        for found, expected in ((branch.true_histogram, true), (branch.non_histogram, non)):
            np.testing.assert_array_equal(found, np.histogram(expected, BINS, (-1, 1))[0])
        assert branch.true_mean == pytest.approx(true.mean(), abs=1e-6)
        assert branch.non_mean == pytest.approx(non.mean(), abs=1e-6)
        assert branch.paper.threshold == PAPER_THRESHOLD
        for effect in (branch.proposed, branch.paper):
            reached = (non >= effect.threshold).mean()
            assert effect.non_pairs_at_or_above == pytest.approx(reached, abs=1e-9)
            assert effect.removed_per_anchor == pytest.approx(63 * reached, abs=1e-9)
            # The median is the score of a pair, counted from either side: rounding decides whether it is reached.
            assert effect.true_pairs_at_or_above == pytest.approx((true >= effect.threshold).mean(), abs=3 / len(true))
    np.testing.assert_array_equal(np.sort(statistics.ranks.ranks), np.sort(ranks))
    np.testing.assert_array_equal(np.sort(statistics.ranks.best), np.sort(best))
    for k in (1, 3):
        assert statistics.ranks.recall(k) == (best <= k).mean()
    assert statistics.ranks.curve()[2] == (ranks <= 2).mean()
    assert statistics.ranks.curve()[len(store)] == 1


@pytest.mark.parametrize("block", [1, 70, 2**24])
def test_against_a_slow_loop_whatever_the_block(uneven, monkeypatch, block):
    monkeypatch.setattr(module, "_BLOCK_SCORES", block)
    statistics = threshold_statistics(uneven, sample_images=0)
    assert (statistics.images, statistics.captions, statistics.sampled_images) == (11, 33, 11)
    agrees(uneven, statistics, [image for image in range(12) if image != 5])


def test_a_sample_is_exact_for_the_images_drawn(uneven):
    statistics = threshold_statistics(uneven, sample_images=4, seed=7)
    assert (statistics.captions, statistics.sampled_images) == (33, 4)
    agrees(uneven, statistics, draw_images(uneven, 4, seed=7))
    other = threshold_statistics(uneven, sample_images=4, seed=8)
    assert other.text_text.non_histogram.tolist() != statistics.text_text.non_histogram.tolist()
    # The threshold does not follow the draw: it is what training takes.
    assert other.text_text.proposed.threshold == statistics.text_text.proposed.threshold


def test_the_proposal_is_what_auto_gives_in_training(student, store):
    config = KDMCSEConfig(image_threshold="auto", text_threshold="auto")
    trained = KDMCSELoss(student, config, features=store).config
    statistics = threshold_statistics(store, sample_images=5, seed=1)
    assert statistics.text_text.proposed.threshold == trained.text_threshold
    assert statistics.text_image.proposed.threshold == trained.image_threshold


def test_quantile_and_batch_size(store):
    low, high = (threshold_statistics(store, quantile=quantile, batch_size=9) for quantile in (0.1, 0.9))
    assert low.text_image.proposed.threshold == true_pair_score(store, "text-image", quantile=0.1)
    assert low.text_image.proposed.true_pairs_at_or_above == pytest.approx(0.9, abs=0.02)
    assert high.text_image.proposed.true_pairs_at_or_above == pytest.approx(0.1, abs=0.02)
    effect = low.text_text.proposed
    assert effect.removed_per_anchor == 8 * effect.non_pairs_at_or_above > 0
    assert "negatives removed of 8" in str(low)
    assert "(quantile 0.1)" in str(low)


def test_equal_scores_share_their_rank(tmp_path):
    images, texts = np.eye(2, 3), np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]])
    store = FeatureStore.from_arrays(tmp_path / "s", images, texts, list("abcd"), [0, 0, 1, 1], ["x", "y"], "t")
    ranks = threshold_statistics(store).ranks
    assert ranks.ranks.tolist() == [2, 2, 3, 1]
    assert ranks.best.tolist() == [2, 1]
    assert ranks.recall(1) == 0.5


def test_images_and_captions_of_two_teachers(tmp_path):
    generator = np.random.default_rng(0)
    with FeatureStoreWriter(tmp_path / "store", DIM, shared_space=False) as writer:
        for image in range(6):
            texts = generator.normal(size=(2, DIM))
            writer.add(f"{image}.jpg", generator.normal(size=DIM), ["one", "two"], texts)
    statistics = threshold_statistics(FeatureStore.open(tmp_path / "store"))
    assert statistics.text_image is None
    assert statistics.ranks is None
    assert statistics.text_text.proposed is not None
    assert "share no space" in str(statistics)
    assert statistics.to_dict()["text_image"] is None
    assert len(plot_threshold_statistics(statistics).axes) == 1


def test_one_caption_an_image(tmp_path):
    features = np.random.default_rng(0).normal(size=(7, DIM))
    store = FeatureStore.from_arrays(tmp_path / "s", features, features, [*"abcdefg"], range(7), [*"abcdefg"], "t")
    statistics = threshold_statistics(store)
    assert statistics.text_text.proposed is None
    assert statistics.text_text.paper.true_pairs_at_or_above is None
    assert statistics.text_image.proposed.threshold == pytest.approx(1)
    assert statistics.text_image.true_histogram[-1] == 7
    assert "n/a" in str(statistics)
    plot_threshold_statistics(statistics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_images": -1}, "0 for all"),
        ({"batch_size": 1}, "at least 2"),
        ({"quantile": 2}, "from 0 to 1"),
    ],
)
def test_bad_options(store, options, message):
    with pytest.raises(ValueError, match=message):
        threshold_statistics(store, **options)


def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_SCORES", 2**16)
    generator = np.random.default_rng(0)
    features = generator.normal(size=(4000, 4)).astype(np.float32)
    store = FeatureStore.from_arrays(
        tmp_path / "s",
        features,
        features,
        [f"c{row}" for row in range(4000)],
        range(4000),
        [f"{row}.jpg" for row in range(4000)],
        "t",
    )
    tracemalloc.start()
    try:
        statistics = threshold_statistics(store, sample_images=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert statistics.text_text.non_histogram.sum() == 4000 * 3999
    assert peak < 8 * 2**20  # a matrix of all scores would take 61 MiB


@pytest.fixture(scope="module")
def main():
    return load_command("evaluation/threshold_statistics.py")


def test_the_script(main, store, tmp_path):
    paths = [tmp_path / "made" / name for name in ("result.json", "plot.png")]
    result = CliRunner().invoke(main, [str(store.path), "--output", str(paths[0]), "--plot", str(paths[1])])
    assert result.exit_code == 0, result.output
    written = json.loads(paths[0].read_text())
    assert written["data_sha256"]["features"] == store.checksum
    assert written["text_text"]["proposed"]["threshold"] == true_pair_score(store, "text-text")
    assert f"{written['text_image']['proposed']['threshold']:.3f} (auto)" in result.output
    assert sum(written["text_image"]["non_histogram"]) == 72 * 23
    assert written["seed"] == 0
    assert written["ranks"]["R@1"] <= written["ranks"]["R@5"] <= written["ranks"]["R@10"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_the_script_says_what_is_wrong(main, store, tmp_path):
    missing = CliRunner().invoke(main, [str(tmp_path / "nowhere")])
    assert (missing.exit_code, missing.output.count("\n")) == (2, 1)
    assert "there is no feature store" in missing.output
    damaged = copy_tree(store.path, tmp_path / "damaged")
    content = bytearray((damaged / "text_features.npy").read_bytes())
    content[-3] ^= 1
    (damaged / "text_features.npy").write_bytes(content)
    result = CliRunner().invoke(main, [str(damaged)])
    assert result.exit_code == 2
    assert "text_features.npy is damaged" in result.output


def test_real_features(shared_data):
    statistics = threshold_statistics(FeatureStore.open(shared_data / "flickr8k_features"), sample_images=100)
    text, image = statistics.text_text, statistics.text_image
    assert 0.4 < text.true_mean < 0.55
    assert 0.25 < image.true_mean < 0.33
    assert abs(text.non_mean) < 0.02 > abs(image.non_mean)
    assert image.paper.true_pairs_at_or_above == image.paper.removed_per_anchor == 0
    assert 0.05 < image.proposed.removed_per_anchor < 1
    assert 5 < np.median(statistics.ranks.ranks) < 100
