"""What all readers of image-caption data share: records, bad rows, choosing captions and subsets, the summary."""

from __future__ import annotations

import copy
import hashlib
import os
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeGuard

import numpy as np

from st_kdmcse.data.characters import control_character
from st_kdmcse.data.images import FileSlice, ImageSource
from st_kdmcse.data.seen import Seen
from st_kdmcse.files import progress_bar

OnError = Literal["raise", "skip"]

_LISTED = 100


@dataclass(frozen=True)
class CaptionedImage:
    """An image with its captions; unpacks into image id, image and captions.

    Attributes:
        image_id: unique in its data set, such as the file name.
        image: the file, a slice of a tar or the encoded bytes; None if the reader was given no images.
        captions: at least one, exactly as published.
        where: file and row that the record comes from, for messages.
    """

    image_id: str
    image: ImageSource | None
    captions: tuple[str, ...]
    where: str = ""

    def __iter__(self) -> Iterator[str | ImageSource | tuple[str, ...] | None]:
        yield from (self.image_id, self.image, self.captions)


@dataclass(frozen=True)
class Problem:
    """A bad row.

    Attributes:
        kind: such as "no caption", "no image file", "undecodable image", "outside path", "duplicate id", "wrong
            columns", "encoding", "control character".
        where: file and row.
        message: what is wrong there, and the remedy.
    """

    kind: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class BadRowError(ValueError):
    """A bad row, where ``on_error`` is "raise"; the message names file and row.

    Attributes:
        problem: the row.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass
class Problems:
    """Bad rows: all counted, by kind, and the first 100 listed.

    Attributes:
        on_error: "raise" raises :class:`BadRowError` at the first, "skip" counts, lists and goes on.
        counts: how many of each kind.
        listed: the first ones.
        on_problem: called with each.
    """

    on_error: OnError = "raise"
    counts: Counter[str] = field(default_factory=Counter)
    listed: list[Problem] = field(default_factory=list)
    on_problem: Callable[[Problem], object] | None = None

    def add(self, kind: str, where: str, message: str) -> None:
        """Count a bad row, or raise."""
        problem = Problem(kind, where, message)
        if self.on_error == "raise":
            raise BadRowError(problem)
        self.counts[kind] += 1
        if len(self.listed) < _LISTED:
            self.listed.append(problem)
        if self.on_problem is not None:
            self.on_problem(problem)


@dataclass(frozen=True)
class ReaderSummary:
    """What a pass over a data set found.

    Attributes:
        images: good ones.
        captions: of the good images.
        problems: bad rows, by kind and by place.
    """

    images: int
    captions: int
    problems: Problems

    def __str__(self) -> str:
        lines = [f"{self.images:,} images, {self.captions:,} captions"]
        lines += [f"{count:,} x {kind}" for kind, count in sorted(self.problems.counts.items())]
        lines += [f"  {problem}" for problem in self.problems.listed[:10]]
        return "\n".join(lines)


class ImageCaptionReader(ABC):
    """An iterable of :class:`CaptionedImage`, read from the files as their publisher ships them.

    Each iteration reads the files again. A bad row never shifts others: a record is made from one row, or from the
    rows that name its image.

    Args:
        captions_per_image: draw at most this many captions of each image, without replacement (1 is the setting of
            MCSE, and of Appendix B); None takes all, as KDMCSE does.
        limit: draw that many images at random, keeping their order; None takes all. Of the images drawn, those whose
            files turn out to be bad are left out.
        seed: of both draws.
        on_error: "raise" stops at the first bad row, "skip" leaves bad rows out; they are counted in
            :attr:`problems`.

    Attributes:
        problems: the bad rows of the last iteration.
        on_problem: called with each bad row that is left out; None by default.

    Raises:
        ValueError: for an option out of range.
    """

    name: str = "the data set"
    """What is read, for messages: the file, the folder, or the name on the hub."""

    streaming: bool = False
    """Whether a pass over the data is long: then nothing but the iteration itself should make one."""

    _images: Path | None = None
    """The folder of the images, if there is one: what a file names outside of it is not read."""

    def __init__(
        self,
        *,
        captions_per_image: int | None = None,
        limit: int | None = None,
        seed: int = 0,
        on_error: OnError = "raise",
    ) -> None:
        for name, value in (("captions_per_image", captions_per_image), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}, expected 'raise' or 'skip'")
        self.captions_per_image = captions_per_image
        self.limit = limit
        self.seed = seed
        self.problems = Problems(on_error)
        self.on_problem: Callable[[Problem], object] | None = None
        self._threshold: int | None = None

    @cached_property
    def num_images(self) -> int | None:
        """Number of images, before bad ones are left out; None if only a whole pass can tell."""
        return None

    @abstractmethod
    def _records(self) -> Iterator[CaptionedImage]:
        """All records in the order of the files, whether or not the image file is there.

        Bad rows go to ``self.problems.add(kind, where, message)``, which raises or lets the reader go on without them.
        Images that come twice may be yielded twice: the second one is left out by the caller.
        """

    def __iter__(self) -> Iterator[CaptionedImage]:
        return self.records()

    def __len__(self) -> int:
        """Number of images, before bad ones are left out.

        Raises:
            TypeError: if only a whole pass can tell.
        """
        if self.num_images is None:
            raise TypeError(f"the number of images of a {type(self).__name__} is not known before it is read")
        return self.num_images if self.limit is None else min(self.limit, self.num_images)

    def records(self, check_files: bool = True) -> Iterator[CaptionedImage]:
        """The good records.

        Args:
            check_files: look whether each image file is there and not empty; without it that shows when the image is
                read.

        Raises:
            BadRowError: at the first bad row, if ``on_error`` is "raise".
            ValueError: if there is no good record at all, or a file is not what its reader expects.
        """
        self.problems = Problems(self.problems.on_error, on_problem=self.on_problem)
        self._draw()
        any_good = False
        for record in self._unique():
            if self._threshold is not None and self._hash(record.image_id) > self._threshold:
                continue
            if check_files and not self._file_is_there(record):
                continue
            any_good = True
            yield self._with_drawn_captions(record)
        if not any_good:
            raise ValueError(f"{self.name} has no image with captions that could be used{self._bad_rows()}")

    def summary(self, show_progress_bar: bool | None = None) -> ReaderSummary:
        """Read everything but the images themselves, and count.

        Args:
            show_progress_bar: None shows one in a terminal if it takes more than two seconds.
        """
        self._draw()
        reader = copy.copy(self)
        reader.problems = Problems("skip")
        images = captions = 0
        total = None if self.num_images is None else len(self)
        checked = progress_bar(total, "Checking the data set", " images", show_progress_bar, iterable=reader.records())
        for record in checked:
            images += 1
            captions += len(record.captions)
        return ReaderSummary(images, captions, reader.problems)

    def _has_text(self, caption: object, where: str) -> TypeGuard[str]:
        """Whether a caption has text; if it has none, that is a problem of its row."""
        if isinstance(caption, str) and caption.strip():
            return True
        what = "the caption is empty" if isinstance(caption, str) else f"the caption is {caption!r}, no text"
        self.problems.add("no caption", where, f"{what}: fill it in, or leave the row out")
        return False

    def _count(self) -> int:
        """``num_images`` by a pass over the data, for files that are read quickly."""
        reader = copy.copy(self)
        reader.problems = Problems("skip")
        return sum(1 for _ in reader._unique())

    def _unique(self) -> Iterator[CaptionedImage]:
        with Seen() as seen:
            for record in self._records():
                if not all(_is_unicode(text) for text in (record.image_id, *record.captions)):
                    self.problems.add(
                        "encoding",
                        record.where,
                        f"the name or a caption of the image {record.image_id!r} has characters that are not Unicode: "
                        "correct them, or leave the image out",
                    )
                elif found := control_character(record.image_id):
                    message = f"the image id {record.image_id!r} holds the control character {found}: remove it"
                    self.problems.add("control character", record.where, message)
                elif not self._is_inside(record.image):
                    self.problems.add(
                        "outside path",
                        record.where,
                        f"the image {record.image} is outside of the folder of images {self._images}: correct the "
                        "path, or give a folder above both as `images`",
                    )
                elif seen.add(record.image_id):
                    yield record
                else:
                    self.problems.add(
                        "duplicate id", record.where, f"image {record.image_id!r} came before: give each image once"
                    )

    def _image_file(self, name: str) -> Path | None:
        """The file of an image; None without a folder of images."""
        return None if self._images is None else self._images / name

    def _is_inside(self, image: ImageSource | None) -> bool:
        """Whether an image is in the folder of images, by its path; links in the folder may lead anywhere."""
        if not isinstance(image, Path) or self._images is None:
            return True
        path, folder = (Path(os.path.normpath(each.absolute())) for each in (image, self._images))
        return path.is_relative_to(folder)

    def _file_is_there(self, record: CaptionedImage) -> bool:
        size = None if record.image is None else _size(record.image)
        if size or record.image is None:
            return True
        kind, what = ("empty image file", "has 0 bytes")
        if size is None:
            there = isinstance(record.image, Path) and os.path.lexists(str(record.image).replace("\0", ""))
            kind, what = ("no image file", "is no regular file" if there else "does not exist")
        name = f"of {record.image_id!r}" if isinstance(record.image, bytes) else record.image
        self.problems.add(kind, record.where, f"the image {name} {what}: add it, or leave its rows out")
        return False

    def _bad_rows(self) -> str:
        if not self.problems.listed:
            return ""
        counts = ", ".join(f"{count:,} x {kind}" for kind, count in sorted(self.problems.counts.items()))
        return f" ({counts}; the first bad row is {self.problems.listed[0]})"

    def _with_drawn_captions(self, record: CaptionedImage) -> CaptionedImage:
        count = len(record.captions)
        if self.captions_per_image is None or count <= self.captions_per_image:
            return record
        # Seeded by the image: the draw does not depend on what was read before.
        drawn = random.Random(f"{self.seed}:{record.image_id}").sample(range(count), self.captions_per_image)
        return replace(record, captions=tuple(record.captions[position] for position in sorted(drawn)))

    def _draw(self) -> None:
        """Find out, once, which images a ``limit`` leaves."""
        if self.limit is not None and self._threshold is None:
            self._threshold = self._find_threshold(self.limit)

    def _hash(self, image_id: str) -> int:
        key = f"{self.seed}:{image_id}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")

    def _find_threshold(self, limit: int) -> int:
        """The ``limit``-th smallest hash: the images up to it are a random subset, found without keeping ids.

        Where there are fewer images than that, the largest hash possible.

        Bad rows are left to the reading proper.
        """
        reader = copy.copy(self)
        reader.limit, reader.problems = None, Problems("skip")
        smallest = np.empty(0, dtype=np.uint64)
        pending: list[int] = []
        progress = progress_bar(None, "Drawing a subset", " images", iterable=reader._unique())
        for record in progress:
            pending.append(self._hash(record.image_id))
            if len(pending) >= max(limit, 65_536):
                smallest, pending = _smallest(smallest, pending, limit), []
        smallest = _smallest(smallest, pending, limit)
        return int(smallest.max()) if len(smallest) == limit else 2**64 - 1


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _size(image: ImageSource) -> int | None:
    """Bytes of an encoded image; None if there is no such file."""
    if isinstance(image, bytes):
        return len(image)
    if isinstance(image, FileSlice):
        return image.size
    try:
        return image.stat().st_size if image.is_file() else None
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None


def _smallest(kept: np.ndarray, new: list[int], count: int) -> np.ndarray:
    values = np.concatenate([kept, np.array(new, dtype=np.uint64)])
    return values if len(values) <= count else np.partition(values, count - 1)[:count]
