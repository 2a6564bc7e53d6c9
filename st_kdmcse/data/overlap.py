"""Training captions and sentences that stand in the sets that a model is scored on."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from st_kdmcse.data.cxc import CXC, load_cxc
from st_kdmcse.data.layout import RowNumbers
from st_kdmcse.data.store import FeatureStore
from st_kdmcse.data.sts import STSTask, load_sts_splits
from st_kdmcse.files import atomic_file

_EXAMPLES = 5


class EvaluationTexts:
    """The sentences of evaluation sets.

    Two sentences are the same if nothing but capitals, full stops and white space tells them apart.

    Args:
        tasks: by the name of the set, such as "STS-B dev".

    Attributes:
        names: of the sets.
        checksum: SHA-256 over the sets, as 64 hexadecimal digits.
    """

    def __init__(self, tasks: Mapping[str, STSTask]) -> None:
        self.names = tuple(tasks)
        checksums = [f"{name} {task.checksum}" for name, task in tasks.items()]
        self.checksum = hashlib.sha256("\n".join(checksums).encode()).hexdigest()
        self._sets: dict[str, tuple[str, ...]] = {}
        for name, task in tasks.items():
            for key in {_normalised(sentence) for sentence in (*task.sentences1, *task.sentences2)}:
                self._sets[key] = (*self._sets.get(key, ()), name)

    def sets_with(self, text: str) -> tuple[str, ...]:
        """The names of the sets that a text stands in."""
        return self._sets.get(_normalised(text), ())

    def count(self, texts: Iterable[str]) -> int:
        """How many of some texts stand in the sets."""
        return sum(_normalised(text) in self._sets for text in texts)


@dataclass(frozen=True)
class OverlappingCaption:
    """A caption that stands in evaluation sets.

    Attributes:
        image: the id of its image.
        caption: the caption.
        row: its row in the store.
        sets: the names of the sets.
    """

    image: str
    caption: str
    row: int
    sets: tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """The captions of a feature store that stand in evaluation sets; ``str(overlap)`` is a text for the terminal.

    Attributes:
        captions: those captions, in the order of the store.
        sets: the names of all sets that were compared.
        images: number of images that they belong to.
        of_images: number of images of the store.
    """

    captions: tuple[OverlappingCaption, ...]
    sets: tuple[str, ...]
    images: int
    of_images: int

    @property
    def rows(self) -> RowNumbers:
        """(n,) rows of the captions."""
        return np.array([each.row for each in self.captions], dtype=np.int64)

    def by_set(self) -> dict[str, int]:
        """Number of captions by set; sets without any are left out."""
        counts = Counter(name for each in self.captions for name in each.sets)
        return {name: counts[name] for name in self.sets if counts[name]}

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        captions = [{**vars(each), "sets": list(each.sets)} for each in self.captions]
        return {"sets": list(self.sets), "images": self.images, "by_set": self.by_set(), "captions": captions}

    def __str__(self) -> str:
        sets = ", ".join(self.sets)
        if not self.captions:
            return f"No caption stands in {sets}"
        lines = [
            f"{self.images:,} of {self.of_images:,} images have a caption that stands in the evaluation sets ({sets}), "
            f"{len(self.captions):,} captions in all",
            *(f"  {name:<12}{count:>9,} captions" for name, count in self.by_set().items()),
            *(f"  {each.row}  {each.image}  {each.caption}" for each in self.captions[:_EXAMPLES]),
        ]
        more = len(self.captions) - _EXAMPLES
        return "\n".join([*lines, *([f"  and {more:,} more"] if more > 0 else [])])


def load_evaluation_texts(
    source: str | Path, cxc: str | Path | None = None, coco_captions: Sequence[str | Path] = ()
) -> EvaluationTexts:
    """Read the sentences of evaluation sets: of all splits of the STS tasks, and of CxC.

    Args:
        source: SentEval folder, as for :func:`~st_kdmcse.data.sts.load_sts_splits`.
        cxc: ``sts_val.csv`` or ``sts_test.csv`` of CxC; None leaves CxC out.
        coco_captions: the annotation files of MS-COCO that hold the captions of ``cxc``.

    Raises:
        FileNotFoundError: if a file or folder is missing.
        ValueError: if one is malformed, or the folder has none of the tasks; names it.
    """
    tasks = load_sts_splits(source)
    if cxc is not None:
        tasks[CXC] = load_cxc(cxc, coco_captions)
    return EvaluationTexts(tasks)


def find_overlap(store: FeatureStore, evaluated: EvaluationTexts) -> Overlap:
    """The captions of a store that stand in evaluation sets.

    Args:
        store: the store.
        evaluated: the sets.
    """
    found = tuple(
        OverlappingCaption(image, caption, row, sets)
        for row, (image, caption) in enumerate(store.captions())
        if (sets := evaluated.sets_with(caption))
    )
    return Overlap(found, evaluated.names, len({each.image for each in found}), store.num_images)


def write_overlap(path: Path, overlap: Overlap) -> None:
    """Write a CSV file that a training takes as ``exclude_images``.

    Args:
        path: the file; columns image, caption, row, sets, and a row a caption.
        overlap: what to write.
    """
    with atomic_file(path, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "caption", "row", "sets"])
        writer.writerows((each.image, each.caption, each.row, "; ".join(each.sets)) for each in overlap.captions)


def _normalised(text: str) -> str:
    return " ".join(text.lower().replace(".", " ").split())
