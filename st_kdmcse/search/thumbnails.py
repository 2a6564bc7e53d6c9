"""Thumbnails of the images that the rows of an index name, from one folder and no other."""

from __future__ import annotations

import io
import logging
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

from st_kdmcse.data.images import ImageError, load_image
from st_kdmcse.search.base import Hit
from st_kdmcse.search.semantic_index import SemanticIndex, UnknownIdError

logger = logging.getLogger(__name__)

THUMBNAIL_SIZE = 320
"""Pixels of the longer side of a thumbnail, at most."""

_THUMBNAILS_KEPT = 512
_IMAGE_BYTES = 64 << 20


class Gallery:
    """Image files of rows, in a folder and nowhere else."""

    def __init__(self, folder: Path, column: str) -> None:
        self._folder = folder.resolve()
        self._column = column
        self.jpeg = lru_cache(maxsize=_THUMBNAILS_KEPT)(_jpeg)

    def url(self, hit: Hit) -> str | None:
        """Where the page finds the thumbnail of a row; None for a row that names no image."""
        return f"/thumbnail?id={quote(hit.id, safe='')}" if isinstance(hit.metadata.get(self._column), str) else None

    def path(self, hit: Hit) -> Path:
        """The image file of a row.

        Raises:
            FileNotFoundError: if the folder holds no such file.
        """
        name = hit.metadata.get(self._column)
        try:
            path = (self._folder / name).resolve() if isinstance(name, str) else None
            if path is not None and path.is_relative_to(self._folder) and path.is_file():
                return path
        except (ValueError, OSError, RuntimeError):  # a NUL in the name, too long a name, a loop of links
            pass
        raise FileNotFoundError("there is no such image")


def find_gallery(index: SemanticIndex, images: Path | None, column: str) -> Gallery | None:
    """The images of an index; None if it has no folder of images, or that folder has gone.

    Args:
        index: the index.
        images: folder of the images; None is that of the index.
        column: metadata with the path of a row's image in the folder.

    Raises:
        FileNotFoundError: if there is no folder ``images``.
    """
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f"there is no folder of images {images}: give the one that has them")
    if images is None and index.images is not None and not index.images.is_dir():
        logger.warning("the images of the index are not at %s any more, and are not shown", index.images)
        return None
    folder = images or index.images
    return None if folder is None else Gallery(folder, column)


def thumbnail_of(index: SemanticIndex, gallery: Gallery | None, row: str) -> bytes:
    """The JPEG of a row's image.

    Raises:
        FileNotFoundError: if there is no such row or image.
        ImageError: if the image is damaged or too large.
    """
    if gallery is None:
        raise FileNotFoundError("there are no images")
    try:
        path = gallery.path(index.get([row])[0])
    except UnknownIdError:
        raise FileNotFoundError("there is no such row") from None
    status = path.stat()
    if status.st_size > _IMAGE_BYTES:
        raise ImageError("large file", f"{path} has more than {_IMAGE_BYTES:,} bytes")
    return gallery.jpeg(path, status.st_mtime_ns)


def _jpeg(path: Path, changed: int) -> bytes:
    """The thumbnail of a file in the state of a time: upright, on white where it is transparent."""
    from PIL import Image, ImageOps

    image = load_image(path)
    try:
        upright = ImageOps.exif_transpose(image)
        transparent = upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info
        colours = upright.convert("RGBA" if transparent else "RGB")
        colours.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
        if colours.mode == "RGBA":
            colours = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
        encoded = io.BytesIO()
        colours.save(encoded, "JPEG", quality=85)
    except MemoryError:
        raise
    except Exception as error:  # as with decoders, it may be almost anything
        raise ImageError("undecodable image", f"{path} cannot be made small ({error})") from error
    return encoded.getvalue()
