"""Image search: images and queries, which are sentences or images, in the space of one model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from sentence_transformers import SentenceTransformer

from st_kdmcse.data.images import ImageError
from st_kdmcse.data.store import FeatureStore
from st_kdmcse.search.base import Metadata, NewRows
from st_kdmcse.search.factory import is_exact
from st_kdmcse.search.faiss_backend import FaissBackend, chosen_factory
from st_kdmcse.search.model_check import load_named
from st_kdmcse.search.semantic_index import SemanticIndex, check_tune_queries, encoded_queries
from st_kdmcse.search.storage import check_free
from st_kdmcse.search.tuning import MOST_QUERIES, check_recall_target
from st_kdmcse.teachers import SentenceTransformerTeacher

logger = logging.getLogger(__name__)

IMAGE = "image"
"""Name of the metadata that has the file of an image."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""Ends of the names of image files."""


def index_images(
    folder: str | Path,
    model: SentenceTransformer | str,
    path: str | Path,
    *,
    captions: Mapping[str, Sequence[str]] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    factory: str | None = None,
    recall_target: float = 0.95,
    memory_limit: int | None = None,
    show_progress_bar: bool | None = None,
    tune_queries: Sequence[str] | None = None,
) -> SemanticIndex:
    """Index the images of a folder, to be found by sentences and by images.

    A row is an image: the name of its file, from the folder on, as its id; its captions as the text, one a line, or the
    name where it has none; the name again as metadata.

    Args:
        folder: of the images.
        model: that encodes texts and images, such as what ``st-kdmcse export`` makes, or its hub name or folder.
        path: folder for the index; there must be none.
        captions: by name, which images to index; None takes all files below the folder whose name ends as those of
            images do (:data:`SUFFIXES`), hidden ones aside.
        on_error: "raise" refuses an image that cannot be decoded, "skip" leaves it out and logs which.
        factory: FAISS's name of an index type; None chooses one.
        recall_target: recall@10 that an approximate index is tuned to reach, in (0, 1].
        memory_limit: bytes for the vectors.
        show_progress_bar: None shows one in a terminal, after two seconds.
        tune_queries: sentences such as users search by, which an approximate index is tuned on. None takes some of the
            captions; without any it takes images, and what is said of its recall holds for those alone.

    Raises:
        FileNotFoundError: if there is no such folder, or files are missing; says how many.
        ValueError: if the model encodes no images, an image cannot be decoded (names it), there is none, or there is an
            index at ``path`` already; nothing is written then.
        ImportError: without FAISS; names the extra.
    """
    path, folder = Path(path), Path(folder).resolve()
    check_free(path)
    check_recall_target(recall_target)
    check_tune_queries(tune_queries)
    names = _image_files(folder) if captions is None else list(captions)
    if captions is not None:
        _check_files(folder, names)
    texts = [name if captions is None else "\n".join(captions[name]) or name for name in names]
    metadata: list[Metadata] = [{IMAGE: name} for name in names]
    NewRows.checked(
        names, texts, np.ones((len(names), 1)), metadata
    )  # what is wrong with names, before they are encoded
    encoder, model_name = load_named(model)
    if not encoder.supports("image"):
        raise ValueError(
            f"the model {model_name} encodes no images: make one of sentences and images of its run with st-kdmcse "
            "export, and give that"
        )
    embeddings = np.empty((len(names), encoder.get_embedding_dimension() or 0), dtype=np.float32)
    kept = np.ones(len(names), dtype=bool)
    teacher = SentenceTransformerTeacher(encoder, encoder.device, precision="float32")
    for rows, found, errors in teacher.encode_readable([folder / name for name in names], show_progress_bar):
        if errors and on_error == "raise":
            error = next(iter(errors.values()))
            raise ImageError(error.kind, f"{error}; skip leaves it out (`on_error`)")
        embeddings[rows] = found
        kept[list(errors)] = False
        for each in errors.values():
            logger.warning("left out: %s", each)
    if not kept.any():
        raise ValueError(f"none of the {len(names):,} images in {folder} can be decoded")
    chosen = np.flatnonzero(kept).tolist()
    new = NewRows.checked(
        [names[row] for row in chosen],
        [texts[row] for row in chosen],
        embeddings[chosen],
        [metadata[row] for row in chosen],
    )
    if tune_queries is None and captions is not None:
        tune_queries = _some_captions([caption for row in chosen for caption in captions[names[row]]])
    factory = chosen_factory(len(new), embeddings.shape[1], factory, memory_limit)
    queries = None if is_exact(factory) else encoded_queries(encoder, tune_queries or None)
    backend = FaissBackend.build(new, factory, recall_target, memory_limit, show_progress_bar, queries)
    index = SemanticIndex(backend, encoder, model_name, {"folder": str(folder)})
    index.save(path)
    return index


def _some_captions(captions: Sequence[str]) -> list[str]:
    drawn = np.random.default_rng(0).permutation(len(captions))[:MOST_QUERIES]
    return [captions[number] for number in drawn.tolist()]


def captions_by_image(store: FeatureStore) -> dict[str, list[str]]:
    """The captions of each image of a feature store, by its id.

    Args:
        store: the store.
    """
    captions: dict[str, list[str]] = {}
    for image, caption in store.captions():
        captions.setdefault(image, []).append(caption)
    return captions


def _image_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of images")
    below = (each.relative_to(folder) for each in folder.rglob("*") if each.suffix.lower() in SUFFIXES)
    names = sorted(
        each.as_posix()
        for each in below
        if not any(part.startswith(".") for part in each.parts) and (folder / each).is_file()
    )
    if not names:
        raise ValueError(f"{folder} holds no images: none of its files ends with {', '.join(sorted(SUFFIXES))}")
    return names


def _check_files(folder: Path, names: Sequence[str]) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of images")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(names):,} images are not in {folder}, the first is {missing[0]}: name the "
            "folder that the captions belong to"
        )
