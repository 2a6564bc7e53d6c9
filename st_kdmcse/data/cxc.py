"""Crisscrossed Captions (CxC): how similar captions of MS-COCO are, as an STS task."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from st_kdmcse.data.json_files import json_items
from st_kdmcse.data.lines import read_lines
from st_kdmcse.data.readers.parsing import existing_file
from st_kdmcse.data.sts import STSTask, check_scorable, checked_pairs
from st_kdmcse.data.tables import csv_problem

CXC = "CxC"
"""The name of the task."""

_COLUMNS = ("caption1", "caption2", "agg_score", "sampling_method")


def load_cxc(scores: str | Path, captions: str | Path | Sequence[str | Path]) -> STSTask:
    """Load a split of the caption pairs of CxC (Parekh et al., EACL 2021).

    The subsets are the ways in which pairs were drawn: ``c2c_cocaption`` (captions of one image) and ``c2c_isim``
    (captions of similar images). CxC's own evaluation averages correlations over resamples; this is Spearman's
    correlation over all pairs, as in the other tasks.

    Args:
        scores: ``sts_val.csv`` or ``sts_test.csv``, with the columns caption1, caption2, agg_score (0 to 5) and
            sampling_method.
        captions: the annotation files of MS-COCO that hold the captions: ``captions_val2014.json``, or those of 2017.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed, or a caption is in none of the annotation files; names the file and the
            line.
    """
    path = existing_file(scores)
    rows = list(_rows(path))
    files = [captions] if isinstance(captions, str | Path) else list(captions)
    texts = _captions([existing_file(file) for file in files], {caption for _, *pair, _, _ in rows for caption in pair})
    for where, *pair, _, _ in rows:
        for caption in pair:
            if caption not in texts:
                raise ValueError(
                    f"{where}: caption {caption} is not in {', '.join(map(str, files))}: give the annotations of "
                    "MS-COCO that hold it as well"
                )
    methods = sorted({method for *_, method in rows})
    subsets = (
        checked_pairs(
            method,
            path,
            ((where, score, texts[one], texts[two]) for where, one, two, score, own in rows if own == method),
        )
        for method in methods
    )
    task = STSTask(CXC, tuple(subsets))
    if not task.subsets:
        raise ValueError(f"{path} is empty: no pair with a score; copy the file again")
    return check_scorable(task)


def _rows(path: Path) -> Iterator[tuple[str, int, int, str, str]]:
    """Place, both caption ids, score and sampling method of each pair."""
    reader = csv.DictReader(read_lines(path, lambda _: None))
    missing = set(_COLUMNS) - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}: give sts_val.csv or sts_test.csv of CxC")
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            one, two, score, method = (row[name] or "" for name in _COLUMNS)
            yield where, _caption_id(one, where), _caption_id(two, where), score, method
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {csv_problem(error)}") from error


def _caption_id(name: str, where: str) -> int:
    """The annotation id in a name such as "COCO_val2014:sentid:349055"."""
    match = re.fullmatch(r".*:sentid:(\d{1,18})", name)
    if not match:
        raise ValueError(f"{where}: {name!r} is no caption id, such as COCO_val2014:sentid:349055; copy the file again")
    return int(match[1])


def _captions(files: Sequence[Path], wanted: set[int]) -> dict[int, Any]:
    return {
        annotation["id"]: annotation.get("caption")
        for file in files
        for annotation in json_items(file, "annotations.item")
        if isinstance(annotation, dict) and isinstance(annotation.get("id"), int) and annotation["id"] in wanted
    }
