"""Crisscrossed Captions (CxC): how similar captions of MS-COCO are to each other, and to images."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from st_kdmcse.data.json_files import json_items
from st_kdmcse.data.lines import read_lines
from st_kdmcse.data.readers.parsing import existing_file
from st_kdmcse.data.sts import STSTask, check_scorable, checked_pairs
from st_kdmcse.data.tables import csv_problem
from st_kdmcse.files import byte_progress

CXC = "CxC"
"""The name of the task."""

CaptionFiles = str | Path | Sequence[str | Path]
"""Annotation files of MS-COCO."""

_FILES = "sts_val.csv or sits_val.csv of CxC, or the same of the test split"
_SCORE, _METHOD = "agg_score", "sampling_method"
_STS, _SITS = ("caption1", "caption2"), ("caption", "image")


@dataclass(frozen=True)
class CxCTask(STSTask):
    """Caption pairs of CxC, by the way in which they were drawn.

    Attributes:
        queries: the id of the first caption of each pair, subset after subset.
    """

    queries: Sequence[int] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class SITSPairs:
    """Captions and images of CxC with their similarities (semantic image-text similarity).

    Attributes:
        captions: the caption of each pair.
        images: the name of its image's file, such as ``COCO_val2014_000000431431.jpg``.
        scores: their gold similarity, from 0 to 5.
        queries: the id of each caption.
        methods: how each pair was drawn: ``c2i_original`` (caption and image belong together) or ``c2i_intrasim``.
        places: where each pair comes from, for error messages.
    """

    captions: list[str]
    images: list[str]
    scores: list[float]
    queries: list[int]
    methods: list[str]
    places: list[str] = field(compare=False, repr=False)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.scores)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 over captions, images, scores and methods, as 64 hexadecimal digits."""
        content = [self.captions, self.images, self.scores, self.methods]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def cxc_kind(scores: str | Path) -> Literal["STS", "SITS"]:
    """What a file of CxC compares: captions with each other ("STS"), or with images ("SITS"); its header tells.

    Args:
        scores: ``sts_val.csv`` or ``sits_val.csv``, or the same of the test split.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither.
    """
    path = existing_file(scores, _FILES)
    columns = set(_reader(path).fieldnames or ())
    if columns.issuperset(_STS):
        return "STS"
    if columns.issuperset(_SITS):
        return "SITS"
    raise ValueError(f"{path} has neither the columns {' and '.join(_STS)} nor {' and '.join(_SITS)}: give {_FILES}")


def load_cxc(scores: str | Path, captions: CaptionFiles) -> CxCTask:
    """Load a split of the caption pairs of CxC (Parekh et al., EACL 2021).

    The subsets are the ways in which pairs were drawn: ``c2c_cocaption`` (captions of one image) and ``c2c_isim``
    (captions of similar images). As one of several STS tasks, it is scored by Spearman's correlation over all pairs;
    :func:`~st_kdmcse.evaluation.cxc.evaluate_cxc` gives CxC's own measure as well.

    Args:
        scores: ``sts_val.csv`` or ``sts_test.csv``, with the columns caption1, caption2, agg_score (0 to 5) and
            sampling_method.
        captions: the annotation files of MS-COCO that hold the captions: ``captions_val2014.json``, or those of 2017.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed, or a caption is in none of the annotation files; names the file and the
            line.
    """
    path = existing_file(scores, _FILES)
    rows = [
        (where, _caption_id(one, where), _caption_id(two, where), score, method)
        for where, one, two, score, method in _rows(path, _STS, "sts")
    ]
    texts = _captions(captions, [(where, caption) for where, *pair, _, _ in rows for caption in pair])
    methods = sorted({method for *_, method in rows})
    subsets = tuple(
        checked_pairs(
            method,
            path,
            ((where, score, texts[one], texts[two]) for where, one, two, score, own in rows if own == method),
        )
        for method in methods
    )
    if not subsets:
        raise ValueError(f"{path} is empty: no pair with a score; copy the file again")
    task = CxCTask(CXC, subsets, [one for method in methods for _, one, _, _, own in rows if own == method])
    check_scorable(task)
    return task


def load_sits(scores: str | Path, captions: CaptionFiles) -> SITSPairs:
    """Load a split of the pairs of a caption and an image of CxC.

    Args:
        scores: ``sits_val.csv`` or ``sits_test.csv``, with the columns caption, image, agg_score (0 to 5) and
            sampling_method.
        captions: as for :func:`load_cxc`.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_cxc` does.
    """
    path = existing_file(scores, _FILES)
    rows = [
        (where, _caption_id(caption, where), image.strip(), score, method)
        for where, caption, image, score, method in _rows(path, _SITS, "sits")
    ]
    texts = _captions(captions, [(where, caption) for where, caption, *_ in rows])
    # An image's name stands for a sentence: it must be there, and is no sentence that all pairs could share.
    pairs = checked_pairs("SITS", path, ((where, score, texts[query], image) for where, query, image, score, _ in rows))
    check_scorable(STSTask("SITS", (pairs,)))
    _, queries, images, _, methods = map(list, zip(*rows, strict=True))
    return SITSPairs(pairs.sentences1, images, pairs.scores, queries, methods, list(pairs.places))


def image_number(name: str) -> int | None:
    """The number of an image of MS-COCO, which its names of 2014 and 2017 share; None for another name.

    Args:
        name: such as "COCO_val2014_000000431431.jpg", "val2017/000000431431.jpg" or "000000431431".

    Example:
        >>> image_number("COCO_val2014_000000431431.jpg")
        431431
    """
    match = re.fullmatch(r"(?:.*[_/])?(\d{12})(?:\.\w+)?", name)
    return int(match[1]) if match else None


def _reader(path: Path) -> csv.DictReader[str]:
    return csv.DictReader(read_lines(path, lambda _: None))


def _rows(path: Path, pair: tuple[str, str], kind: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Place, both columns of a pair, score and sampling method of each row."""
    reader = _reader(path)
    columns = (*pair, _SCORE, _METHOD)
    missing = set(columns) - set(reader.fieldnames or ())
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(sorted(missing))}: give {kind}_val.csv or {kind}_test.csv of CxC"
        )
    try:
        for row in reader:
            one, two, score, method = (row[name] or "" for name in columns)
            yield f"{path}, line {reader.line_num}", one, two, score, method
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {csv_problem(error)}") from error


def _caption_id(name: str, where: str) -> int:
    """The annotation id in a name such as "COCO_val2014:sentid:349055"."""
    match = re.fullmatch(r".*:sentid:(\d{1,18})", name)
    if not match:
        raise ValueError(f"{where}: {name!r} is no caption id, such as COCO_val2014:sentid:349055; copy the file again")
    return int(match[1])


def _captions(files: CaptionFiles, wanted: Sequence[tuple[str, int]]) -> dict[int, Any]:
    """The texts by id of the captions that some places want."""
    paths = [
        existing_file(file, "annotations of MS-COCO") for file in ([files] if isinstance(files, str | Path) else files)
    ]
    ids = {caption for _, caption in wanted}
    texts: dict[int, Any] = {}
    for path in paths:
        with byte_progress(path.stat().st_size, f"Reading {path.name}") as progress:
            for annotation in json_items(path, "annotations.item", progress.update):
                if isinstance(annotation, dict) and isinstance(annotation.get("id"), int) and annotation["id"] in ids:
                    texts[annotation["id"]] = annotation.get("caption")
    where, absent = next(((where, caption) for where, caption in wanted if caption not in texts), ("", None))
    if absent is not None:
        others = len(ids - texts.keys()) - 1
        raise ValueError(
            f"{where}: caption {absent}{f' and {others:,} others are' if others else ' is'} not in "
            f"{', '.join(map(str, paths))}: give the annotations of MS-COCO that hold "
            f"{'them' if others else 'it'} as well, such as captions_val2014.json"
        )
    return texts
