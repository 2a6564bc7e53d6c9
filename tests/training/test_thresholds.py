"""What the filters remove is said before a run."""

import logging
from dataclasses import replace

import pytest
from small_runs import options, write_data

from st_kdmcse import KDMCSEConfig, KDMCSELoss, MCSELoss
from st_kdmcse.config import SCORE_KINDS
from st_kdmcse.data.scores import negatives_removed
from st_kdmcse.training import TrainingOptions, train
from st_kdmcse.training.thresholds import branch_filters


def test_shares_are_those_of_the_feature_store(student, store):
    config = KDMCSEConfig(image_threshold=0.2, text_threshold=0.35, filter_inclusive=False)
    image, caption = branch_filters(KDMCSELoss(student, config, features=store))
    assert (image.branch, image.threshold, caption.branch, caption.threshold) == ("image", 0.2, "caption", 0.35)
    assert image.removed == negatives_removed(store, "text-image", 0.2, inclusive=False)
    assert caption.removed == negatives_removed(store, "text-text", 0.35, inclusive=False)
    assert 0 < image.removed < 1
    assert not image.removes_nothing


def test_losses_without_a_filter_have_none(student, store):
    assert branch_filters(MCSELoss(student, features=store)) == []
    assert branch_filters(KDMCSELoss(student, KDMCSEConfig(filter_negatives=False), store.dim, store)) == []
    assert branch_filters(KDMCSELoss(student, KDMCSEConfig(), store.dim)) == []
    only = branch_filters(KDMCSELoss(student, KDMCSEConfig(image_threshold=None), store.dim, store))
    assert [branch.branch for branch in only] == ["caption"]


@pytest.mark.parametrize("calibration", ["standard", "quantile"])
def test_shares_of_pairs_are_told_as_scores(student, store, calibration):
    config = KDMCSEConfig(filter_calibration=calibration, image_threshold=0.9, text_threshold=0.7)
    loss = KDMCSELoss(student, config, features=store)
    image, caption = branch_filters(loss)
    assert image.removed == pytest.approx(0.1, abs=0.05)
    assert caption.removed == pytest.approx(0.3, abs=0.05)
    assert image.threshold == negatives_score(loss, "text-image", 0.9, calibration)
    for threshold, removed in ((0.0, 1.0), (1.0, 0.0)):
        config = KDMCSEConfig(filter_calibration=calibration, image_threshold=threshold, text_threshold=None)
        (branch,) = branch_filters(KDMCSELoss(student, config, features=store))
        assert branch.removed == pytest.approx(removed, abs=0.01)


def negatives_score(loss, kind, share, calibration):
    row = SCORE_KINDS.index(kind)
    if calibration == "quantile":
        return pytest.approx(float(loss.statistics.quantiles[row].quantile(share)), abs=1e-3)
    return pytest.approx(float(loss.statistics.mean[row] + 1.2816 * loss.statistics.std[row]), abs=1e-3)


def test_where_no_score_decides_nothing_is_said(student, store):
    for config in (KDMCSEConfig(filter_relative=True), KDMCSEConfig(multimodal_weight=0)):
        assert branch_filters(KDMCSELoss(student, config, features=store)) == []


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"image_threshold": 0.9}, 'Set `image_threshold` to "auto", or'),
        ({"image_threshold": 0.9, "filter_calibration": "quantile"}, "Set `image_threshold` to a smaller share"),
        ({"image_threshold": "auto"}, None),
    ],
)
def test_the_remedy_is_one_that_can_be_followed(student, store, options, advice):
    asked = KDMCSEConfig(text_threshold=None, **options)
    (image,) = branch_filters(KDMCSELoss(student, asked, features=store))
    assert replace(image, removed=0.1).remedy(asked) is None
    remedy = replace(image, removed=0.0).remedy(asked)
    assert remedy is None if advice is None else advice in remedy


@pytest.mark.parametrize("threshold", [0.99999, 0.3])
def test_a_run_says_what_each_filter_removes_and_warns_where_that_is_nothing(
    tmp_path, tiny_bert, sentences, store, caplog, threshold
):
    data = write_data(tmp_path, sentences, store)
    config = {"image_threshold": threshold, "text_threshold": "auto"}
    run = TrainingOptions(**options(data, tiny_bert, config=config, max_steps=1, output_dir=tmp_path / "out"))
    with caplog.at_level(logging.INFO, "st_kdmcse"):
        summary = train(run)
    said = [record.getMessage() for record in caplog.records if "branch" in record.getMessage()]
    assert sum(text.startswith("image branch: ") for text in said) == 1
    assert sum(text.startswith("caption branch: ") for text in said) == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    warned = [text for text in warnings if "removes nothing" in text]
    assert len(warned) == (threshold > 0.9)
    assert all('Set `image_threshold` to "auto"' in text for text in warned)
    assert [branch["removed"] == 0 for branch in summary["filters"]] == [threshold > 0.9, False]
