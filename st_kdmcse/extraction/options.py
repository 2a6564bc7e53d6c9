"""An extraction as a user asks for it: data set, teacher and output by name."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from st_kdmcse.data import FeatureStore
from st_kdmcse.data.layout import FeatureDtype
from st_kdmcse.data.readers import ImageCaptionReader, open_captions
from st_kdmcse.extraction.extract import ExtractionReport, extract, finished_report
from st_kdmcse.extraction.merge import merge, parts_folder
from st_kdmcse.extraction.parts import record_bytes
from st_kdmcse.processes import processes
from st_kdmcse.teachers import Teacher, TeacherPrecision, load_teacher

DEFAULT_TEACHER = "ViT-B-32"


@dataclass(frozen=True)
class ExtractionOptions:
    """What to encode, and with what.

    Args:
        captions: file or folder that :func:`~st_kdmcse.data.readers.open_captions` reads, or a data set on the hub.
        images: folder of the images, where the data set does not bring them.
        captions_format: of ``captions``; "auto" looks at it.
        split: part of the data set.
        image_column: of a table or a data set on the hub.
        caption_column: of the same.
        captions_per_image: draw that many captions of each image; None takes all.
        limit: draw that many images; None takes all.
        subset_seed: of both draws.
        on_error: "raise" refuses a data set with bad rows or unreadable images, "skip" leaves them out.
        teacher: see :func:`~st_kdmcse.teachers.load_teacher`.
        pretrained: weights of an open_clip model.
        text_teacher: another teacher for the captions.
        precision: of the teacher's computation.
        dtype: of the stored features.
        batch_size: images or captions a forward pass.
        workers: processes that decode images; None takes one for each core, at most 8.
    """

    captions: str
    images: Path | None = None
    captions_format: str = "auto"
    split: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    captions_per_image: int | None = None
    limit: int | None = None
    subset_seed: int = 0
    on_error: Literal["raise", "skip"] = "raise"
    teacher: str = DEFAULT_TEACHER
    pretrained: str | None = None
    text_teacher: str | None = None
    precision: TeacherPrecision = "auto"
    dtype: FeatureDtype = "float16"
    batch_size: int = 64
    workers: int | None = None

    def open_captions(self) -> ImageCaptionReader:
        """The reader of the data set."""
        return open_captions(
            self.captions,
            self.images,
            self.captions_format,
            self.split,
            image_column=self.image_column,
            caption_column=self.caption_column,
            captions_per_image=self.captions_per_image,
            limit=self.limit,
            seed=self.subset_seed,
            on_error=self.on_error,
        )

    def load_teacher(self, device: Any = None) -> Teacher:
        """The teacher, on a device."""
        return load_teacher(
            self.teacher,
            self.pretrained,
            self.text_teacher,
            device=device,
            batch_size=self.batch_size,
            precision=self.precision,
        )

    def source(self) -> dict[str, Any]:
        """What is encoded, without the folders that things are in: kept in the store's manifest."""
        named = {
            "captions": Path(self.captions).name,
            "split": None if self.split is None else Path(self.split).name,
            "captions_per_image": self.captions_per_image,
            "limit": self.limit,
            "subset_seed": None if self.captions_per_image is None and self.limit is None else self.subset_seed,
        }
        return {name: value for name, value in named.items() if value is not None}


def extract_dataset(
    options: ExtractionOptions,
    path: str | Path,
    shard: tuple[int, int] | None = None,
    show_progress_bar: bool | None = None,
) -> ExtractionReport:
    """Extract as the options say; a store that they made before is left as it is.

    Everything that can be checked without the teacher is checked first. Under ``torchrun`` each process does a shard,
    and the first one joins them.

    Args:
        options: data set and teacher.
        path: the store's folder.
        shard: as for :func:`~st_kdmcse.extraction.extract`; None takes the processes of ``torchrun``, if any.
        show_progress_bar: None shows one in a terminal.

    Returns:
        What was done.

    Raises:
        FileExistsError: if there is something else at ``path``.
        FileNotFoundError, ValueError: for a data set or a teacher that cannot be read, see
            :func:`~st_kdmcse.extraction.extract`.
    """
    path = Path(path).resolve()
    ranks = processes()
    reader = options.open_captions()
    if not path.exists():
        _check_rows(reader, options)
    teacher = options.load_teacher(ranks.device)
    if path.exists():
        _refuse_other(path, reader, teacher, options)
        if ranks.is_main_process:
            parts_folder(path).remove()  # what a process left that was killed while tidying up
        return finished_report(path)
    joint = shard is None and ranks.num_processes > 1
    report = extract(
        reader,
        teacher,
        path,
        dtype=options.dtype,
        workers=default_workers() if options.workers is None else options.workers,
        shard=shard or (ranks.process_index, ranks.num_processes),
        source=options.source(),
        show_progress_bar=show_progress_bar if ranks.is_local_main_process else False,
    )
    if joint:
        _merge_jointly(path, ranks, show_progress_bar)
        complete = finished_report(path)
        report = replace(report, store=complete.store, skipped_file=complete.skipped_file)
    return report


def _merge_jointly(path: Path, ranks: PartialState, show_progress_bar: bool | None) -> None:
    """Wait for the parts of all processes, and let the first one join them.

    The waiting looks at the files: a barrier has a time limit, which a slow process or a long joining may exceed.
    """
    parts = parts_folder(path)
    while (end := parts.end) is None or parts.count < end.parts:
        time.sleep(1)
    ranks.wait_for_everyone()
    if ranks.is_main_process:
        merge(path, show_progress_bar)
    while not path.exists() or parts.exists:
        time.sleep(0.5)


def default_workers() -> int:
    """A process for each core that may be used, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def _refuse_other(path: Path, reader: ImageCaptionReader, teacher: Teacher, options: ExtractionOptions) -> None:
    """Refuse what is at ``path`` unless it is the store that these options make."""
    try:
        store = FeatureStore.open(path)
    except (FileNotFoundError, ValueError) as error:
        raise FileExistsError(f"{path} exists already and is no whole feature store ({error})") from error
    made_from = store.manifest.get("source", {})
    wanted = {"teacher": teacher.name, "dtype": options.dtype, "precision": teacher.precision, **options.source()}
    found = {"teacher": store.teacher, "dtype": str(store.dtype), **made_from}
    if not reader.streaming:
        wanted["records_sha256"] = _records_digest(reader)
    changes = [
        f"{name} {found.get(name)!r} instead of {value!r}" for name, value in wanted.items() if found.get(name) != value
    ]
    if changes:
        raise FileExistsError(f"{path} exists already, made with {', '.join(changes)}: choose another output")


def _records_digest(reader: ImageCaptionReader) -> str:
    content = hashlib.sha256()
    for record in reader.records(check_files=False):
        content.update(record_bytes(record))
    return content.hexdigest()


def _check_rows(reader: ImageCaptionReader, options: ExtractionOptions) -> None:
    """Report all bad rows at once, before hours of work."""
    if reader.streaming:
        return
    if next(iter(reader.records(check_files=False))).image is None:
        raise ValueError(f"{reader.name} holds no images: give their folder as `images`")
    if options.on_error == "skip":
        return
    summary = reader.summary()
    count = sum(summary.problems.counts.values())
    if count:
        raise ValueError(
            f"the data set has {count:,} bad row{'s' if count > 1 else ''}; mend them, or set `on_error` to "
            f"skip, which leaves them out:\n{summary}"
        )
