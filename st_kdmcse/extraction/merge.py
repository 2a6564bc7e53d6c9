"""The end of an extraction: its parts joined into a feature store."""

from __future__ import annotations

import shutil
from pathlib import Path

from st_kdmcse.data import FeatureStore, FeatureStoreWriter
from st_kdmcse.extraction.parts import PartsFolder
from st_kdmcse.files import locked, progress_bar


def merge(path: str | Path, show_progress_bar: bool | None = None) -> FeatureStore:
    """Join the parts of an extraction into its feature store, and remove them.

    Args:
        path: the store's folder, as given to :func:`extract`.
        show_progress_bar: None shows one in a terminal if it takes more than two seconds.

    Returns:
        The store, open; a store that is joined already is opened.

    Raises:
        FileNotFoundError: if no extraction was begun for ``path``.
        FileExistsError: if there is something else at ``path`` already.
        ValueError: if parts are missing (names them), were made from different data, or are being made.
    """
    path = Path(path).resolve()
    parts = parts_folder(path)
    if not parts.exists:
        if path.is_dir():
            return FeatureStore.open(path)
        raise FileNotFoundError(f"there is no extraction to merge: {parts.path} does not exist")
    with locked(parts.path):
        refuse_existing(path)
        return join_parts(path, parts, show_progress_bar)


def join_parts(path: Path, parts: PartsFolder, show_progress_bar: bool | None) -> FeatureStore:
    """Join all parts into the store, and delete their folder; the caller holds the lock."""
    end, run = parts.end, parts.run
    if end is None:
        raise ValueError(f"no process has reached the end of the data set yet: run the extraction of {path} again")
    parts.check_complete(end)
    joined = parts.path / "store"
    for left_over in (joined, *parts.path.glob(".store.*.tmp")):
        shutil.rmtree(left_over, ignore_errors=True)
    source = {**(run["source"] or {}), "precision": run["precision"], "records_sha256": end.records}
    skipped = bool(end.bad_rows)
    with FeatureStoreWriter(
        joined, run["dim"], run["dtype"], run["teacher"], shared_space=run["shared_space"], source=source
    ) as writer:
        for number in progress_bar(end.parts, "Joining parts", "part", show_progress_bar, iterable=range(end.parts)):
            part = parts.read(number)
            writer.extend(part.image_ids, part.image_features, part.captions, part.text_features)
            skipped |= bool(part.problems)
    if skipped:
        parts.write_skipped(skipped_file(path), end.parts)
    joined.rename(path)
    parts.remove()
    return FeatureStore.open(path)


def parts_folder(path: Path) -> PartsFolder:
    """Where the parts of a store are kept until it is complete."""
    return PartsFolder(path.absolute().with_name(path.absolute().name + ".parts"))


def skipped_file(path: Path) -> Path:
    """The list of what was left out of a store."""
    return path.absolute().with_name(path.absolute().name + ".skipped.csv")


def refuse_existing(path: Path) -> None:
    """Refuse to write a store where there is something already."""
    if path.exists():
        raise FileExistsError(f"{path} exists already: look at it with st-kdmcse inspect, or choose another output")
