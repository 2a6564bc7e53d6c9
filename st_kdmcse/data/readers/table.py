"""Tables of images and captions: TSV, CSV, JSON, parquet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from st_kdmcse.data.images import ImageSource
from st_kdmcse.data.json_files import json_items
from st_kdmcse.data.readers.base import CaptionedImage, ImageCaptionReader, Problems
from st_kdmcse.data.readers.columns import SPLIT_COLUMN, captions_in, choose_columns, no_columns, wanted_splits
from st_kdmcse.data.readers.parsing import existing_file, image_folder, is_image_name, read_csv, read_lines
from st_kdmcse.data.tables import check_separator, file_format, holds_texts, json_object, shown
from st_kdmcse.files import is_parquet

_ROWS_PER_BATCH = 4_096
_ROWS_FOR_COLUMNS = 100
_IMAGES_PER_BATCH = 64


class CaptionTable(ImageCaptionReader):
    """A table with an image and its captions a row, streamed: CC12M's ``cc12m.tsv``, or any TSV, CSV, JSON or parquet.

    A ``.csv`` has commas, and quotes where they are needed; a ``.jsonl`` has an object a line and a ``.json`` is a list
    of objects, as BLIP's are; any other text file has tabs, and quotes are part of its captions, unless its header has
    commas. CSV and TSV may go without a header: then they have two columns, image and caption. The image id is the path
    as it is in the table, and rows of one image that follow one another are one record. A cell may hold a list of
    captions, in CSV and TSV written as in JSON, and there may be several columns of captions. In a parquet file the
    image may be encoded bytes or a struct of bytes and path; then each row is a separate image, with the id
    ``FILE#ROW``.

    Args:
        path: the table.
        images: folder that the paths in the table are relative to.
        image_column: name of the column of images; "auto" takes it from common names.
        caption_column: name of the column of captions, or several with commas between them; "auto" takes them from
            common names, such as ``caption``, or ``caption_0``, ``caption_1``, ...
        split: take the rows with this value in the column ``split``; "train+val" is two values. None takes all.
        options: those of :class:`~st_kdmcse.data.readers.base.ImageCaptionReader`.

    Raises:
        FileNotFoundError: if the table or the folder is missing.
        ValueError: for an option out of range; when it is read, if there is no such column or split, or the file is
            damaged.
    """

    streaming = True

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        image_column: str = "auto",
        caption_column: str = "auto",
        split: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._path = existing_file(path)
        self._images = image_folder(images)
        self._wanted = (image_column, caption_column)
        self._splits = wanted_splits(split)
        self._found_splits: set[str] = set()
        self.name = str(path)

    @cached_property
    def num_images(self) -> int | None:
        """Number of rows of a parquet file that holds the images themselves; else None."""
        if not is_parquet(self._path) or self._splits is not None:
            return None
        with self._open() as file:
            image, *_ = self._parquet_columns(file.schema_arrow)
            return int(file.metadata.num_rows) if _is_embedded(file.schema_arrow.field(image).type) else None

    def _records(self) -> Iterator[CaptionedImage]:
        self._found_splits = set()
        current: CaptionedImage | None = None
        for record in self._rows():
            if current is not None and record.image_id == current.image_id:
                current = replace(current, captions=current.captions + record.captions)
            else:
                if current is not None:
                    yield current
                current = record
        if current is not None:
            yield current
        if self._splits is not None and not self._splits <= self._found_splits:
            raise ValueError(
                f"{self._path} has no split {'+'.join(sorted(self._splits - self._found_splits))!r} in its column "
                f"{SPLIT_COLUMN!r}; its splits: {', '.join(sorted(self._found_splits)) or 'none'}"
            )

    def _rows(self) -> Iterator[CaptionedImage]:
        if is_parquet(self._path):
            return self._parquet_rows()
        kind = file_format(self._path, of_others="csv" if self._has_commas() else "tsv")
        return self._json_rows(kind == "json list") if kind.startswith("json") else self._text_rows(kind == "csv")

    def _has_commas(self) -> bool:
        """Whether the first line is a header with commas."""
        _, line = next(read_lines(self._path, Problems("skip")), (0, ""))
        return "\t" not in line and choose_columns(line.split(",")) is not None

    def _text_rows(self, is_csv: bool) -> Iterator[CaptionedImage]:
        header: Sequence[str] = ()
        for line, fields in self._lines(is_csv):
            where = f"{self._path}, line {line}"
            if not header:
                check_separator(fields, "csv" if is_csv else "tsv", where, _is_row)
                header = self._header(fields)
                columns = self._columns(header)
                if header == fields:
                    continue
            if len(fields) != len(header):
                expected = f"{len(header)} as in the header" if len(header) != 2 else "2, image and caption"
                message = (
                    f"{len(fields)} columns, expected {expected}, separated by {'commas' if is_csv else 'tabs'}: "
                    "correct the row, or name the columns if the file has a header"
                )
                self.problems.add("wrong columns", where, message)
            else:
                record = self._record(dict(zip(header, fields, strict=True)), *columns, where)
                if record is not None:
                    yield record

    def _lines(self, is_csv: bool) -> Iterator[tuple[int, Sequence[str]]]:
        if is_csv:
            yield from read_csv(self._path, self.problems)
        else:
            for line, text in read_lines(self._path, self.problems):
                yield line, text.split("\t")

    def _header(self, fields: Sequence[str]) -> Sequence[str]:
        """The names of the columns: the fields, if they are a header."""
        if self._wanted != ("auto", "auto") or self._splits is not None:
            return fields
        if any(is_image_name(field) for field in fields) or choose_columns(fields) is None:
            return ("image", "caption")
        return fields

    def _json_rows(self, is_list: bool) -> Iterator[CaptionedImage]:
        objects = self._json_objects(is_list)
        first = list(islice(objects, _ROWS_FOR_COLUMNS))
        columns = self._columns(list(dict.fromkeys(name for _, values in first for name in values)))
        for where, values in chain(first, objects):
            record = self._record(values, *columns, where)
            if record is not None:
                yield record

    def _json_objects(self, is_list: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        if is_list:
            for number, values in enumerate(json_items(self._path, "item"), start=1):
                where = f"{self._path}, item {number}"
                if isinstance(values, dict):
                    yield where, values
                else:
                    message = f"{shown(values)} is no JSON object: correct it, or leave it out"
                    self.problems.add("wrong columns", where, message)
            return
        for line, text in read_lines(self._path, self.problems):
            where = f"{self._path}, line {line}"
            try:
                values = json_object(text, where) if text.strip() else None
            except ValueError as error:
                self.problems.add("wrong columns", where, str(error).removeprefix(f"{where}: "))
                continue
            if values is not None:
                yield where, values

    def _parquet_rows(self) -> Iterator[CaptionedImage]:
        with self._open() as file:
            image, captions, split = self._parquet_columns(file.schema_arrow)
            embedded = _is_embedded(file.schema_arrow.field(image).type)
            names = [image, *captions, *([] if split is None else [split])]
            row = 0
            try:
                for batch in file.iter_batches(_IMAGES_PER_BATCH if embedded else _ROWS_PER_BATCH, columns=names):
                    for cells in zip(*(batch.column(name) for name in names), strict=True):
                        row += 1
                        where = f"{self._path}, row {row}"
                        values = self._parquet_values(names, cells, where)
                        if values is None:
                            continue
                        record = self._record(values, image, captions, split, where, row if embedded else None)
                        if record is not None:
                            yield record
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{self._path} is damaged after row {row} ({error}): download it again") from error

    def _parquet_values(self, names: Sequence[str], cells: Sequence[pa.Scalar], where: str) -> dict[str, Any] | None:
        try:
            return {name: cell.as_py() for name, cell in zip(names, cells, strict=True)}
        except UnicodeDecodeError as error:
            message = f"not UTF-8 ({error.reason} at byte {error.start}): write the row again, or leave it out"
            self.problems.add("encoding", where, message)
            return None

    def _record(
        self,
        values: Mapping[str, Any],
        image_column: str,
        caption_columns: Sequence[str],
        split_column: str | None,
        where: str,
        row: int | None = None,
    ) -> CaptionedImage | None:
        """The record of a row; None if it is bad or in another split.

        ``row`` is given where the rows hold the images themselves.
        """
        if self._splits is not None and split_column is not None:
            split = str(values.get(split_column))
            self._found_splits.add(split)
            if split not in self._splits:
                return None
        image = values.get(image_column)
        path = image.get("path") if isinstance(image, dict) else image
        source: ImageSource | None = (
            image.get("bytes") if isinstance(image, dict) else image if row is not None else None
        )
        if source is None:
            if not path or not isinstance(path, str):
                what = f"{shown(path)} is no path of an image" if path else "no image is named"
                self.problems.add("no image file", where, f"{what}: fill it in, or leave the row out")
                return None
            if self._images is not None and "://" in path:
                message = f"{path} is no file: download the images, by img2dataset for example, and read what it writes"
                self.problems.add("no image file", where, message)
                return None
            # Without a folder, a relative path says nothing.
            source = self._image_file(path) or (Path(path) if Path(path).is_absolute() else None)
        captions = captions_in(*(values.get(name) for name in caption_columns))
        if not captions:
            self.problems.add("no caption", where, "the list of captions is empty: fill it, or leave the row out")
        texts = tuple(caption for caption in captions if self._has_text(caption, where))
        image_id = str(path) if row is None else f"{self._path.name}#{row}"
        return CaptionedImage(image_id, source, texts, where) if texts else None

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self._path} is no whole parquet file ({error}): download it again") from error

    def _columns(self, names: Sequence[str]) -> tuple[str, list[str], str | None]:
        """The columns of images, captions and splits."""
        found = choose_columns(names, *self._wanted)
        if found is None:
            raise no_columns(self._path, names, *self._wanted)
        if self._splits is not None and SPLIT_COLUMN not in names:
            raise ValueError(
                f"{self._path} has no column {SPLIT_COLUMN!r}; its columns: {', '.join(map(repr, names))}; leave the "
                "split out, or add the column"
            )
        return found.image, found.captions, SPLIT_COLUMN if self._splits is not None else None

    def _parquet_columns(self, schema: pa.Schema) -> tuple[str, list[str], str | None]:
        image, captions, split = self._columns(schema.names)
        kind = schema.field(image).type
        if not (holds_texts(kind) or _is_embedded(kind)):
            raise ValueError(
                f"{self._path}: the image column {image!r} is of type {kind}, expected a path, encoded bytes or a "
                "struct of bytes and path"
            )
        for name in captions:
            kind = schema.field(name).type
            if not (holds_texts(kind) or (_is_list(kind) and holds_texts(kind.value_type))):
                raise ValueError(
                    f"{self._path}: the caption column {name!r} is of type {kind}, expected a text or a list of texts"
                )
        return image, captions, split


def _is_row(fields: Sequence[str]) -> bool:
    """Whether fields look like a header, or like a row of image and caption."""
    return choose_columns(fields) is not None or (len(fields) > 1 and is_image_name(fields[0]))


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    views = (getattr(types, name, None) for name in ("is_list_view", "is_large_list_view"))
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, *views)
    return any(test is not None and test(kind) for test in tests)


def _is_embedded(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(position).name for position in range(kind.num_fields)}
    view = getattr(pa.types, "is_binary_view", None)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or (view is not None and view(kind)))
