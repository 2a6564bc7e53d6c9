"""MultimodalInputExample and the checks of a loader."""

import numpy as np
import pytest
import torch
from sentence_transformers import InputExample

from st_kdmcse import MultimodalInputExample
from st_kdmcse.training.examples import check_examples

IMAGE, TEXT = np.arange(1, 5, dtype=np.float32), np.arange(5, 9, dtype=np.float32)


def by_value(**changes):
    return MultimodalInputExample(
        **{"texts": ["A dog runs ."], "image_features": IMAGE, "text_features": TEXT, **changes}
    )


def test_features_by_value_become_the_label():
    example = by_value(guid="7")
    assert isinstance(example, InputExample)
    assert example.label.dtype == np.float32
    assert example.label.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert by_value(image_features=torch.ones(4), text_features=[1, 2, 3, 4]).label.shape == (8,)


def test_a_row_becomes_the_label():
    label = MultimodalInputExample(texts=["A dog runs ."], row=20_000_001).label
    assert label.tolist() == [20_000_001]
    assert label.dtype == np.int64


BAD = {
    "missing half": (by_value(text_features=None), "`text_features` is missing"),
    "other half": (by_value(image_features=None), "`image_features` is missing"),
    "nothing": (MultimodalInputExample(texts=["A dog ."]), "`image_features` is missing"),
    "NaN": (by_value(image_features=[1, np.nan, 3, 4]), "`image_features` holds NaN"),
    "infinite": (by_value(text_features=[1, 2, 3, 1e300]), "`text_features` holds NaN or infinite"),
    "matrix": (by_value(image_features=np.ones((1, 4))), "must be a vector"),
    "unequal": (by_value(text_features=[1, 2, 3]), "`image_features` have 4 dimensions, `text_features` 3"),
    "both": (by_value(row=1), "not both"),
    "negative row": (MultimodalInputExample(texts=["A dog ."], row=-1), "`row` must be"),
    "fractional row": (MultimodalInputExample(texts=["A dog ."], row=1.5), "`row` must be"),
    "bare string": (by_value(texts="A dog ."), "list of one string"),
    "two texts": (by_value(texts=["A dog .", "A cat ."]), "list of one string"),
}


def test_an_example_with_an_image_is_told_to_attach_features():
    example = MultimodalInputExample(texts=["A dog runs ."], image="dog.jpg")
    with pytest.raises(ValueError, match=r"example 0 .*`image_features` is missing: call attach_features\(examples"):
        check_examples([example])
    with pytest.raises(ValueError, match="`text_features` is missing: call attach_features"):
        _ = by_value(image="dog.jpg", text_features=None).label
    assert by_value(image="dog.jpg").label.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_example_is_refused_by_position_and_when_read(name):
    example, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        _ = example.label
    with pytest.raises(ValueError, match=f"example 2 .*{message}"):
        check_examples([by_value(), by_value(), example])


def test_mixed_loaders_are_refused(store):
    row = MultimodalInputExample(texts=["A dog ."], row=0)
    with pytest.raises(ValueError, match="example 1 .*mixes rows and features"):
        check_examples([by_value(), row], features=store)
    with pytest.raises(ValueError, match="example 1 .*mixes rows and features"):
        check_examples([row, by_value()], features=store)
    with pytest.raises(ValueError, match="example 1 is a InputExample"):
        check_examples([by_value(), InputExample(texts=["A dog ."])])


def test_dimensions_must_be_those_of_the_loss():
    with pytest.raises(ValueError, match="example 0 .*4 dimensions, expected 512"):
        check_examples([by_value()], teacher_dim=512)
    wider = by_value(image_features=np.ones(5), text_features=np.ones(5))
    with pytest.raises(ValueError, match="example 1 .*5 dimensions, expected 4"):
        check_examples([by_value(), wider])


def test_rows_must_be_in_the_store(store):
    with pytest.raises(ValueError, match="no feature store"):
        check_examples([MultimodalInputExample(texts=["A dog ."], row=0)])
    with pytest.raises(ValueError, match="example 1 .*row 72 is outside of the store, which has 72 rows"):
        check_examples([MultimodalInputExample(texts=["A dog ."], row=row) for row in (71, 72)], features=store)
