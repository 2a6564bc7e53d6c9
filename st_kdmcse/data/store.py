"""Teacher features of images and captions on disk: written once, memory-mapped, gathered by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from st_kdmcse.data.layout import (
    ARROW,
    FORMAT,
    IMAGES,
    MANIFEST,
    NOT_FINITE,
    ROWS_PER_CHUNK,
    SCHEMA,
    TEXTS,
    VERSION,
    Array,
    FeatureDtype,
    RowNumbers,
    as_rows,
    off_norm,
)
from st_kdmcse.data.opening import open_array, open_table, read_store_manifest, table_name
from st_kdmcse.data.verification import verify_checksum, verify_encoding, verify_features, verify_table
from st_kdmcse.data.writer import write_arrays
from st_kdmcse.files import byte_progress, sha256_file

_SAMPLED_ROWS = 256


@dataclass(frozen=True)
class FeatureBatch:
    """Teacher features of a batch of captions, in the order and dtype of the store.

    Attributes:
        image_features: (B, T) features of each caption's image.
        text_features: (B, T) features of each caption.
        image_rows: (B,) int64, equal where two captions belong to the same image.
    """

    image_features: Array
    text_features: Array
    image_rows: RowNumbers


class FeatureStore:
    """Teacher features and captions in a folder, memory-mapped: opening takes milliseconds whatever the size.

    One row is one caption with its image; several captions share one image row. A store is picklable (it is opened
    again by path) and read-only. Make one with :class:`FeatureStoreWriter`, :meth:`from_arrays` or
    :func:`~st_kdmcse.data.released.import_released_json`, and open it with :meth:`open`.

    The folder holds

    ======================  ==========================================================================================
    File                    Content
    ======================  ==========================================================================================
    ``image_features.npy``  (images, T) float16 or float32, C order
    ``text_features.npy``   (texts, T) in the same dtype, C order
    ``captions.arrow``      Arrow IPC stream with the columns ``image`` (string, the image's id), ``caption`` (string),
                            ``image_row`` and ``text_row`` (int64) in record batches of at most 65,536 rows; row i of
                            the store is row i of this table. ``captions.csv`` with the same columns is read as well.
    ``manifest.json``       format and version, teacher, dim, dtype, whether all features have norm 1, whether images
                            and texts share one space, the numbers of images and rows, bytes and SHA-256 of each file,
                            and a checksum of all that
    ``statistics.json``     statistics of the teacher's scores, written when a loss first asks for them
    ======================  ==========================================================================================

    A folder without a manifest opens too: the teacher is then "unknown", ``normalized`` is read off a sample of the
    features, and nothing is written into the folder.

    Example:
        ::

            store = FeatureStore.open("flickr30k-features")
            batch = store.gather([0, 1, 2])  # batch.image_features: (3, T)
            pairs = store.dataset(captions_per_image=1)  # columns sentence, row
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path).resolve()
        if not self._path.is_dir():
            raise FileNotFoundError(
                f"there is no feature store at {path}: make one with st-kdmcse extract, FeatureStore.from_arrays or "
                "import_released_json"
            )
        manifest = read_store_manifest(self._path)
        self._images = open_array(self._path / IMAGES)
        self._texts = open_array(self._path / TEXTS)
        if self._images.shape[1] != self._texts.shape[1] or self._images.dtype != self._texts.dtype:
            raise ValueError(
                f"{self._path}: the image features are {self._images.dtype} of dim {self._images.shape[1]} and the "
                f"text features {self._texts.dtype} of dim {self._texts.shape[1]}; both must be the same"
            )
        self.table_name = table_name(self._path, manifest)
        self._table = open_table(self._path / self.table_name)
        self._manifest = manifest or self._derived_manifest()
        self._check_manifest()

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> FeatureStore:
        """Open a store.

        The structure is always checked: files, headers, sizes, dims, dtypes, columns, and the manifest against all of
        them. Features and captions are not read for that.

        Args:
            path: the store's folder.
            verify: call :meth:`verify` as well, which reads every byte.

        Raises:
            FileNotFoundError: if the folder or one of its files is missing.
            ValueError: if a file is damaged, or does not agree with the others or with the manifest.
        """
        store = cls(path)
        if verify:
            store.verify()
        return store

    @classmethod
    def from_arrays(
        cls,
        path: str | Path,
        image_features: Array,
        text_features: Array,
        captions: Sequence[str],
        image_rows: Sequence[int] | RowNumbers,
        image_ids: Sequence[str],
        teacher: str,
        normalized: bool | None = None,
        dtype: FeatureDtype | None = None,
    ) -> FeatureStore:
        """Write a store from arrays and open it.

        Args:
            path: folder to make; it must not exist.
            image_features: (M, T) floats, a row for each image. Memory-mapped arrays are read in chunks.
            text_features: (N, T) floats, a row for each caption.
            captions: N captions.
            image_rows: N integers: the row of ``image_features`` that belongs to each caption.
            image_ids: M distinct ids of the images, such as their file names.
            teacher: the model that the features come from.
            normalized: whether all features have norm 1; None reads it off the features.
            dtype: how to store the features; None keeps float16 and stores anything else as float32.

        Raises:
            FileExistsError: if there is something at ``path`` already.
            ValueError: if the lengths do not agree, or a feature, caption, id or image row is invalid.
        """
        write_arrays(path, image_features, text_features, captions, image_rows, image_ids, teacher, normalized, dtype)
        return cls(path)

    def __len__(self) -> int:
        """Number of rows, that is of captions."""
        return int(self._table.num_rows)

    def __repr__(self) -> str:
        return (
            f"FeatureStore({str(self._path)!r}, rows={len(self)}, images={self.num_images}, dim={self.dim}, "
            f"dtype={self.dtype}, teacher={self.teacher!r})"
        )

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Path]]:
        return FeatureStore, (self._path,)

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._path

    @property
    def manifest(self) -> dict[str, Any]:
        """A copy of the manifest, or what can be derived where the folder has none."""
        return json.loads(json.dumps(self._manifest))  # type: ignore[no-any-return]

    @cached_property
    def checksum(self) -> str:
        """SHA-256 over the content: the manifest's, or of the files in a store without one (which reads them)."""
        if "checksum" in self._manifest:
            return str(self._manifest["checksum"])
        digests = (sha256_file(self._path / name) for name in (IMAGES, TEXTS, self.table_name))
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def dim(self) -> int:
        """T, the width of the features."""
        return int(self._images.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """float16 or float32, as stored."""
        return self._images.dtype

    @property
    def num_images(self) -> int:
        """Number of image rows."""
        return len(self._images)

    @property
    def normalized(self) -> bool:
        """Whether all features have norm 1."""
        return bool(self._manifest["normalized"])

    @property
    def shared_space(self) -> bool:
        """Whether image and text features can be compared with each other: one teacher gave both."""
        return bool(self._manifest.get("shared_space", True))

    @property
    def teacher(self) -> str:
        """The model that the features come from."""
        return str(self._manifest["teacher"])

    @property
    def image_features(self) -> Array:
        """(images, T) memory-mapped, read-only."""
        return self._images

    @property
    def text_features(self) -> Array:
        """(texts, T) memory-mapped, read-only."""
        return self._texts

    @property
    def image_rows(self) -> RowNumbers:
        """(rows,) int64: the row of :attr:`image_features` that belongs to each caption."""
        return self._row_numbers[0]

    @property
    def text_rows(self) -> RowNumbers:
        """(rows,) int64: the row of :attr:`text_features` that belongs to each caption."""
        return self._row_numbers[1]

    def caption(self, row: int) -> str:
        """The caption of a row."""
        return str(self._value("caption", row))

    def captions(self) -> Iterator[tuple[str, str]]:
        """Id of the image and caption of each row, in order."""
        for batch in self._table.select(["image", "caption"]).to_batches(max_chunksize=ROWS_PER_CHUNK):
            yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)

    def to_frame(self) -> pd.DataFrame:
        """The table of captions: a row for each, with the columns image, caption, image_row and text_row.

        The copy in memory takes about as much as ``captions.arrow`` on disk.
        """
        frame: pd.DataFrame = self._table.select(SCHEMA.names).to_pandas()
        return frame

    def image_id(self, row: int) -> str:
        """The id of a row's image."""
        return str(self._value("image", row))

    def gather(self, rows: Sequence[int] | Array | Any) -> FeatureBatch:
        """Features of some rows, copied to memory.

        Args:
            rows: B row numbers from 0 to ``len(store) - 1``, in any order and with repeats: a sequence, a numpy array
                or a torch tensor on the CPU.

        Raises:
            ValueError: if ``rows`` is not one-dimensional, a row is not an integer or is out of range, or features are
                not finite; names the file and the row.
        """
        batch = self.gather_unchecked(rows)
        for name, features in ((IMAGES, batch.image_features), (TEXTS, batch.text_features)):
            if not np.isfinite(features).all():
                numbers = self._row_numbers[name == TEXTS][as_rows(rows, len(self), name)]
                bad = int(numbers[~np.isfinite(features).all(axis=1)][0])
                raise ValueError(f"{self._path / name}, row {bad}: {NOT_FINITE}")
        return batch

    def gather_unchecked(self, rows: Sequence[int] | Array | Any) -> FeatureBatch:
        """The same as :meth:`gather`, also where features are NaN or infinite: for a look at a damaged store."""
        rows = as_rows(rows, len(self), f"the feature store {self._path}")
        image_rows, text_rows = self._row_numbers
        image_rows = image_rows[rows]
        return FeatureBatch(self._images[image_rows], self._texts[text_rows[rows]], image_rows)

    def dataset(self, captions_per_image: int | None = None, seed: int = 0) -> Dataset:
        """The captions as training data, with the columns ``sentence`` (string) and ``row`` (int64).

        The sentences stay memory-mapped where the table is ``captions.arrow``.

        Args:
            captions_per_image: draw at most this many captions of each image, without replacement (1 is the setting of
                MCSE); None takes all.
            seed: seed of the draw.

        Raises:
            ValueError: if ``captions_per_image`` is less than 1.
        """
        if self.table_name == ARROW:
            dataset = Dataset.from_file(str(self._path / ARROW)).select_columns(["caption"])
            dataset = dataset.rename_column("caption", "sentence")
        else:
            dataset = Dataset.from_dict({"sentence": self._table.column("caption")})
        dataset = dataset.add_column("row", np.arange(len(self)))
        if captions_per_image is None:
            return dataset
        if captions_per_image < 1:
            raise ValueError(f"captions_per_image is {captions_per_image}, expected at least 1")
        return dataset.select(_draw_rows(self.image_rows, captions_per_image, seed))

    def verify(self, show_progress_bar: bool | None = None) -> None:
        """Read everything and check it.

        Checked are the SHA-256 of every file, that captions are there and row numbers in range, that each image has one
        id, that features are finite, and that their norms are 1 if the store says so.

        Args:
            show_progress_bar: None shows one in a terminal if it takes more than two seconds.

        Raises:
            ValueError: naming the file and the row, and what is wrong there.
        """
        files: dict[str, dict[str, Any]] = self._manifest.get("files", {})
        arrays = {IMAGES: self._images, TEXTS: self._texts}
        total = sum(entry["bytes"] for entry in files.values()) + sum(array.nbytes for array in arrays.values())
        with byte_progress(total, f"Verifying {self._path.name}", show_progress_bar) as progress:
            for name, entry in files.items():
                verify_checksum(self._path / name, entry["sha256"], progress.update)
            table = self._path / self.table_name
            verify_encoding(table, self._table)
            verify_table(table, self._table, self.image_rows)
            for name, array in arrays.items():
                verify_features(self._path / name, array, self.normalized, progress.update)

    @cached_property
    def _row_numbers(self) -> tuple[RowNumbers, RowNumbers]:
        """Image row and text row of each caption, checked on first use: numpy would wrap negative ones around."""
        columns = []
        for name, limit in (("image_row", len(self._images)), ("text_row", len(self._texts))):
            numbers = self._table.column(name).to_numpy()
            bad = np.flatnonzero((numbers < 0) | (numbers >= limit))
            if bad.size:
                raise ValueError(
                    f"{self._path / self.table_name}, row {bad[0]}: {name} {numbers[bad[0]]} is out of range, there "
                    f"are {limit} rows of features; write the store again"
                )
            numbers.flags.writeable = False
            columns.append(numbers)
        return columns[0], columns[1]

    def _value(self, column: str, row: int) -> Any:
        (row,) = as_rows([row], len(self), f"the feature store {self._path}").tolist()
        return self._table.column(column)[row].as_py()

    def _derived_manifest(self) -> dict[str, Any]:
        samples = [a[np.linspace(0, len(a) - 1, _SAMPLED_ROWS, dtype=int)] for a in (self._images, self._texts)]
        return {
            "format": FORMAT,
            "version": VERSION,
            "teacher": "unknown",
            "normalized": not any(off_norm(sample).any() for sample in samples),
            **self._measures(),
        }

    def _measures(self) -> dict[str, Any]:
        return {"dim": self.dim, "dtype": str(self.dtype), "images": self.num_images, "rows": len(self)}

    def _check_manifest(self) -> None:
        for key, actual in self._measures().items():
            if self._manifest[key] != actual:
                raise ValueError(
                    f"{self._path / MANIFEST} says {key} = {self._manifest[key]!r}, the files have {actual!r}: copy "
                    "or write the store again"
                )
        for name, entry in self._manifest.get("files", {}).items():
            size = (self._path / name).stat().st_size
            if size != entry["bytes"]:
                raise ValueError(
                    f"{self._path / name} has {size:,} bytes, {MANIFEST} says {entry['bytes']:,}: copy or write the "
                    "store again"
                )


def _draw_rows(image_rows: RowNumbers, per_image: int, seed: int) -> RowNumbers:
    """At most ``per_image`` rows of each image, drawn without replacement, in ascending order."""
    order = np.lexsort((np.random.default_rng(seed).random(len(image_rows)), image_rows))
    starts = np.flatnonzero(np.diff(image_rows[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return np.sort(order[rank < per_image])
