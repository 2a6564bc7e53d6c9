"""Teacher features of images and captions on disk: written once, memory-mapped, gathered by row."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from tokenize import TokenError
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from datasets import Dataset

from st_kdmcse.data.files import ByteProgress, byte_progress, sha256_file

FeatureDtype = Literal["float16", "float32"]
Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

_FORMAT = "st_kdmcse.feature_store"
_VERSION = 1
_IMAGES, _TEXTS, _MANIFEST = "image_features.npy", "text_features.npy", "manifest.json"
_ARROW, _CSV = "captions.arrow", "captions.csv"
_SCHEMA = pa.schema(
    [("image", pa.string()), ("caption", pa.string()), ("image_row", pa.int64()), ("text_row", pa.int64())]
)
_ROWS_PER_BATCH = 65_536
_ROWS_PER_CHUNK = 16_384
_SAMPLED_ROWS = 256
# Norms of float16 and bfloat16 unit vectors stray from 1 by less than this: their rounding errors average out.
_NORM_TOLERANCE = 2e-3


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
    image_rows: Rows


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
    ``manifest.json``       format and version, teacher, dim, dtype, whether all features have norm 1, the numbers of
                            images and rows, bytes and SHA-256 of each file, and a checksum of all that
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
                f"there is no feature store at {path}: make one with FeatureStoreWriter, FeatureStore.from_arrays or "
                "import_released_json"
            )
        manifest = _read_manifest(self._path)
        self._images = _open_array(self._path / _IMAGES)
        self._texts = _open_array(self._path / _TEXTS)
        if self._images.shape[1] != self._texts.shape[1] or self._images.dtype != self._texts.dtype:
            raise ValueError(
                f"{self._path}: the image features are {self._images.dtype} of dim {self._images.shape[1]} and the "
                f"text features {self._texts.dtype} of dim {self._texts.shape[1]}; both must be the same"
            )
        self._table_name = _table_name(self._path, manifest)
        self._table = _open_table(self._path / self._table_name)
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
        image_rows: Sequence[int] | Rows,
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
        image_features, text_features = np.asanyarray(image_features), np.asanyarray(text_features)
        if image_features.ndim != 2:
            raise ValueError(f"image_features has shape {image_features.shape}, expected (images, T)")
        if len(image_ids) != len(image_features):
            raise ValueError(f"{len(image_ids)} image_ids for {len(image_features)} rows of image_features")
        if not len(captions) == len(text_features) == len(image_rows):
            raise ValueError(
                f"{len(captions)} captions, {len(text_features)} rows of text_features and {len(image_rows)} "
                "image_rows: one of each is needed for every caption"
            )
        rows = _as_rows(image_rows, len(image_features), "image_features")
        if dtype is None:
            dtype = "float16" if image_features.dtype == np.float16 else "float32"
        with FeatureStoreWriter(path, image_features.shape[1], dtype, teacher, normalized) as writer:
            for image_id in image_ids:
                writer._add_id(image_id)
            for file, name, features in (
                (writer._images, "image_features", image_features),
                (writer._texts, "text_features", text_features),
            ):
                for start in range(0, len(features), _ROWS_PER_CHUNK):
                    file.append(writer._checked(features[start : start + _ROWS_PER_CHUNK], name, start))
            for text_row, (image_row, caption) in enumerate(zip(rows.tolist(), captions, strict=True)):
                writer._add_row(image_ids[image_row], caption, image_row, text_row)
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
        """SHA-256 over the content: the manifest's, or of the files where there is none (which reads them)."""
        if "checksum" in self._manifest:
            return str(self._manifest["checksum"])
        digests = (sha256_file(self._path / name) for name in (_IMAGES, _TEXTS, self._table_name))
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
    def image_rows(self) -> Rows:
        """(rows,) int64: the row of :attr:`image_features` that belongs to each caption."""
        return self._row_numbers[0]

    def caption(self, row: int) -> str:
        """The caption of a row."""
        return str(self._value("caption", row))

    def image_id(self, row: int) -> str:
        """The id of a row's image."""
        return str(self._value("image", row))

    def gather(self, rows: Sequence[int] | Array | Any) -> FeatureBatch:
        """Features of some rows, copied to memory.

        Args:
            rows: B row numbers from 0 to ``len(store) - 1``, in any order and with repeats: a sequence, a numpy array
                or a torch tensor on the CPU.

        Raises:
            ValueError: if ``rows`` is not one-dimensional, or a row is not an integer or is out of range.
        """
        rows = _as_rows(rows, len(self), f"the feature store {self._path}")
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
        if self._table_name == _ARROW:
            dataset = Dataset.from_file(str(self._path / _ARROW)).select_columns(["caption"])
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
        arrays = {_IMAGES: self._images, _TEXTS: self._texts}
        total = sum(entry["bytes"] for entry in files.values()) + sum(array.nbytes for array in arrays.values())
        with byte_progress(total, f"Verifying {self._path.name}", show_progress_bar) as progress:
            for name, entry in files.items():
                if sha256_file(self._path / name, progress.update) != entry["sha256"]:
                    raise ValueError(
                        f"{self._path / name} is damaged: its SHA-256 is not the one in {_MANIFEST}; copy or write the "
                        "store again"
                    )
            self._verify_table()
            for name, array in arrays.items():
                self._verify_features(self._path / name, array, progress)

    @cached_property
    def _row_numbers(self) -> tuple[Rows, Rows]:
        """Image row and text row of each caption, checked on first use: numpy would wrap negative ones around."""
        columns = []
        for name, limit in (("image_row", len(self._images)), ("text_row", len(self._texts))):
            numbers = self._table.column(name).to_numpy()
            bad = np.flatnonzero((numbers < 0) | (numbers >= limit))
            if bad.size:
                raise ValueError(
                    f"{self._path / self._table_name}, row {bad[0]}: {name} {numbers[bad[0]]} is out of range, there "
                    f"are {limit} rows of features; write the store again"
                )
            numbers.flags.writeable = False
            columns.append(numbers)
        return columns[0], columns[1]

    def _value(self, column: str, row: int) -> Any:
        (row,) = _as_rows([row], len(self), f"the feature store {self._path}").tolist()
        return self._table.column(column)[row].as_py()

    def _derived_manifest(self) -> dict[str, Any]:
        samples = [a[np.linspace(0, len(a) - 1, _SAMPLED_ROWS, dtype=int)] for a in (self._images, self._texts)]
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "teacher": "unknown",
            "normalized": not any(_off_norm(sample).any() for sample in samples),
            **self._measures(),
        }

    def _measures(self) -> dict[str, Any]:
        return {"dim": self.dim, "dtype": str(self.dtype), "images": self.num_images, "rows": len(self)}

    def _check_manifest(self) -> None:
        for key, actual in self._measures().items():
            if self._manifest[key] != actual:
                raise ValueError(
                    f"{self._path / _MANIFEST} says {key} = {self._manifest[key]!r}, the files have {actual!r}: copy "
                    "or write the store again"
                )
        for name, entry in self._manifest.get("files", {}).items():
            size = (self._path / name).stat().st_size
            if size != entry["bytes"]:
                raise ValueError(
                    f"{self._path / name} has {size:,} bytes, {_MANIFEST} says {entry['bytes']:,}: copy or write the "
                    "store again"
                )

    def _verify_table(self) -> None:
        path = self._path / self._table_name
        try:
            self._table.validate(full=True)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is damaged ({error}): copy or write the store again") from error
        image_rows, _ = self._row_numbers
        for name in ("image", "caption"):
            empty = pc.index(pc.equal(pc.utf8_trim_whitespace(self._table.column(name)), ""), True).as_py()
            if empty >= 0:
                raise ValueError(f"{path}, row {empty}: the {name} is empty; leave that row out")
        ids = self._table.column("image").dictionary_encode().combine_chunks()
        codes = ids.indices.to_numpy()
        first_row_of_id = np.zeros(len(ids.dictionary), dtype=np.int64)
        first_row_of_id[codes[::-1]] = np.arange(len(self))[::-1]
        wrong = np.flatnonzero(image_rows != image_rows[first_row_of_id[codes]])
        if wrong.size:
            row = int(wrong[0])
            raise ValueError(
                f"{path}, row {row}: image {self.image_id(row)!r} has image_row {image_rows[row]} here and "
                f"{image_rows[first_row_of_id[codes[row]]]} in an earlier row; give each image one row"
            )

    def _verify_features(self, path: Path, array: Array, progress: ByteProgress) -> None:
        for start in range(0, len(array), _ROWS_PER_CHUNK):
            chunk = array[start : start + _ROWS_PER_CHUNK]
            bad = np.flatnonzero(~np.isfinite(chunk).all(axis=1))
            if bad.size:
                raise ValueError(f"{path}, row {start + bad[0]}: the features hold NaN or infinite values")
            bad = np.flatnonzero(_off_norm(chunk)) if self.normalized else bad
            if bad.size:
                norm = np.linalg.norm(chunk[bad[0]].astype(np.float64))
                raise ValueError(
                    f"{path}, row {start + bad[0]}: the norm is {norm:.4f} though the store's features are said to be "
                    "normalised; write the store again with normalized=False, or normalise them first"
                )
            progress.update(chunk.nbytes)


class FeatureStoreWriter:
    """Writes a :class:`FeatureStore` image by image, in bounded memory.

    A context manager: the store appears at ``path``, whole, when the block ends, and not at all if the block raises or
    the process dies. Only the ids of the images and up to 65,536 captions are kept in memory.

    Args:
        path: folder to make; it must not exist.
        dim: T, the width of the features.
        dtype: how to store the features.
        teacher: the model that the features come from.
        normalized: whether all features have norm 1 (each is checked if so); None reads it off the features.

    Raises:
        FileExistsError: if there is something at ``path`` already.
        ValueError: if ``dim`` or ``dtype`` is invalid.

    Example:
        ::

            with FeatureStoreWriter("features", dim=512, teacher="ViT-B-32/openai") as writer:
                writer.add("dog.jpg", image_feature, ["a dog", "a black dog"], text_features)
            store = FeatureStore.open("features")
    """

    def __init__(
        self,
        path: str | Path,
        dim: int,
        dtype: FeatureDtype = "float16",
        teacher: str = "unknown",
        normalized: bool | None = None,
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim is {dim}, expected the width of the features")
        if dtype not in get_args(FeatureDtype):
            raise ValueError(f"dtype is {dtype!r}, expected 'float16' or 'float32'")
        self._path = Path(path).resolve()
        self._refuse_existing()
        self._dim, self._dtype, self._teacher, self._normalized = dim, np.dtype(dtype), teacher, normalized
        self._temporary = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}.tmp")
        self._all_unit = True
        self._ids: set[str] = set()
        self._rows_written = 0
        self._pending: list[tuple[str, str, int, int]] = []
        self._images: _GrowingArray
        self._texts: _GrowingArray

    def __enter__(self) -> FeatureStoreWriter:
        self._temporary.mkdir(parents=True)
        self._images = _GrowingArray(self._temporary / _IMAGES, self._dim, self._dtype)
        self._texts = _GrowingArray(self._temporary / _TEXTS, self._dim, self._dtype)
        self._table_file = (self._temporary / _ARROW).open("wb")
        self._table = pa.ipc.new_stream(self._table_file, _SCHEMA)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in (self._images.file, self._texts.file, self._table_file):
                file.close()
            shutil.rmtree(self._temporary, ignore_errors=True)

    def add(self, image_id: str, image_feature: Any, captions: Sequence[str], text_features: Any) -> None:
        """Append an image and its captions.

        Args:
            image_id: id of the image, such as its file name; each may come once.
            image_feature: (T,) numbers.
            captions: k >= 1 captions.
            text_features: (k, T) numbers.

        Raises:
            ValueError: naming the image, if the id came before, a caption is missing or empty, or features have the
                wrong shape, hold NaN or infinite values, overflow float16, or are not of norm 1 though
                ``normalized=True``. Nothing of the image is written then.
        """
        name = f"image {image_id!r}"
        if isinstance(captions, str) or not captions:
            raise ValueError(f"{name}: no list of captions; give each image at least one caption, or leave it out")
        for caption in captions:
            _check_text(caption, f"{name}: caption")
        image = self._checked(_as_array(image_feature, f"{name}: image_feature")[np.newaxis], f"{name}: image_feature")
        texts = self._checked(_as_array(text_features, f"{name}: text_features"), f"{name}: text_features")
        if len(texts) != len(captions):
            raise ValueError(f"{name}: {len(captions)} captions and {len(texts)} rows of text_features")
        self._add_id(image_id)
        for position, caption in enumerate(captions):
            self._add_row(image_id, caption, self._images.rows, self._texts.rows + position)
        self._images.append(image)
        self._texts.append(texts)

    def _refuse_existing(self) -> None:
        if self._path.exists():
            raise FileExistsError(f"{self._path} exists already: remove it, or write the store somewhere else")

    def _add_id(self, image_id: str) -> None:
        _check_text(image_id, "image id")
        if image_id in self._ids:
            raise ValueError(f"image {image_id!r} came before: give each image once, with all its captions")
        self._ids.add(image_id)

    def _add_row(self, image_id: str, caption: str, image_row: int, text_row: int) -> None:
        _check_text(caption, f"row {text_row} (image {image_id!r}): caption")
        self._pending.append((image_id, caption, image_row, text_row))
        if len(self._pending) == _ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        columns = list(zip(*self._pending, strict=True))
        self._table.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._rows_written += len(self._pending)
        self._pending.clear()

    def _checked(self, given: Array, name: str, first_row: int = 0) -> Array:
        """(n, T) features in the dtype of the store, or a ValueError that names the row."""
        if given.dtype.kind not in "fiu":
            raise ValueError(f"{name}: expected numbers, got {given.dtype}")
        if given.ndim != 2 or given.shape[1] != self._dim:
            raise ValueError(
                f"{name}: shape {given.shape}, expected (n, {self._dim}): the dim of the store is {self._dim}"
            )
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(given, dtype=self._dtype)
        if not np.isfinite(stored).all():
            row = int(np.flatnonzero(~np.isfinite(stored).all(axis=1))[0])
            where = f"{name}, row {first_row + row}"
            if not np.isfinite(given[row]).all():
                raise ValueError(f"{where}: NaN or infinite values; compute these features again, or leave them out")
            raise ValueError(
                f"{where}: {np.abs(given[row]).max():.3g} does not fit {self._dtype}; normalise the features"
                + (", or write the store with dtype='float32'" if self._dtype == np.float16 else "")
            )
        off = np.flatnonzero(_off_norm(stored))
        if off.size and self._normalized:
            norm = np.linalg.norm(stored[off[0]].astype(np.float64))
            raise ValueError(
                f"{name}, row {first_row + off[0]}: the norm is {norm:.4f} though normalized=True; normalise the "
                "features, or write the store with normalized=False"
            )
        self._all_unit &= not off.size
        return stored

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        if not self._rows_written:
            raise ValueError(f"no image was added to the feature store {self._path}")
        self._table.close()
        _sync(self._table_file)
        for array in (self._images, self._texts):
            array.finish()
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "teacher": self._teacher,
            "dim": self._dim,
            "dtype": str(self._dtype),
            "normalized": self._all_unit if self._normalized is None else self._normalized,
            "images": self._images.rows,
            "rows": self._rows_written,
            "files": {
                name: {"bytes": (self._temporary / name).stat().st_size, "sha256": sha256_file(self._temporary / name)}
                for name in (_IMAGES, _TEXTS, _ARROW)
            },
        }
        manifest["checksum"] = _checksum(manifest)
        with (self._temporary / _MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2, ensure_ascii=False)
            _sync(file)
        self._refuse_existing()
        _sync_folder(self._temporary)
        self._temporary.replace(self._path)
        _sync_folder(self._path.parent)


class _GrowingArray:
    """An .npy file that rows are appended to; :meth:`finish` writes the true shape into its header."""

    def __init__(self, path: Path, dim: int, dtype: np.dtype[Any]) -> None:
        self.rows = 0
        self.file = path.open("wb")
        self._dim, self._dtype = dim, dtype
        self._write_header()

    def append(self, rows: Array) -> None:
        self.file.write(rows.data)
        self.rows += len(rows)

    def finish(self) -> None:
        self.file.seek(0)
        self._write_header()
        _sync(self.file)

    def _write_header(self) -> None:
        # numpy pads the header so that its length does not depend on the number of rows.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.rows, self._dim)}
        np.lib.format.write_array_header_1_0(self.file, header)


def teacher_thresholds(store: FeatureStore, max_images: int = 2000, seed: int = 0) -> tuple[float | None, float]:
    """Thresholds for the false-negative filter, read off the true pairs of a store.

    A negative that scores at least as high as the median true pair is taken for a false negative.

    Args:
        store: the teacher features.
        max_images: how many images to draw, without replacement; all of them where there are fewer.
        seed: seed of the draw.

    Returns:
        The text threshold: the median cosine between two captions of the same image, None if no image drawn has two.
        The image threshold: the median cosine of a caption with its own image.
    """
    images = np.unique(store.image_rows)
    if len(images) > max_images:
        images = np.random.default_rng(seed).choice(images, max_images, replace=False)
    rows = np.flatnonzero(np.isin(store.image_rows, images))
    rows = rows[np.argsort(store.image_rows[rows], kind="stable")]
    text_cosines, image_cosines = [], []
    for of_image in np.split(rows, np.flatnonzero(np.diff(store.image_rows[rows])) + 1):
        batch = store.gather(of_image)
        texts = _unit(batch.text_features)
        image_cosines.append(texts @ _unit(batch.image_features)[0])
        text_cosines.append((texts @ texts.T)[np.triu_indices(len(texts), k=1)])
    between_texts = np.concatenate(text_cosines)
    text_threshold = float(np.median(between_texts)) if between_texts.size else None
    return text_threshold, float(np.median(np.concatenate(image_cosines)))


def _unit(features: Array) -> npt.NDArray[np.float32]:
    features = features.astype(np.float32)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, np.finfo(np.float32).tiny)  # type: ignore[no-any-return]


def _off_norm(features: Array) -> npt.NDArray[np.bool_]:
    """(n,) True where the norm is not 1."""
    with np.errstate(over="ignore"):
        norms = np.linalg.norm(features.astype(np.float32, copy=False), axis=1)
    off: npt.NDArray[np.bool_] = ~(np.abs(norms - 1) <= _NORM_TOLERANCE)
    return off


def _draw_rows(image_rows: Rows, per_image: int, seed: int) -> Rows:
    """At most ``per_image`` rows of each image, drawn without replacement, in ascending order."""
    order = np.lexsort((np.random.default_rng(seed).random(len(image_rows)), image_rows))
    starts = np.flatnonzero(np.diff(image_rows[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return np.sort(order[rank < per_image])


def _as_rows(rows: Any, size: int, owner: str) -> Rows:
    """(B,) int64 row numbers from anything that numpy can read, each at least 0 and less than ``size``."""
    given = np.asarray(rows)
    if given.ndim != 1:
        raise ValueError(f"rows have shape {given.shape}, expected a flat sequence of rows of {owner}")
    if given.dtype.kind not in "iu" or ((given < 0) | (given >= size)).any():
        for row in np.asarray(rows, dtype=object):
            if isinstance(row, bool) or not isinstance(row, Integral) or not 0 <= int(row) < size:
                raise ValueError(f"row {row!r} is not an integer from 0 to {size - 1}: {owner} has {size} rows")
    return given.astype(np.int64, copy=False)


def _as_array(values: Any, name: str) -> Array:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name}: the rows have different lengths ({error})") from error


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {value!r}, expected a string that is not empty")


def _checksum(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The checked content of the manifest; None if the folder has none."""
    path = folder / _MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy or write the store again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"{path} is not the manifest of a feature store: its format is not {_FORMAT!r}")
    if manifest.get("version") != _VERSION:
        raise ValueError(
            f"{path} has version {manifest.get('version')!r}, this st_kdmcse reads version {_VERSION}: upgrade "
            "st-kdmcse, or write the store again"
        )
    if manifest.get("checksum") != _checksum(manifest):
        raise ValueError(
            f"{path} was edited or damaged: its checksum does not fit its content; restore it, or write the store again"
        )
    return manifest


def _table_name(folder: Path, manifest: Mapping[str, Any] | None) -> str:
    """Which of the two encodings of the table the store uses."""
    if manifest is not None:
        return _ARROW if _ARROW in manifest["files"] else _CSV
    return _CSV if (folder / _CSV).exists() and not (folder / _ARROW).exists() else _ARROW


def _require(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: a feature store holds {_IMAGES}, {_TEXTS} and {_ARROW} (or {_CSV}); copy or write the "
            "store again"
        )


def _open_array(path: Path) -> Array:
    _require(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError, SyntaxError, TokenError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is not a whole .npy file ({error}): copy or write the store again") from error
    if array.ndim != 2 or 0 in array.shape or array.dtype not in (np.float16, np.float32):
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, expected (n, T) float16 or float32")
    if not array.flags.c_contiguous:
        raise ValueError(f"{path} is in Fortran order: save numpy.ascontiguousarray of it")
    expected, size = array.offset + array.nbytes, path.stat().st_size
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, its header says {expected:,}: copy or write the store again")
    return array.view(np.ndarray)


def _open_table(path: Path) -> pa.Table:
    _require(path)
    try:
        if path.name == _CSV:
            table = pa.csv.read_csv(
                path,
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(
                    include_columns=_SCHEMA.names, column_types=_SCHEMA, strings_can_be_null=False
                ),
            )
        else:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        names = table.column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or is not a table of captions ({error})") from error
    for field in _SCHEMA:
        if field.name not in names or table.schema.field(field.name).type != field.type:
            raise ValueError(f"{path} has no {field.type} column {field.name!r}; its columns: {names}")
        if table.column(field.name).null_count:
            raise ValueError(f"{path}: the column {field.name!r} has missing values; fill them in, or leave them out")
    if not table.num_rows:
        raise ValueError(f"{path} has no rows: write the store again")
    return table


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
