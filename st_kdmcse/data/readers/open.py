"""Opening image-caption data by its name and content."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import ijson

from st_kdmcse.data.json_files import json_errors, open_json
from st_kdmcse.data.lines import read_lines
from st_kdmcse.data.readers.base import ImageCaptionReader
from st_kdmcse.data.readers.coco import Coco, coco_splits
from st_kdmcse.data.readers.flickr import (
    CaptionsCSV,
    FlickrCSV,
    FlickrEntities,
    FlickrTokens,
    entities_folder,
    is_pipe_header,
    is_token_row,
)
from st_kdmcse.data.readers.hub import HubDataset, is_hub_folder
from st_kdmcse.data.readers.karpathy import Karpathy
from st_kdmcse.data.readers.parsing import existing_file, image_folder
from st_kdmcse.data.readers.table import CaptionTable
from st_kdmcse.data.readers.web import WebDataset, folder_shards, is_shard_pattern
from st_kdmcse.files import is_parquet

_READERS: dict[str, type[ImageCaptionReader]] = {
    "flickr-tokens": FlickrTokens,
    "flickr-csv": FlickrCSV,
    "captions-csv": CaptionsCSV,
    "flickr-entities": FlickrEntities,
    "karpathy": Karpathy,
    "coco": Coco,
    "webdataset": WebDataset,
    "table": CaptionTable,
    "hub": HubDataset,
}

_IMAGES_AND_SPLIT = {"images": "images", "split": "split"}
_COLUMNS = {"image_column": "image_column", "caption_column": "caption_column"}
_OPTIONS: dict[str, dict[str, str]] = {
    "flickr-tokens": _IMAGES_AND_SPLIT,
    "flickr-csv": _IMAGES_AND_SPLIT,
    "captions-csv": _IMAGES_AND_SPLIT,
    "flickr-entities": _IMAGES_AND_SPLIT,
    "karpathy": _IMAGES_AND_SPLIT,
    "coco": _IMAGES_AND_SPLIT,
    "webdataset": {"caption_column": "caption_key"},
    "table": _IMAGES_AND_SPLIT | _COLUMNS,
    "hub": _IMAGES_AND_SPLIT | _COLUMNS,
}
"""Which options of :func:`open_captions` each format has, and what its reader calls them."""

FORMATS = tuple(_READERS)
"""What ``format`` may be, besides "auto"."""

_EXPECTED = f"a file in one of the formats {', '.join(FORMATS)}, or the format itself"
_READ_BYTES = 65_536


def open_captions(
    captions: str | Path | Sequence[str | Path],
    images: str | Path | None = None,
    format: str = "auto",  # noqa: A002
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    **options: Any,
) -> ImageCaptionReader:
    """The reader of image-caption data in any of the formats.

    Args:
        captions: the file with the captions; for webdataset a shard, several, a folder of them or a pattern; for COCO
            also its folder; for "flickr-entities" a folder; for "hub" a name or a folder.
        images: folder of the image files, outside of which none is read; not for webdataset, which brings them.
        format: "auto" or one of :data:`FORMATS`; "auto" looks at the name and the content.
        split: such as "train"; of a table, a value in its column ``split``; not for webdataset.
        image_column: column of images; only for tables and "hub".
        caption_column: column of captions; only for tables, "hub", and webdataset, where it is a key of the ``.json``.
        options: those of :class:`~st_kdmcse.data.readers.base.ImageCaptionReader`.

    Raises:
        FileNotFoundError: if the captions, the images or the split are missing.
        ValueError: if the format is unknown or cannot be told, has no such option, or an option is out of range.

    Example:
        ::

            reader = open_captions("results_20130124.token", images="flickr30k-images", split="train")
            print(reader.summary())
    """
    if format not in ("auto", *FORMATS):
        raise ValueError(f"format is {format!r}, expected one of: auto, {', '.join(FORMATS)}")
    given = {"images": images, "split": split, "image_column": image_column, "caption_column": caption_column}
    given = {name: value for name, value in given.items() if value is not None}
    image_folder(images)
    if format == "auto":
        format = _recognise(captions)  # noqa: A001
        if format == "captions-csv" and not set(given) <= set(_OPTIONS[format]):
            format = "table"  # noqa: A001
    for name in given:
        if name not in _OPTIONS[format]:
            has = ", ".join(_OPTIONS[format])
            raise ValueError(f"{captions} is read as {format!r}, which has no option {name!r}; it has: {has}")
    if format != "webdataset" and not isinstance(captions, (str, Path)):
        raise ValueError(f"the format {format!r} is read from one file or folder, got {len(captions)}")
    make: Any = _READERS[format]
    reader: ImageCaptionReader = make(
        captions, **{_OPTIONS[format][name]: value for name, value in given.items()}, **options
    )
    return reader


def _recognise(captions: str | Path | Sequence[str | Path]) -> str:
    if not isinstance(captions, (str, Path)):
        return "webdataset"
    path = Path(captions)
    if path.is_dir():
        return _recognise_folder(path)
    if not path.exists():
        if is_shard_pattern(captions):
            return "webdataset"
        raise FileNotFoundError(
            f"{captions} does not exist; for a data set of the Hugging Face hub give its format, 'hub'"
        )
    return _recognise_file(existing_file(path))


def _recognise_folder(folder: Path) -> str:
    if any(folder.glob("*.tar")):
        return "webdataset"
    if coco_splits(folder):
        return "coco"
    if entities_folder(folder) is not None:
        return "flickr-entities"
    if folder_shards(folder):
        return "webdataset"
    if is_hub_folder(folder):
        return "hub"
    raise ValueError(
        f"{folder} has no .tar, no annotations/captions_*.json, no Sentences/*.txt, no images with a .txt or .json "
        f"each and no parquet files: give {_EXPECTED}"
    )


def _recognise_file(path: Path) -> str:
    if path.suffix.lower() == ".tar":
        return "webdataset"
    if is_parquet(path):
        return "table"
    if path.suffix.lower() == ".json":
        return _recognise_json(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return "table"
    line = _first_line(path)
    if is_token_row(line):
        return "flickr-tokens"
    if is_pipe_header(line):
        return "flickr-csv"
    if line == "image,caption":
        return "captions-csv"
    if path.suffix.lower() == ".token":
        return "flickr-tokens"
    if path.suffix.lower() in (".csv", ".tsv", ".tab") or "\t" in line:
        return "table"
    raise ValueError(f"{path}: cannot tell its format from its name or its first line {line[:100]!r}; give {_EXPECTED}")


def _recognise_json(path: Path) -> str:
    with json_errors(path), open_json(path) as file:
        for prefix, event, _ in ijson.parse(file):
            if prefix == "images.item.sentences":
                return "karpathy"
            if prefix in ("images.item.file_name", "annotations"):
                return "coco"
            if prefix == "item" and event == "start_map":
                return "table"
            if prefix == "" and event == "end_map":
                break
    lines = [line.strip() for line in islice(read_lines(path, lambda _: None), 2)]
    if len(lines) == 2 and all(line.startswith("{") and line.endswith("}") for line in lines):  # an object a line
        return "table"
    raise ValueError(
        f"{path} has neither COCO's annotations nor Karpathy's sentences, and is no list of objects; give {_EXPECTED}"
    )


def _first_line(path: Path) -> str:
    """The first line that is not empty, or its beginning."""
    with path.open("rb") as file:
        content = file.read(_READ_BYTES).removeprefix(b"\xef\xbb\xbf")
    if not content:
        raise ValueError(f"{path} is empty: give the file with the captions")
    return content.decode("utf-8", "replace").lstrip("\r\n").split("\n", 1)[0].removesuffix("\r")
