"""The folder of an unfinished extraction: finished parts, each in its own file, and what they belong to."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from st_kdmcse.data.layout import Array
from st_kdmcse.data.readers import CaptionedImage, Problem
from st_kdmcse.files import atomic_file, manifest_checksum, read_json, write_json
from st_kdmcse.provenance import claim

logger = logging.getLogger(__name__)

_RUN, _END, _BAD_ROWS = "run.json", "end.json", "bad_rows.csv"
_COLUMNS = ("kind", "where", "message")
_METADATA = b"part"
_DAMAGED = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Part:
    """The features of some successive images of a data set.

    Attributes:
        digest: of the records that it was made from, see :func:`digest`.
        image_ids: M ids.
        image_features: (M, T).
        captions: for each image its captions.
        text_features: (K, T) of all captions, in order.
        problems: images that could not be read, and are not in it.
    """

    digest: str
    image_ids: Sequence[str]
    image_features: Array
    captions: Sequence[Sequence[str]]
    text_features: Array
    problems: Sequence[Problem] = ()


@dataclass(frozen=True)
class PartHeader:
    """What is known of a part without reading its features."""

    digest: str
    image_ids: tuple[str, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class End:
    """What the end of the data set showed.

    Attributes:
        parts: how many there are.
        chain: SHA-256 of the digests of the parts.
        records: SHA-256 of all ids and captions, however they are parted.
        bad_rows: how many of each kind.
    """

    parts: int
    chain: str
    records: str
    bad_rows: Mapping[str, int]


class PartsFolder:
    """Parts of an extraction by number; every file in it is whole or absent.

    Args:
        path: the folder; made by :meth:`claim`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._run_checksum = ""

    @property
    def exists(self) -> bool:
        """Whether an extraction was begun here."""
        return (self.path / _RUN).is_file()

    def claim(self, run: Mapping[str, Any]) -> None:
        """Begin an extraction, or go on with one that has the same settings.

        Args:
            run: settings that change the result.

        Raises:
            ValueError: if the parts here were made with other settings.
        """
        self._run_checksum = manifest_checksum(run)
        claim(
            self.path / _RUN,
            run,
            "repeat the extraction with the same options, choose another output, or delete that folder to begin again",
        )

    @property
    def run(self) -> dict[str, Any]:
        """The settings that the extraction was begun with."""
        return self._read_json(_RUN)

    def header(self, number: int) -> PartHeader | None:
        """A finished part without its features, which are not looked at; None if it is not finished."""
        path = self._part(number)
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
                return _header(reader)[0]
        except FileNotFoundError:
            return None
        except _DAMAGED:
            logger.warning("%s is damaged and is made again", path)
            return None

    def intact_header(self, number: int) -> PartHeader | None:
        """The same, of a part whose features and captions have their checksum; another one is made again."""
        if self.header(number) is None:
            return None
        try:
            part = self._read(number)
        except _DAMAGED:
            logger.warning("%s is damaged and is made again", self._part(number))
            return None
        return PartHeader(part.digest, tuple(part.image_ids), tuple(part.problems))

    def read(self, number: int) -> Part:
        """A finished part.

        Raises:
            ValueError: if it is missing or damaged.
        """
        try:
            return self._read(number)
        except _DAMAGED as error:
            raise ValueError(
                f"{self._part(number)} is missing or damaged ({error}): run the extraction again, it makes it again"
            ) from error

    def _read(self, number: int) -> Part:
        with pa.memory_map(str(self._part(number))) as source, pa.ipc.open_file(source) as reader:
            header, checksum = _header(reader)
            batch = reader.get_batch(0)
            batch.validate(full=True)
            part = Part(
                header.digest,
                batch.column("image").to_pylist(),
                _from_arrow(batch.column("image_features")),
                batch.column("captions").to_pylist(),
                _from_arrow(batch.column("text_features").flatten()),
                header.problems,
            )
        if _checksum(part) != checksum:
            raise ValueError("its checksum does not fit its content")
        return part

    def write(self, number: int, part: Part) -> None:
        """Save a part; it is there, whole, when this returns."""
        offsets = np.cumsum([0, *(len(captions) for captions in part.captions)])
        columns = {
            "image": pa.array(part.image_ids, pa.string()),
            "captions": pa.array(part.captions, pa.list_(pa.string())),
            "image_features": _to_arrow(part.image_features),
            "text_features": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), _to_arrow(part.text_features)),
        }
        content = {
            "digest": part.digest,
            "image_ids": list(part.image_ids),
            "problems": [asdict(problem) for problem in part.problems],
            "checksum": _checksum(part),
        }
        batch = pa.record_batch(list(columns.values()), names=list(columns))
        batch = batch.replace_schema_metadata({_METADATA: json.dumps(content)})
        with (
            _keeping_parts(),
            atomic_file(self._part(number), "wb") as file,
            pa.ipc.new_file(file, batch.schema) as writer,
        ):
            writer.write_batch(batch)

    @property
    def count(self) -> int:
        """How many parts are finished."""
        return sum(1 for _ in self.path.glob("part-*.arrow"))

    def check_complete(self, end: End) -> None:
        """Make sure that all parts are there, and belong together.

        Raises:
            ValueError: if parts are missing (names them), or were made from other data.
        """
        headers = [self.header(number) for number in range(end.parts)]
        missing = [number for number, header in enumerate(headers) if header is None]
        if missing:
            numbers = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            raise ValueError(
                f"{len(missing)} of {end.parts} parts are missing ({numbers}): part k belongs to shard k mod n; run "
                "the extraction of those shards again"
            )
        if chain([header.digest for header in headers if header is not None]) != end.chain:
            raise ValueError(_other_data(self.path))
        if not any(header.image_ids for header in headers if header is not None):
            problems = [problem for header in headers if header is not None for problem in header.problems]
            raise ValueError(
                f"no image could be read, the first one: {problems[0] if problems else 'no reason known'}. Are "
                "`images` in another folder? The same command tries them again"
            )

    @property
    def end(self) -> End | None:
        """What the end of the data set showed; None before a process got there."""
        path = self.path / _END
        if not path.is_file():
            return None
        content = self._read_json(_END)
        if content.pop("checksum", None) != manifest_checksum(content):
            logger.warning("%s is damaged and is made again", path)
            return None
        if content.pop("run") != manifest_checksum(self.run):
            raise ValueError(f"{self.path / _RUN} is damaged: delete {self.path} to begin again")
        return End(**content)

    def write_end(self, end: End) -> None:
        """Note the end of the data set.

        Raises:
            ValueError: if another shard found another end.
        """
        earlier = self.end
        if earlier is not None and earlier.chain != end.chain:
            raise ValueError(_other_data(self.path))
        with _keeping_parts():
            content = {**asdict(end), "run": self._run_checksum}
            write_json(self.path / _END, {**content, "checksum": manifest_checksum(content)})

    @contextmanager
    def bad_rows(self) -> Iterator[Callable[[Problem], None]]:
        """A list of bad rows for one pass over the data set, in a file that appears when the block ends."""
        with atomic_file(self.path / _BAD_ROWS, newline="", errors="backslashreplace") as file:
            writer = csv.writer(file)
            yield lambda problem: writer.writerow(_row(problem))

    def write_skipped(self, target: Path, count: int) -> None:
        """Write all that was left out into a CSV file: bad rows, then the images of each part that were unreadable."""
        with atomic_file(target, newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            rows = self.path / _BAD_ROWS
            if rows.is_file():
                with rows.open(encoding="utf-8", newline="") as source:
                    writer.writerows(csv.reader(source))
            for number in range(count):
                header = self.header(number)
                writer.writerows(_row(problem) for problem in (header.problems if header else ()))

    def remove(self) -> None:
        """Delete the folder; what tells that it is one goes last."""
        if not self.path.is_dir():
            return
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _RUN:
                path.unlink(missing_ok=True)
        (self.path / _RUN).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _read_json(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name, f"delete {self.path} to begin again")

    def _part(self, number: int) -> Path:
        return self.path / f"part-{number:07d}.arrow"


def _header(reader: pa.RecordBatchFileReader) -> tuple[PartHeader, str]:
    """What is known of a part, and its checksum."""
    content = json.loads(reader.schema.metadata[_METADATA])
    problems = tuple(Problem(**problem) for problem in content["problems"])
    return PartHeader(content["digest"], tuple(content["image_ids"]), problems), content["checksum"]


def _checksum(part: Part) -> str:
    """SHA-256 of all that a part holds."""
    texts = [part.digest, list(part.image_ids), [list(of_image) for of_image in part.captions]]
    content = hashlib.sha256(json.dumps([*texts, [asdict(problem) for problem in part.problems]]).encode())
    for features in (part.image_features, part.text_features):
        content.update(f"{features.dtype} {features.shape}".encode())
        content.update(np.ascontiguousarray(features).data)
    return content.hexdigest()


def digest(records: Iterable[CaptionedImage]) -> str:
    """SHA-256 of ids and captions: it tells whether a part belongs to these records."""
    content = hashlib.sha256()
    for record in records:
        content.update(record_bytes(record))
    return content.hexdigest()


def record_bytes(record: CaptionedImage) -> bytes:
    """Id and captions, for a digest."""
    return json.dumps([record.image_id, record.captions]).encode()


def chain(digests: Iterable[str]) -> str:
    """SHA-256 of the digests of successive parts."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _other_data(path: Path) -> str:
    return (
        f"the shards in {path} were made from different data: repeat them with the same options and files, or delete "
        "that folder to begin again"
    )


def _to_arrow(features: Array) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])


def _from_arrow(column: pa.Array) -> Array:
    values: Array = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, column.type.list_size)


def _row(problem: Problem) -> tuple[str, str, str]:
    return problem.kind, problem.where, problem.message


@contextmanager
def _keeping_parts() -> Iterator[None]:
    """Say what is kept when the disk is full."""
    try:
        yield
    except OSError as error:
        remedy = "what is finished is kept, and the same command goes on from there"
        raise OSError(error.errno, f"{error.strerror}; {remedy}", error.filename) from error
