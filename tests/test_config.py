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


def test_overrides_win_over_the_recipe():
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
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        KDMCSEConfig(**{name: value})
