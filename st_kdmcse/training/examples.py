"""The example type for ``SentenceTransformer.fit``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sentence_transformers import InputExample

if TYPE_CHECKING:
    from st_kdmcse.data.store import FeatureStore
    from st_kdmcse.teachers.base import TeacherImage


class MultimodalInputExample(InputExample):
    """A caption with the teacher features of itself and of its image, by value or by row of a feature store.

    ``SentenceTransformer.fit`` reads ``texts`` and ``label`` of an example and nothing else; so the label carries the
    teacher's side to the loss: a float32 array of image and text features side by side, or the row number. It is built,
    and checked, when it is read.

    Args:
        texts: one caption in a list.
        image_features: (T,) features of the image.
        text_features: (T,) features of the caption, from the same teacher.
        row: instead of the features, the caption's row in the :class:`~st_kdmcse.FeatureStore` that the loss holds.
        guid: an identifier that error messages repeat.
        image: the image itself, a file or a PIL image, of which :func:`~st_kdmcse.attach_features` makes the
            features; nothing else reads it.

    Example:
        >>> MultimodalInputExample(texts=["Two dogs run ."], row=7).label
        array([7])
    """

    def __init__(
        self,
        texts: Sequence[str],
        image_features: npt.ArrayLike | None = None,
        text_features: npt.ArrayLike | None = None,
        row: int | None = None,
        guid: str = "",
        image: TeacherImage | None = None,
    ) -> None:
        self.texts = texts
        self.image_features = image_features
        self.text_features = text_features
        self.row = row
        self.guid = guid
        self.image = image

    @property
    def label(self) -> npt.NDArray[Any]:
        """(2 T,) float32 features, or (1,) int64 row.

        Raises:
            ValueError: if a part of the example is missing, given twice, not finite, or of another width.
        """
        problem = self.problem()
        if problem:
            raise ValueError(f"{self}: {problem}")
        if self.row is not None:
            return np.array([self.row], dtype=np.int64)
        return np.concatenate([np.asarray(self.image_features), np.asarray(self.text_features)], dtype=np.float32)

    def problem(self) -> str | None:
        """What is wrong with the example, None if nothing is."""
        text_problem = self.text_problem()
        if text_problem:
            return text_problem
        halves = {"image_features": self.image_features, "text_features": self.text_features}
        if self.row is not None:
            if any(half is not None for half in halves.values()):
                return "give features or `row`, not both"
            if isinstance(self.row, bool) or not isinstance(self.row, int | np.integer) or self.row < 0:
                return f"`row` must be a whole number >= 0, got {self.row!r}"
            return None
        for name, half in halves.items():
            if half is None and self.image is not None:
                return f"`{name}` is missing: call attach_features(examples, teacher) first"
            if half is None:
                return f"`{name}` is missing: give both features, or `row`"
            array = np.asarray(half)
            if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "fiu":
                return f"`{name}` must be a vector of numbers, got shape {array.shape} of {array.dtype}"
            # Checked as float32: a float64 value beyond its range would become infinite on the way to the loss.
            with np.errstate(over="ignore"):
                if not np.isfinite(array.astype(np.float32)).all():
                    return f"`{name}` holds NaN or infinite values"
        widths = [np.asarray(half).size for half in halves.values()]
        if widths[0] != widths[1]:
            return f"`image_features` have {widths[0]} dimensions, `text_features` {widths[1]}"
        return None

    def text_problem(self) -> str | None:
        """What is wrong with ``texts``, None if nothing is."""
        if isinstance(self.texts, str) or len(self.texts) != 1 or not isinstance(self.texts[0], str):
            return f"`texts` must be a list of one string, got {self.texts!r}"
        return None

    def __str__(self) -> str:
        name = f" {self.guid}" if self.guid else ""
        text = self.texts if isinstance(self.texts, str) else " ".join(map(str, self.texts))
        return f"<MultimodalInputExample{name}: {text[:60]}>"


def check_examples(
    examples: Sequence[MultimodalInputExample],
    teacher_dim: int | None = None,
    features: FeatureStore | None = None,
) -> None:
    """Refuse a list of examples that cannot be trained on together.

    Args:
        examples: the examples of one loader.
        teacher_dim: the width T that the loss expects; None to take the first example's.
        features: the store of the loss, which rows must fit.

    Raises:
        ValueError: naming the first offending example by its position, counted from 0.
    """
    if not examples:
        raise ValueError("there are no examples")
    by_row = getattr(examples[0], "row", None) is not None
    for position, example in enumerate(examples):
        if not isinstance(example, MultimodalInputExample):
            raise ValueError(
                f"example {position} is a {type(example).__name__} in a loader of MultimodalInputExample: "
                "give plain text in another loader"
            )
        problem = example.problem()
        if problem is None and (example.row is not None) != by_row:
            problem = "the loader mixes rows and features: use one of them"
        if problem is None and by_row and features is None:
            problem = "it refers to a row, and the loss has no feature store: give the loss `features`"
        if problem is None and by_row and features is not None and example.row is not None:
            if example.row >= len(features):
                problem = f"row {example.row} is outside of the store, which has {len(features)} rows"
        elif problem is None:
            width = np.asarray(example.image_features).size
            teacher_dim = teacher_dim or width
            if width != teacher_dim:
                problem = (
                    f"its features have {width} dimensions, expected {teacher_dim}: make the loss with "
                    f"`teacher_dim` {width}, or give features of one teacher"
                )
        if problem:
            raise ValueError(f"example {position} {example}: {problem}")
