"""Teacher features for examples of captions and images, without a feature store."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import numpy as np

from st_kdmcse.data.images import FileSlice
from st_kdmcse.teachers.base import Teacher, TeacherImage
from st_kdmcse.training.examples import MultimodalInputExample

_LISTED = 10


def attach_features(
    examples: list[MultimodalInputExample], teacher: Teacher, show_progress_bar: bool | None = None
) -> list[MultimodalInputExample]:
    """Fill in the features that examples lack: of ``image`` where ``image_features`` are None, of the text likewise.

    Features that are there are kept, and so are examples that refer to a row. Each distinct file and each distinct text
    is encoded once. A teacher of texts alone fills in the text features only.

    Args:
        examples: the examples; changed in place.
        teacher: encodes images and texts.
        show_progress_bar: show a progress bar if there are more than a few batches; None in a terminal only.

    Returns:
        The same list.

    Raises:
        ValueError: before anything is encoded, naming the example by its position, counted from 0: if it has neither
            an image nor image features, no single text, or features of another width than the teacher's. At the end,
            if images cannot be read, naming examples and files: all others have their features then, and a second call
            goes on from there.

    Example:
        ::

            examples = [MultimodalInputExample(texts=["Two dogs run ."], image="dogs.jpg")]
            attach_features(examples, OpenCLIPTeacher("ViT-B-32", "openai"))
    """
    for position, example in enumerate(examples):
        if not isinstance(example, MultimodalInputExample):
            raise ValueError(f"example {position} is a {type(example).__name__}, expected a MultimodalInputExample")
        problem = _problem(example, teacher)
        if problem:
            raise ValueError(f"example {position} {example}: {problem}")
    _attach_texts(examples, teacher, show_progress_bar)
    if teacher.knows_images:
        _attach_images(examples, teacher, show_progress_bar)
    return examples


def _problem(example: MultimodalInputExample, teacher: Teacher) -> str | None:
    """Why the example cannot be completed, None if it can."""
    if example.row is not None:
        return None
    for name, half in (("image_features", example.image_features), ("text_features", example.text_features)):
        if half is not None and np.asarray(half).size != teacher.dim:
            return f"{name} have {np.asarray(half).size} dimensions, the teacher gives {teacher.dim}"
    if teacher.knows_images and example.image is None and example.image_features is None:
        return "it has neither image nor image_features: give one of them"
    return example.text_problem()


def _attach_texts(examples: list[MultimodalInputExample], teacher: Teacher, show_progress_bar: bool | None) -> None:
    lacking = [example for example in examples if example.row is None and example.text_features is None]
    texts = list(dict.fromkeys(example.texts[0] for example in lacking))
    features = dict(zip(texts, teacher.encode_texts(texts, show_progress_bar), strict=True))
    for example in lacking:
        example.text_features = features[example.texts[0]]


def _attach_images(examples: list[MultimodalInputExample], teacher: Teacher, show_progress_bar: bool | None) -> None:
    same_image: dict[Hashable, list[int]] = {}
    for position, example in enumerate(examples):
        if example.row is None and example.image is not None and example.image_features is None:
            same_image.setdefault(_key(example.image), []).append(position)
    groups = list(same_image.values())
    unreadable = []
    images = [image for group in groups if (image := examples[group[0]].image) is not None]
    for rows, features, errors in teacher.encode_readable(images, show_progress_bar):
        unreadable += [(groups[row][0], error) for row, error in errors.items()]
        for row, image_features in zip(rows, features, strict=True):
            for position in groups[row]:
                examples[position].image_features = image_features
    if unreadable:
        named = [f"example {position} {examples[position]}: {error}" for position, error in unreadable[:_LISTED]]
        more = [f"and {len(unreadable) - _LISTED} more"] if len(unreadable) > _LISTED else []
        raise ValueError("\n".join([*named, *more]))


def _key(image: TeacherImage) -> Hashable:
    """What is equal for examples of the same image."""
    if isinstance(image, str | Path):
        return str(Path(image))
    return image if isinstance(image, bytes | FileSlice) else id(image)
