"""Images on disk, in the slices of tar files or in memory, and what can be wrong with them."""

from __future__ import annotations

import io
import stat
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class FileSlice:
    """An image inside of a larger file, such as an uncompressed tar.

    Attributes:
        path: the larger file.
        offset: first byte of the image.
        size: bytes of the image.
        name: the image's name, for messages.
    """

    path: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}, {self.name}"

    def read(self, file: BinaryIO | None = None) -> bytes:
        """The bytes.

        Args:
            file: the larger file, if it is open.
        """
        with nullcontext(file) if file is not None else self.path.open("rb") as source:
            source.seek(self.offset)
            return source.read(self.size)


MAX_BYTES = 1 << 29
"""Bytes of an encoded image; more than the pixels that Pillow allows take without compression."""

ImageSource: TypeAlias = "Path | FileSlice | bytes"
"""Where an image is; small enough to be handed to a worker process, except for ``bytes``."""


class ImageError(ValueError):
    """An image that cannot be read.

    Attributes:
        kind: "no image file", "empty image file", "decompression bomb" or "undecodable image".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


def load_image(
    source: ImageSource | str, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Decode an image completely.

    Args:
        source: a file, a slice of one, or the encoded bytes.
        formats: of Pillow, the only ones that are read, such as "JPEG"; None reads all.
        max_pixels: most pixels; None is ``PIL.Image.MAX_IMAGE_PIXELS``.

    Returns:
        The image in its own mode (RGB, L, P, CMYK, ...), every pixel of it read; as :func:`in_eight_bits` has it.

    Raises:
        ImageError: if there is no file, it is empty, cut off or no image, its values have no known range, or it has
            more pixels than allowed (a decompression bomb); names the file.
    """
    from PIL import Image, UnidentifiedImageError

    name = "the image" if isinstance(source, bytes) else str(source)
    encoded = _read(source, name)
    if not encoded:
        raise ImageError("empty image file", f"{name} is empty (0 bytes): copy it again, or leave it out")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
            image: Image.Image = Image.open(io.BytesIO(encoded), formats=formats)
        most = max_pixels or Image.MAX_IMAGE_PIXELS
        if most is not None and image.width * image.height > most:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, more than {most:,}")
        return in_eight_bits(image)
    except Image.DecompressionBombError as error:
        raise ImageError("decompression bomb", f"{name} is too large an image ({error}): scale it down") from error
    except MemoryError:
        raise
    except Exception as error:  # what decoders raise for broken files is not documented, and is almost anything
        # The text of this one shows an address in memory, another one at each call.
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError("undecodable image", f"{name} cannot be decoded ({reason}): replace it") from error


def in_eight_bits(image: Image.Image) -> Image.Image:
    """The image with at most 8 bits a channel: conversion to RGB cuts the values of others off at 255.

    Args:
        image: in any mode. Those with 16 bits, from 0 to 65,535, are scaled; others are returned as they are.

    Returns:
        The image, every pixel of it read.

    Raises:
        ValueError: for a mode with 32 bits, whose values may be of any range.
    """
    from PIL import Image

    image.load()
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has 32 bits a channel, of unknown range: save it with 8 or 16")
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))


def _read(source: ImageSource | str, name: str) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        if isinstance(source, FileSlice):
            if source.size > MAX_BYTES:
                raise ValueError(_too_large(source.size, MAX_BYTES))
            return source.read()
        return regular_bytes(Path(source), MAX_BYTES)
    except FileNotFoundError as error:
        raise ImageError("no image file", f"{name} does not exist: add it, or leave it out") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError("undecodable image", f"{name} cannot be read ({reason}): replace it") from error


def regular_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file: a pipe would wait for a writer for ever, and a device may have no end.

    Args:
        path: the file, or a link to it.
        limit: most bytes.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is no regular file, or too large.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is a folder" if stat.S_ISDIR(status.st_mode) else "is no regular file")
    if status.st_size > limit:
        raise ValueError(_too_large(status.st_size, limit))
    return path.read_bytes()


def _too_large(size: int, limit: int) -> str:
    return f"has {size:,} bytes, more than {limit:,}"
