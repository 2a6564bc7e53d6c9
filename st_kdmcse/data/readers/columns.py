"""The columns of images and captions in a table, and the captions in a cell."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from st_kdmcse.data.json_files import parse_json

SPLIT_COLUMN = "split"

_IMAGES = (
    *("image", "image_path", "image_file", "image_name", "img", "img_path", "path", "file_path", "filepath"),
    *("file_name", "filename", "file", "image_url", "url"),
)
_CAPTIONS = ("caption", "captions", "text", "sentence", "sentences", "comment", "description", "title", "raw")
_NUMBERED = re.compile(rf"({'|'.join(_CAPTIONS)})[ _-]?\d+", re.IGNORECASE)


class Columns(NamedTuple):
    """Columns of a table.

    Attributes:
        image: the column of images.
        captions: the columns of captions, one or several.
    """

    image: str
    captions: list[str]


def choose_columns(names: Sequence[str], image: str = "auto", caption: str = "auto") -> Columns | None:
    """The columns of images and captions; None if they are not among the names.

    Args:
        names: of all columns.
        image: the column of images; "auto" takes it from common names.
        caption: the column of captions, or several with commas between them; "auto" takes a common name, or all of
            ``caption_0``, ``caption_1``, ...
    """
    images = named_columns(names, image) if image != "auto" else _common(names, _IMAGES, caption)
    captions = named_columns(names, caption) if caption != "auto" else _common(names, _CAPTIONS, image)
    if caption == "auto" and not captions:
        captions = [name for name in names if _NUMBERED.fullmatch(name)]
    if len(names) == 2 and bool(images) != bool(captions):
        # The other column, unless it was asked for by another name.
        if not images and image == "auto":
            images = [name for name in names if name not in captions]
        elif not captions and caption == "auto":
            captions = [name for name in names if name not in images]
    return Columns(images[0], captions) if len(images) == 1 and captions and images[0] not in captions else None


def named_columns(names: Sequence[str], wanted: str) -> list[str]:
    """The columns that are asked for by a name, or by several with commas between them; none if one is missing."""
    if wanted in names:
        return [wanted]
    several = [name.strip() for name in wanted.split(",")]
    return several if all(name in names for name in several) else []


def no_columns(source: object, names: Sequence[str], image: str, caption: str) -> ValueError:
    """What to raise where :func:`choose_columns` finds none."""
    asked = [
        f"column of {what}" if column == "auto" else f"column {column!r}"
        for what, column in (("images", image), ("captions", caption))
    ]
    return ValueError(
        f"{source}: no {asked[0]} or no {asked[1]}; its columns: {', '.join(map(repr, names))}; name them as "
        "`image_column` and `caption_column`"
    )


def wanted_splits(split: str | None) -> frozenset[str] | None:
    """The values of the column ``split`` that are asked for: "train+restval" is two."""
    return None if split is None else frozenset(split.split("+"))


def captions_in(*cells: Any) -> list[Any]:
    """The captions in the cells of a row: texts, lists of them, and lists that are written into a text.

    Of several cells, those that are empty are left out, unless all of them are.
    """
    found = [caption for cell in cells for caption in _captions_in_cell(cell)]
    filled = [caption for caption in found if caption is not None and caption != ""]
    return filled or found if len(cells) > 1 else found


def _captions_in_cell(cell: Any) -> list[Any]:
    if isinstance(cell, list | tuple):
        return list(cell)
    if isinstance(cell, str) and re.match(r"\[\s*[\"']", cell):
        with suppress(ValueError):
            return _texts(parse_json(cell))
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            texts = _texts(ast.literal_eval(cell.strip()))
            if repr(texts) == cell.strip():  # else texts without a comma between them would be one
                return texts
    return [cell]


def _texts(value: Any) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError("no list of texts")
    return value


def _common(names: Sequence[str], common: Sequence[str], taken: str) -> list[str]:
    lower = [name.lower() if name != taken else "" for name in names]
    return next(([names[lower.index(name)]] for name in common if name in lower), [])
