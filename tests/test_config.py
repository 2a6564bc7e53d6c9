"""The options: recipes, validation, ablations."""

import dataclasses
import math

import pytest

from st_kdmcse import KDMCSEConfig


def test_the_default_is_the_paper():
    assert KDMCSEConfig() == KDMCSEConfig.paper()
    assert KDMCSEConfig.paper().margin == 0.125
    assert KDMCSEConfig.paper().text_margin == 0


def test_the_released_recipe_differs_where_the_code_does():
    released = KDMCSEConfig.released()
    assert (released.margin, released.text_margin) == (0.15, 0.15)
    assert (released.image_soft_label, released.text_soft_label) == ("image-image", "text-text")
    assert (released.image_filter, released.text_filter) == ("text-image", "image-text")
    assert not released.filter_negatives
    assert (released.filter_score, released.filter_inclusive) == ("dot", False)


def test_the_grounded_recipe_goes_beyond_the_paper():
    grounded = KDMCSEConfig.grounded()
    assert (grounded.multimodal_weight, grounded.list_weight, grounded.same_image) == (0.1, 1.0, "positive")
    assert (
        dataclasses.replace(grounded, multimodal_weight=0.01, list_weight=0.0, same_image="negative")
        == KDMCSEConfig.paper()
    )


def test_overrides_win_over_the_recipe():
    assert KDMCSEConfig.grounded(list_weight=0.5).list_weight == 0.5
    assert KDMCSEConfig.released(margin=0, multimodal_weight=0.05).margin == 0
    assert KDMCSEConfig.released(multimodal_weight=0.05).multimodal_weight == 0.05


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KDMCSEConfig().margin = 1


def test_every_option_explains_itself():
    assert all(field.metadata["help"] for field in dataclasses.fields(KDMCSEConfig))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("margin", -0.1),
        ("margin", math.nan),
        ("margin", "0.1"),
        ("text_margin", 4),
        ("temperature", 0),
        ("text_temperature", math.inf),
        ("image_threshold", "always"),
        ("text_threshold", math.nan),
        ("image_soft_label", "image"),
        ("filter_negatives", 1),
        ("filter_score", "euclidean"),
        ("multimodal_weight", -1),
        ("projection_dim", 0),
        ("projection_dim", 2.5),
        ("view_reduction", "max"),
        ("list_weight", -1),
        ("list_weight", "auto"),
        ("list_cross_weight", math.nan),
        ("list_temperature", 0),
        ("list_student_temperature", -0.1),
        ("list_loss", "mse"),
        ("list_length", 0),
        ("list_length", 2.5),
        ("list_shuffle", 1),
        ("soft_label_calibration", None),
        ("filter_calibration", "rank"),
        ("filter_relative", "yes"),
        ("filter_slack", None),
        ("same_image", True),
        ("same_image_weight", -0.1),
        ("multimodal_weight", "automatic"),
        ("consistency_weight", math.inf),
        ("retention_weight", -1),
        ("reverse_margin", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        KDMCSEConfig(**{name: value})


def test_lists_need_a_branch():
    none = {"list_text_weight": 0, "list_cross_weight": 0, "list_image_weight": 0}
    assert KDMCSEConfig(**none).list_weight == 0
    with pytest.raises(ValueError, match="`list_weight` must be 0 where all three branches have weight 0"):
        KDMCSEConfig(list_weight=1.0, **none)


@pytest.mark.parametrize("threshold", ["auto", -0.1, 1.5])
def test_thresholds_of_a_calibrated_filter_are_shares(threshold):
    with pytest.raises(ValueError, match="`text_threshold` must be a share of pairs from 0 to 1"):
        KDMCSEConfig(filter_calibration="quantile", text_threshold=threshold)
    KDMCSEConfig(filter_calibration="quantile", text_threshold=threshold, filter_negatives=False)
    with pytest.raises(ValueError, match="filter_score"):
        KDMCSEConfig(filter_calibration="standard", filter_score="dot")


def test_both_recipes_are_without_what_goes_beyond_the_paper():
    off = KDMCSEConfig()
    for recipe in (KDMCSEConfig.paper(), KDMCSEConfig.released()):
        for name in (
            "list_weight",
            "soft_label_calibration",
            "filter_calibration",
            "filter_relative",
            "same_image",
            "consistency_weight",
            "retention_weight",
            "reverse_margin",
        ):
            assert getattr(recipe, name) == getattr(off, name) in (0, "none", False, "negative")
