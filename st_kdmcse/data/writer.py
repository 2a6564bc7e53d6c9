"""Writing a feature store."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from st_kdmcse.data.characters import control_character
from st_kdmcse.data.layout import (
    ARROW,
    FORMAT,
    IMAGES,
    MANIFEST,
    NOT_FINITE,
    ROWS_PER_BATCH,
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
from st_kdmcse.data.seen import Seen
from st_kdmcse.files import manifest_checksum, sha256_file, sync_path


class FeatureStoreWriter:
    """Writes a :class:`FeatureStore` image by image, in bounded memory.

    A context manager: the store appears at ``path``, whole, when the block ends, and not at all if the block raises or
    the process dies. At most 65,536 captions are kept in memory.

    Args:
        path: folder to make; it must not exist.
        dim: T, the width of the features.
        dtype: how to store the features.
        teacher: the model that the features come from.
        normalized: whether all features have norm 1 (each is checked if so); None reads it off the features.
        shared_space: whether image and text features can be compared with each other.
        source: what the features were made from, for the manifest.

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
        shared_space: bool = True,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim is {dim}, expected the width of the features")
        if dtype not in get_args(FeatureDtype):
            raise ValueError(f"dtype is {dtype!r}, expected 'float16' or 'float32'")
        self._path = Path(path).resolve()
        self._refuse_existing()
        self._dim, self._dtype, self._teacher, self._normalized = dim, np.dtype(dtype), teacher, normalized
        self._shared_space, self._source = shared_space, source
        self._temporary = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}.tmp")
        self._all_unit = True
        self._ids = Seen()
        self._rows_written = 0
        self._pending: list[tuple[str, str, int, int]] = []
        self._images: _GrowingArray
        self._texts: _GrowingArray

    def __enter__(self) -> FeatureStoreWriter:
        self._temporary.mkdir(parents=True)
        self._images = _GrowingArray(self._temporary / IMAGES, self._dim, self._dtype)
        self._texts = _GrowingArray(self._temporary / TEXTS, self._dim, self._dtype)
        self._table_file = (self._temporary / ARROW).open("wb")
        self._table = pa.ipc.new_stream(self._table_file, SCHEMA)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._ids.close()
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
        _check_captions(image_id, captions)
        name = f"image {image_id!r}"
        image = _as_array(image_feature, f"{name}: image_feature")[np.newaxis]
        texts = _as_array(text_features, f"{name}: text_features")
        image = self._checked(image, f"{name}: image_feature")
        self._extend([image_id], image, [captions], self._checked(texts, f"{name}: text_features"), name)

    def extend(
        self, image_ids: Sequence[str], image_features: Any, captions: Sequence[Sequence[str]], text_features: Any
    ) -> None:
        """Append many images and their captions at once.

        Args:
            image_ids: M ids, each new.
            image_features: (M, T) numbers.
            captions: for each image its captions, at least one.
            text_features: (K, T) numbers, K captions in all, in the order of ``captions``.

        Raises:
            ValueError: as :meth:`add`. The store is then incomplete: let the error end the block.
        """
        if len(image_ids) != len(image_features) or len(image_ids) != len(captions):
            raise ValueError(f"{len(image_ids)} ids, {len(image_features)} images, {len(captions)} lists of captions")
        for image_id, of_image in zip(image_ids, captions, strict=True):
            _check_captions(image_id, of_image)
        if image_ids:
            images = self._checked(np.asarray(image_features), "image_features", self._images.rows)
            texts = self._checked(np.asarray(text_features), "text_features", self._texts.rows)
            self._extend(image_ids, images, captions, texts, f"images {image_ids[0]!r} to {image_ids[-1]!r}")

    def _extend(
        self, image_ids: Sequence[str], images: Array, captions: Sequence[Sequence[str]], texts: Array, name: str
    ) -> None:
        count = sum(len(of_image) for of_image in captions)
        if len(texts) != count:
            raise ValueError(f"{name}: {count} captions and {len(texts)} rows of text_features")
        text_row = self._texts.rows
        for image_row, (image_id, of_image) in enumerate(zip(image_ids, captions, strict=True), self._images.rows):
            self._add_id(image_id, image_row)
            for caption in of_image:
                self._add_row(image_id, caption, image_row, text_row)
                text_row += 1
        self._images.append(images)
        self._texts.append(texts)

    def _refuse_existing(self) -> None:
        if self._path.exists():
            raise FileExistsError(f"{self._path} exists already: remove it, or write the store somewhere else")

    def _add_id(self, image_id: str, image_row: int) -> None:
        _check_text(image_id, f"image row {image_row}: image id")
        if found := control_character(image_id):
            raise ValueError(
                f"image row {image_row}: the image id {image_id!r} holds the control character {found}: leave it out"
            )
        if not self._ids.add(image_id):
            raise ValueError(f"image {image_id!r} came before: give each image once, with all its captions")

    def _add_row(self, image_id: str, caption: str, image_row: int, text_row: int) -> None:
        _check_text(caption, f"row {text_row} (image {image_id!r}): caption")
        self._pending.append((image_id, caption, image_row, text_row))
        if len(self._pending) == ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        columns = list(zip(*self._pending, strict=True))
        self._table.write_batch(pa.record_batch(columns, schema=SCHEMA))
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
                raise ValueError(f"{where}: {NOT_FINITE}")
            raise ValueError(
                f"{where}: {np.abs(given[row]).max():.3g} does not fit {self._dtype}; normalise the features"
                + (", or write the store with dtype='float32'" if self._dtype == np.float16 else "")
            )
        off = np.flatnonzero(off_norm(stored))
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
            "format": FORMAT,
            "version": VERSION,
            "teacher": self._teacher,
            "dim": self._dim,
            "dtype": str(self._dtype),
            "normalized": self._all_unit if self._normalized is None else self._normalized,
            "shared_space": self._shared_space,
            **({} if self._source is None else {"source": dict(self._source)}),
            "images": self._images.rows,
            "rows": self._rows_written,
            "files": {
                name: {"bytes": (self._temporary / name).stat().st_size, "sha256": sha256_file(self._temporary / name)}
                for name in (IMAGES, TEXTS, ARROW)
            },
        }
        manifest["checksum"] = manifest_checksum(manifest)
        with (self._temporary / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2, ensure_ascii=False)
            _sync(file)
        self._refuse_existing()
        sync_path(self._temporary)
        self._temporary.replace(self._path)
        sync_path(self._path.parent)


def write_arrays(
    path: str | Path,
    image_features: Array,
    text_features: Array,
    captions: Sequence[str],
    image_rows: Sequence[int] | RowNumbers,
    image_ids: Sequence[str],
    teacher: str,
    normalized: bool | None = None,
    dtype: FeatureDtype | None = None,
) -> None:
    """Write a store from arrays; arguments and errors are those of :meth:`FeatureStore.from_arrays`."""
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
    rows = as_rows(image_rows, len(image_features), "image_features")
    if dtype is None:
        dtype = "float16" if image_features.dtype == np.float16 else "float32"
    with FeatureStoreWriter(path, image_features.shape[1], dtype, teacher, normalized) as writer:
        for image_row, image_id in enumerate(image_ids):
            writer._add_id(image_id, image_row)
        for file, name, features in (
            (writer._images, "image_features", image_features),
            (writer._texts, "text_features", text_features),
        ):
            for start in range(0, len(features), ROWS_PER_CHUNK):
                file.append(writer._checked(features[start : start + ROWS_PER_CHUNK], name, start))
        for text_row, (image_row, caption) in enumerate(zip(rows.tolist(), captions, strict=True)):
            writer._add_row(image_ids[image_row], caption, image_row, text_row)


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


def _as_array(values: Any, name: str) -> Array:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name}: the rows have different lengths ({error})") from error


def _check_captions(image_id: str, captions: Sequence[str]) -> None:
    if isinstance(captions, str) or not captions:
        raise ValueError(
            f"image {image_id!r}: no list of captions; give each image at least one caption, or leave it out"
        )
    for caption in captions:
        _check_text(caption, f"image {image_id!r}: caption")


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {value!r}, expected a string that is not empty")


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
