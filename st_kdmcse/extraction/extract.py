"""From a data set to a feature store: a teacher's features, in parts that outlive a crash."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from st_kdmcse.data import FeatureStore
from st_kdmcse.data.images import ImageError, ImageSource
from st_kdmcse.data.layout import Array, FeatureDtype
from st_kdmcse.data.readers import BadRowError, CaptionedImage, ImageCaptionReader, Problem
from st_kdmcse.extraction.decoding import DecodedImages, collate_images, named_worker_errors
from st_kdmcse.extraction.merge import join_parts, parts_folder, refuse_existing, skipped_file
from st_kdmcse.extraction.parts import End, Part, PartsFolder, chain, digest, record_bytes
from st_kdmcse.files import locked, progress_bar
from st_kdmcse.teachers.base import Preprocess, Teacher, try_load

logger = logging.getLogger(__name__)

PART_SIZE = 512
"""Images a part: what a crash can cost."""


@dataclass(frozen=True)
class ExtractionReport:
    """What an extraction did.

    Attributes:
        path: the feature store.
        store: the store, open; None while parts of other processes are missing.
        images: in the parts that this process is responsible for.
        captions: of the images that this call read.
        earlier: images of them that were finished before.
        skipped: bad rows and unreadable images, by kind.
        skipped_file: the list of them; None if there are none, or the store is not complete.
        seconds: that this call took.
        shard: what this call was to do, of all.
    """

    path: Path
    store: FeatureStore | None
    images: int
    captions: int
    earlier: int
    skipped: Mapping[str, int]
    skipped_file: Path | None
    seconds: float
    shard: tuple[int, int] = (0, 1)

    def __str__(self) -> str:
        new = self.images - self.earlier
        lines = [f"{new:,} images and {self.captions:,} captions in {self.seconds:.0f} s"]
        if new:
            lines[0] += f", {new / max(self.seconds, 1e-9):.1f} images a second"
        if self.shard[1] > 1:
            lines[0] = f"shard {self.shard[0]}/{self.shard[1]}: {lines[0]}"
        if self.earlier:
            lines.append(f"{self.earlier:,} images had been finished before")
        lines += [f"left out: {count:,} x {kind}" for kind, count in sorted(self.skipped.items())]
        if self.skipped_file:
            lines.append(f"listed in {self.skipped_file}")
        if self.store is None:
            lines.append(f"once all shards are finished: st-kdmcse merge {self.path}")
        else:
            lines.append(f"{self.store}")
        return "\n".join(lines)


def extract(
    reader: ImageCaptionReader,
    teacher: Teacher,
    path: str | Path,
    *,
    dtype: FeatureDtype = "float16",
    workers: int = 2,
    part_size: int = PART_SIZE,
    shard: tuple[int, int] = (0, 1),
    source: Mapping[str, Any] | None = None,
    show_progress_bar: bool | None = None,
) -> ExtractionReport:
    """Encode a data set with a teacher and write a feature store.

    The work is done in parts of ``part_size`` images, kept in ``path`` + ".parts" until all are there; then they are
    joined. Killed at any moment and called again, it goes on with the first part that is missing, and the store is,
    byte for byte, that of an uninterrupted run. Memory does not depend on the size of the data set.

    Args:
        reader: the data set. Its ``on_error`` decides about bad rows and unreadable images: "raise" or "skip".
        teacher: the model; the features are stored as it gives them, not normalised.
        path: the store's folder; it must not exist.
        dtype: of the stored features.
        workers: processes that decode images; 0 decodes in this one.
        part_size: images a part, rounded up to whole batches of the teacher.
        shard: (i, n) does the parts i, i + n, i + 2 n, ...; with n > 1 the parts are not joined: call :func:`merge`
            when all shards are finished.
        source: a description of the data set for the store's manifest.
        show_progress_bar: None shows one in a terminal.

    Returns:
        What was done.

    Raises:
        FileExistsError: if there is something at ``path`` already.
        ValueError: for other settings than those of the parts that are there, and for bad data (naming file and row);
            finished parts stay.
    """
    path = Path(path).resolve()
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard {index}/{count}: expected i/n with i from 0 to n - 1")
    if part_size < 1 or workers < 0:
        raise ValueError(f"part_size is {part_size} and workers {workers}: expected at least 1, and at least 0")
    preprocess = teacher.preprocess  # refused, before anything is written, by a teacher that knows no images
    part_size = -(-part_size // teacher.batch_size) * teacher.batch_size
    parts = parts_folder(path)
    run = {
        "teacher": teacher.name,
        "dim": teacher.dim,
        "shared_space": teacher.shared_space,
        "precision": teacher.precision,
        "batch_size": teacher.batch_size,
        "dtype": dtype,
        "part_size": part_size,
        "source": None if source is None else dict(source),
    }
    started = time.perf_counter()
    if not parts.exists:
        refuse_existing(path)
    with locked(parts.path, shared=count > 1):  # shards work side by side; joining the parts excludes them
        if path.exists() and parts.run == run:  # killed when all was done but the tidying up
            parts.remove()
            return finished_report(path, started)
        refuse_existing(path)
        parts.claim(run)
        job = _Job(reader, parts, preprocess, part_size, index, count)
        try:
            with _progress_bar(reader, part_size, shard, show_progress_bar) as bar:
                _encode_all(job, teacher, dtype, workers, bar)
        except BaseException:
            if count == 1 and not parts.count:
                parts.remove()
            raise
        finally:
            reader.on_problem = None
        parts.write_end(job.end())
        store = join_parts(path, parts, show_progress_bar) if count == 1 else None
    listed = skipped_file(path)
    return ExtractionReport(
        path,
        store,
        job.images,
        job.captions,
        job.earlier,
        dict(Counter(reader.problems.counts) + job.unreadable),
        listed if store and listed.exists() else None,
        time.perf_counter() - started,
        shard,
    )


def finished_report(path: Path, started: float | None = None) -> ExtractionReport:
    """The report of a call that finds the store complete.

    Args:
        path: the store's folder.
        started: when the call began, by ``time.perf_counter``.
    """
    store = FeatureStore.open(path)
    listed = skipped_file(path)
    seconds = 0.0 if started is None else time.perf_counter() - started
    return ExtractionReport(
        path, store, store.num_images, 0, store.num_images, {}, listed if listed.exists() else None, seconds
    )


class _Planned(NamedTuple):
    """A part that is being encoded."""

    number: int
    records: list[CaptionedImage]


@dataclass
class _Job:
    """A pass over the data set that plans the parts of one shard, a few batches ahead of the encoding."""

    reader: ImageCaptionReader
    parts: PartsFolder
    preprocess: Preprocess
    part_size: int
    index: int
    count: int
    planned: deque[_Planned] = field(default_factory=deque)
    unreadable: Counter[str] = field(default_factory=Counter)
    images: int = 0
    captions: int = 0
    earlier: int = 0
    digests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._records = hashlib.sha256()

    def end(self) -> End:
        """What the pass found, once it is over."""
        bad_rows = dict(self.reader.problems.counts)
        return End(len(self.digests), chain(self.digests), self._records.hexdigest(), bad_rows)

    def batches(self, batch_size: int, bar: tqdm[Any]) -> Iterator[list[ImageSource]]:
        """The images to decode, batch by batch; the parts that they belong to are added to ``planned``."""
        with self.parts.bad_rows() as on_problem:
            self.reader.on_problem = on_problem
            records = self.reader.records(check_files=False)
            while chunk := list(islice(records, self.part_size)):
                for record in chunk:
                    self._records.update(record_bytes(record))
                number = len(self.digests)
                self.digests.append(digest(chunk))
                if number % self.count != self.index or self._is_finished(number, chunk, bar):
                    continue
                sources = [_image(record) for record in chunk]
                self.planned.append(_Planned(number, chunk))
                for start in range(0, len(sources), batch_size):
                    yield sources[start : start + batch_size]

    def _is_finished(self, number: int, records: Sequence[CaptionedImage], bar: tqdm[Any]) -> bool:
        header = self.parts.intact_header(number)
        if header is None:
            return False
        if header.digest != self.digests[number]:
            raise ValueError(
                f"the data set has changed since part {number} of {self.parts.path} was made (from "
                f"{_place(records[0])}): delete that folder to begin again"
            )
        if header.problems:
            there = set(header.image_ids)
            if any(_is_readable(record, self.preprocess) for record in records if record.image_id not in there):
                logger.info("part %d is made again: images of it that could not be read can be read now", number)
                return False
            if self.reader.problems.on_error == "raise":
                raise BadRowError(header.problems[0])
        self.earlier += len(header.image_ids)
        self.images += len(header.image_ids)
        self.unreadable.update(problem.kind for problem in header.problems)
        if not bar.disable:
            for name in ("n", "initial", "last_print_n"):  # counted, but not in the rate
                setattr(bar, name, getattr(bar, name) + len(records))
        return True


def _encode_all(job: _Job, teacher: Teacher, dtype: FeatureDtype, workers: int, bar: tqdm[Any]) -> None:
    loader = DataLoader(
        DecodedImages(teacher),
        batch_sampler=job.batches(teacher.batch_size, bar),
        num_workers=workers,
        collate_fn=collate_images,
        pin_memory=teacher.device.type == "cuda",
    )
    features: list[Array] = []
    problems: list[Problem] = []
    kept: list[bool] = []
    for pixels, errors, size in named_worker_errors(loader):
        part = job.planned[0]
        for position, kind, message in errors:
            problem = Problem(kind, part.records[len(kept) + position].where, message)
            if job.reader.problems.on_error == "raise":
                raise BadRowError(problem)
            problems.append(problem)
        if len(pixels):
            features.append(teacher.encode_pixels(pixels).cpu().numpy())
        broken = {position for position, _, _ in errors}
        good = [position not in broken for position in range(size)]
        kept += good
        bar.update(len(good))
        if len(kept) == len(part.records):
            _finish_part(job, teacher, dtype, kept, features, problems)
            job.planned.popleft()
            features, problems, kept = [], [], []


def _finish_part(
    job: _Job,
    teacher: Teacher,
    dtype: FeatureDtype,
    kept: Sequence[bool],
    features: Sequence[Array],
    problems: Sequence[Problem],
) -> None:
    part = job.planned[0]
    records = [record for record, good in zip(part.records, kept, strict=True) if good]
    captions = [list(record.captions) for record in records]
    texts = [caption for of_image in captions for caption in of_image]
    empty = np.empty((0, teacher.dim), dtype=np.float32)
    text_features = teacher.encode_texts(texts, show_progress_bar=False) if texts else empty
    job.parts.write(
        part.number,
        Part(
            job.digests[part.number],
            [record.image_id for record in records],
            _stored(np.concatenate(features) if features else empty, dtype, records, "image"),
            captions,
            _stored(text_features, dtype, [record for record in records for _ in record.captions], "caption"),
            problems,
        ),
    )
    job.images += len(records)
    job.captions += len(texts)
    job.unreadable.update(problem.kind for problem in problems)


def _stored(features: Array, dtype: FeatureDtype, records: Sequence[CaptionedImage], what: str) -> Array:
    with np.errstate(over="ignore"):
        stored = features.astype(dtype)
    bad = np.flatnonzero(~np.isfinite(stored).all(axis=1))
    if bad.size:
        record = records[bad[0]]
        remedy = "set `dtype` to float32" if np.isfinite(features[bad[0]]).all() else "set `precision` to float32"
        raise ValueError(f"{_place(record)}: the features of the {what} are not finite in {dtype}: {remedy}")
    return stored


def _image(record: CaptionedImage) -> ImageSource:
    if record.image is None:
        raise ValueError(f"{_place(record)}: the data set was opened without images: give their folder as `images`")
    return record.image


def _is_readable(record: CaptionedImage, preprocess: Preprocess) -> bool:
    return not isinstance(try_load(_image(record), preprocess), ImageError)


def _place(record: CaptionedImage) -> str:
    return record.where or f"image {record.image_id!r}"


def _progress_bar(
    reader: ImageCaptionReader, part_size: int, shard: tuple[int, int], show_progress_bar: bool | None
) -> tqdm[Any]:
    index, count = shard
    total = None
    if reader.num_images is not None:
        whole, rest = divmod(len(reader), part_size)
        total = len(range(index, whole, count)) * part_size + (rest if whole % count == index else 0)
    description = "Extracting" if count == 1 else f"Extracting shard {index}/{count}"
    # In a log file, a line now and then is enough.
    interval = 0.5 if sys.stderr.isatty() else 30
    return progress_bar(total, description, "image", show_progress_bar, mininterval=interval)
