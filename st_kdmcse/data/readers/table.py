"""Tables of images and captions: TSV, CSV, parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from st_kdmcse.data.images import ImageSource
from st_kdmcse.data.readers.base import CaptionedImage, ImageCaptionReader
from st_kdmcse.data.readers.parsing import existing_file, image_folder, is_image_name, read_csv, read_lines
from st_kdmcse.files import is_parquet

_IMAGE_COLUMNS = (
    *("image", "image_path", "image_file", "image_name", "img", "img_path", "path", "file_path", "filepath"),
    *("file_name", "filename", "file", "image_url", "url"),
)
_CAPTION_COLUMNS = ("caption", "captions", "text", "sentence", "sentences", "comment", "description", "title")

_ROWS_PER_BATCH = 4_096
_IMAGES_PER_BATCH = 64


class CaptionTable(ImageCaptionReader):
    """A table with an image and a caption a row, streamed: CC12M's ``cc12m.tsv``, or any TSV, CSV or parquet file.

    A ``.csv`` has commas, and quotes where they are needed; any other text file has tabs, and quotes are part of its
    captions. Text files may go without a header: then they have two columns, image and caption. The image id is the
    path as it is in the table, and rows of one image that follow one another are one record. In a parquet file the
    caption may be a list of texts, and the image may be encoded bytes or a struct of bytes and path; then each row is
    a separate image, with the id ``FILE#ROW``.

    Args:
        path: the table.
        images: folder that the paths in the table are relative to.
        image_column: name of the column of images; "auto" takes it from common names.
        caption_column: name of the column of captions; "auto" takes it from common names.
        options: those of :class:`~st_kdmcse.data.readers.base.ImageCaptionReader`.

    Raises:
        FileNotFoundError: if the table or the folder is missing.
        ValueError: for an option out of range; when it is read, if there is no such column, or the file is damaged.
    """

    streaming = True

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        image_column: str = "auto",
        caption_column: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._path = existing_file(path)
        self._images = image_folder(images)
        self._wanted = (image_column, caption_column)
        self.name = str(path)

    @cached_property
    def num_images(self) -> int | None:
        """Number of rows of a parquet file that holds the images themselves; else None."""
        if not is_parquet(self._path):
            return None
        with self._open() as file:
            image_column, _ = self._parquet_columns(file.schema_arrow)
            embedded = _is_embedded(file.schema_arrow.field(image_column).type)
            return int(file.metadata.num_rows) if embedded else None

    def _records(self) -> Iterator[CaptionedImage]:
        current: CaptionedImage | None = None
        for record in self._parquet_rows() if is_parquet(self._path) else self._text_rows():
            if current is not None and record.image_id == current.image_id:
                current = replace(current, captions=current.captions + record.captions)
            else:
                if current is not None:
                    yield current
                current = record
        if current is not None:
            yield current

    def _text_rows(self) -> Iterator[CaptionedImage]:
        image_column, caption_column, count = 0, 1, 0
        for line, fields in self._lines():
            where = f"{self._path}, line {line}"
            if not count:
                found = self._header(fields)
                if found is not None:
                    image_column, caption_column, count = *found, len(fields)
                    continue
                count = 2
            if len(fields) != count:
                expected = f"{count} as in the header" if count != 2 else "2, image and caption"
                message = (
                    f"{len(fields)} columns, expected {expected}, separated by {'commas' if self._is_csv else 'tabs'}: "
                    "correct the row, or name the columns if the file has a header"
                )
                self.problems.add("wrong columns", where, message)
            else:
                record = self._record(fields[image_column], [fields[caption_column]], where)
                if record is not None:
                    yield record

    def _lines(self) -> Iterator[tuple[int, Sequence[str]]]:
        if self._is_csv:
            yield from read_csv(self._path, self.problems)
        else:
            for line, text in read_lines(self._path, self.problems):
                yield line, text.split("\t")

    @property
    def _is_csv(self) -> bool:
        return self._path.suffix.lower() == ".csv"

    def _header(self, fields: Sequence[str]) -> tuple[int, int] | None:
        """Positions of the two columns, if the fields are a header."""
        if self._wanted == ("auto", "auto") and any(is_image_name(field) for field in fields):
            return None
        found = _choose(fields, self._wanted)
        if found is None and self._wanted != ("auto", "auto"):
            raise ValueError(_no_columns(self._path, fields, self._wanted))
        return found

    def _parquet_rows(self) -> Iterator[CaptionedImage]:
        with self._open() as file:
            image_column, caption_column = self._parquet_columns(file.schema_arrow)
            embedded = _is_embedded(file.schema_arrow.field(image_column).type)
            row = 0
            try:
                for batch in file.iter_batches(
                    _IMAGES_PER_BATCH if embedded else _ROWS_PER_BATCH, columns=[image_column, caption_column]
                ):
                    for image, captions in zip(batch.column(image_column), batch.column(caption_column), strict=True):
                        row += 1
                        record = self._parquet_record(row, image, captions, embedded)
                        if record is not None:
                            yield record
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{self._path} is damaged after row {row} ({error}): download it again") from error

    def _parquet_record(self, row: int, image: pa.Scalar, captions: pa.Scalar, embedded: bool) -> CaptionedImage | None:
        where = f"{self._path}, row {row}"
        try:
            source, texts = image.as_py(), captions.as_py()
        except UnicodeDecodeError as error:
            message = f"not UTF-8 ({error.reason} at byte {error.start}): write the row again, or leave it out"
            self.problems.add("encoding", where, message)
            return None
        if texts == []:
            self.problems.add("no caption", where, "the list of captions is empty: fill it, or leave the row out")
            return None
        return self._record(source, texts if isinstance(texts, list) else [texts], where, row if embedded else None)

    def _record(self, image: Any, captions: list[Any], where: str, row: int | None = None) -> CaptionedImage | None:
        """The record of a row; None if it is bad. ``row`` is given where the rows hold the images themselves."""
        path = image.get("path") if isinstance(image, dict) else image
        content = image.get("bytes") if isinstance(image, dict) else image if row is not None else None
        source: ImageSource | None = content
        if content is None:
            if not path:
                self.problems.add("no image file", where, "no image is named: fill it in, or leave the row out")
                return None
            if self._images is not None and "://" in path:
                message = f"{path} is no file: download the images, by img2dataset for example, and read what it writes"
                self.problems.add("no image file", where, message)
                return None
            source = Path(path)
            if self._images is not None:
                source = self._images / path
            elif not source.is_absolute():  # without a folder, a relative path says nothing
                source = None
        texts = tuple(caption for caption in captions if self._has_text(caption, where))
        image_id = str(path) if row is None else f"{self._path.name}#{row}"
        return CaptionedImage(image_id, source, texts, where) if texts else None

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self._path} is no whole parquet file ({error}): download it again") from error

    def _parquet_columns(self, schema: pa.Schema) -> tuple[str, str]:
        found = _choose(schema.names, self._wanted)
        if found is None:
            raise ValueError(_no_columns(self._path, schema.names, self._wanted))
        image, caption = (schema.field(position) for position in found)
        if not (_is_text(image.type) or _is_embedded(image.type)):
            raise ValueError(
                f"{self._path}: the image column {image.name!r} is of type {image.type}, expected a path, encoded "
                "bytes or a struct of bytes and path"
            )
        if not (_is_text(caption.type) or (_is_list(caption.type) and _is_text(caption.type.value_type))):
            raise ValueError(
                f"{self._path}: the caption column {caption.name!r} is of type {caption.type}, expected a text or a "
                "list of texts"
            )
        return image.name, caption.name


def _choose(names: Sequence[str], wanted: tuple[str, str]) -> tuple[int, int] | None:
    """Positions of the columns of images and captions; None if they are not among the names."""
    image, caption = _position(names, wanted[0], _IMAGE_COLUMNS), _position(names, wanted[1], _CAPTION_COLUMNS)
    if len(names) == 2 and (image is None) != (caption is None):
        # The other column, unless it was asked for by another name.
        if image is None and wanted[0] == "auto":
            image = 1 - (caption or 0)
        elif caption is None and wanted[1] == "auto":
            caption = 1 - (image or 0)
    return None if image is None or caption is None or image == caption else (image, caption)


def _position(names: Sequence[str], wanted: str, common: Sequence[str]) -> int | None:
    if wanted != "auto":
        return names.index(wanted) if wanted in names else None
    lower = [name.lower() for name in names]
    return next((lower.index(name) for name in common if name in lower), None)


def _no_columns(path: Path, names: Sequence[str], wanted: tuple[str, str]) -> str:
    asked = [
        f"column of {what}" if column == "auto" else f"column {column!r}"
        for what, column in zip(("images", "captions"), wanted, strict=True)
    ]
    return f"{path}: no {asked[0]} or no {asked[1]}; its columns: {', '.join(map(repr, names))}; name two of them"


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_embedded(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(position).name for position in range(kind.num_fields)}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
