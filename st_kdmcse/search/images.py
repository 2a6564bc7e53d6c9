"""Text-to-image search: sentences meet images in the space that the trained heads share."""

from __future__ import annotations

from pathlib import Path

from sentence_transformers import SentenceTransformer

from st_kdmcse.data.store import FeatureStore
from st_kdmcse.losses.heads import load_head
from st_kdmcse.search.base import NewRows
from st_kdmcse.search.faiss_backend import FaissBackend
from st_kdmcse.search.model_check import OWN_MODEL
from st_kdmcse.search.semantic_index import SemanticIndex
from st_kdmcse.search.storage import check_free
from st_kdmcse.search.tuning import check_recall_target
from st_kdmcse.training.retrieval import project_images
from st_kdmcse.training.text_image import dense_layer

IMAGE = "image"
"""Name of the metadata that has the file of an image."""


def index_images(
    store: FeatureStore,
    model: SentenceTransformer,
    heads: str | Path,
    path: str | Path,
    *,
    images: str | Path | None = None,
    factory: str | None = None,
    recall_target: float = 0.95,
    memory_limit: int | None = None,
    show_progress_bar: bool | None = None,
) -> SemanticIndex:
    """Index the images of a feature store, to be found by sentences.

    Queries go through the student and its grounding head, images through the teacher_image head (KDMCSE, Section 3.2):
    the loss has brought them together there by their cosine. A row is an image: its id, its captions as the text, one a
    line, and where ``images`` is given its file as metadata. The folder holds the encoder of the queries as well, see
    :func:`text_to_image_encoder`.

    Args:
        store: features of the images, of the teacher that the heads were trained with.
        model: the student that was trained with the heads.
        heads: their folder, such as ``kdmcse-bert/heads``.
        path: folder for the index; there must be none.
        images: folder of the image files, whose names are the ids of the images.
        factory: FAISS's name of an index type; None chooses one.
        recall_target: recall@10 that an approximate index is tuned to reach, in (0, 1].
        memory_limit: bytes for the vectors.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Raises:
        FileNotFoundError: if there are no heads, or a file of an image is not in ``images``; says how many.
        ValueError: if the heads do not fit the store or the model, or there is an index at ``path`` already.
        ImportError: without FAISS; names the extra.
    """
    path = Path(path)
    check_free(path)
    check_recall_target(recall_target)
    encoder = text_to_image_encoder(model, heads)
    head = load_head(heads, "teacher_image")
    if head.dense.in_features != store.dim:
        raise ValueError(
            f"the heads in {heads} take teacher features of width {head.dense.in_features}, those of {store.path} are "
            f"of width {store.dim}: give the features that they were trained with"
        )
    ids, captions = _images(store)
    folder = None if images is None else Path(images).resolve()
    if folder is not None:
        _check_files(folder, ids)
    embeddings = project_images(store, head, show_progress_bar)
    rows = NewRows.checked(ids, captions, embeddings, [{} if folder is None else {IMAGE: each} for each in ids])
    notes = {"folder": None if folder is None else str(folder), "store": store.checksum, "teacher": store.teacher}
    backend = FaissBackend.build(rows, factory, recall_target, memory_limit, show_progress_bar)
    index = SemanticIndex(backend, encoder, OWN_MODEL, notes)
    index.save(path)
    return index


def text_to_image_encoder(model: SentenceTransformer, heads: str | Path) -> SentenceTransformer:
    """The student with its grounding head as a last module: sentences to the space of images.

    Args:
        model: the student; it is not changed, and shares its parameters with the result.
        heads: folder of the heads that were trained with it.

    Returns:
        A stock model, which can be saved and loaded as any other.

    Raises:
        FileNotFoundError: if there are no heads.
        ValueError: if there is no grounding head, or it does not fit the model.
    """
    head, dim = load_head(heads, "grounding"), int(model.get_embedding_dimension() or 0)
    if head.dense.in_features != dim:
        raise ValueError(
            f"the grounding head in {heads} takes embeddings of width {head.dense.in_features}, the model's are of "
            f"width {dim}: give the model that it was trained with"
        )
    encoder = SentenceTransformer(modules=[*model, dense_layer(head)], device=str(model.device), prompts=model.prompts)
    encoder.eval()
    return encoder


def _images(store: FeatureStore) -> tuple[list[str], list[str]]:
    """Id and captions of each image row."""
    ids = [""] * store.num_images
    captions: list[list[str]] = [[] for _ in ids]
    for image, (key, caption) in zip(store.image_rows.tolist(), store.captions(), strict=True):
        ids[image] = key
        captions[image].append(caption)
    if bare := [row for row, key in enumerate(ids) if not key]:
        raise ValueError(f"{store.path}: image row {bare[0]} has no caption, and so no id; extract the features again")
    return ids, ["\n".join(each) for each in captions]


def _check_files(folder: Path, ids: list[str]) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of images")
    missing = [each for each in ids if not (folder / each).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(ids):,} images are not in {folder}, the first is {missing[0]}: name the folder "
            "that the features were extracted from"
        )
