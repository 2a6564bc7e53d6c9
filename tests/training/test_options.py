"""The options of a run."""

from pathlib import Path

import pytest

from st_kdmcse import KDMCSEConfig
from st_kdmcse.training.options import TrainingOptions


def test_the_grounded_recipe_sets_what_is_not_given():
    options = TrainingOptions(features=Path("f"), recipe="grounded")
    assert (options.head_learning_rate, options.captions_per_image_in_batch) == (1e-3, 2)
    assert options.loss_config() == KDMCSEConfig.grounded()
    given = TrainingOptions(
        features=Path("f"), recipe="grounded", head_learning_rate=3e-5, captions_per_image_in_batch=1
    )
    assert (given.head_learning_rate, given.captions_per_image_in_batch) == (3e-5, 1)
    assert TrainingOptions(features=Path("f")).head_learning_rate is None
    with pytest.raises(ValueError, match="`recipe` must be one of paper, released, grounded"):
        TrainingOptions(features=Path("f"), recipe="ours")
