"""A stock text-image model of a trained student: its sentences and the teacher's images in one space."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Transformer
from torch import nn

from st_kdmcse.data.images import ImageError
from st_kdmcse.data.store import FeatureStore
from st_kdmcse.encoding import load_model
from st_kdmcse.files import read_json, write_folder
from st_kdmcse.losses.heads import HEADS_DIR, ProjectionHead, load_head
from st_kdmcse.teachers import CLIPTeacher, SentenceTransformerTeacher
from st_kdmcse.teachers.load import kind_of_teacher
from st_kdmcse.training.run_folder import FEATURES_NAME, RUN_NAME, SUMMARY_NAME

logger = logging.getLogger(__name__)

PUBLISHED = {
    "open_clip:ViT-B-32/openai": "openai/clip-vit-base-patch32",
    "open_clip:ViT-B-16/openai": "openai/clip-vit-base-patch16",
    "open_clip:ViT-L-14/openai": "openai/clip-vit-large-patch14",
}
"""Models of Hugging Face with the weights of teachers of open_clip."""

_TRANSFORMERS, _SENTENCE_TRANSFORMERS = "transformers:", "sentence-transformers:"
_COMPARED_IMAGES = 8
_LEAST_COSINE = 0.99
_CARD = "README.md"
_REMEDY = "restore it, or train again"
_COMBINED = " + "  # between the teachers of images and texts


def export_text_image(
    run: str | Path,
    path: str | Path,
    *,
    teacher: str | None = None,
    features: str | Path | None = None,
    images: str | Path | None = None,
    device: str | None = None,
) -> SentenceTransformer:
    """Write a finished run as a model of sentences and images, of stock modules only.

    ``SentenceTransformer(path)`` loads it without this package. It encodes strings and PIL images as unit vectors whose
    cosines are those that the loss compares: sentences by the student and its grounding head, images by the teacher and
    its teacher_image head (KDMCSE, Section 3.2).

    Args:
        run: folder of a run of ``mcse`` or ``kdmcse``.
        path: folder for the model; it must be absent or empty.
        teacher: the CLIP or SigLIP model of Hugging Face that gave the features, by its name on the hub or its folder,
            or ``sentence-transformers:NAME``; None is the one that the features name, or the published model of the
            same weights (:data:`PUBLISHED`).
        features: the feature store of the run; None is where the run found it.
        images: folder of the images of the features. Some are encoded and compared with the store: needed where the
            store does not tell that its teacher is this model.
        device: of the models; a GPU if there is one.

    Returns:
        The model.

    Raises:
        FileNotFoundError: if the run is not finished, or features, heads or images are missing.
        ValueError: if the run has no such heads, the features or the teacher are others than those of the training, or
            ``path`` is not empty; nothing is written then.
    """
    run, path = Path(run), Path(path)
    check_folder_is_free(path)
    trained = _trained(run)
    grounding, of_images = load_head(run / HEADS_DIR, "grounding"), load_head(run / HEADS_DIR, "teacher_image")
    store = _features(run, trained, features)
    tower = open_tower(store, teacher, images, device)
    model = text_image_model(load_model(str(run), device), grounding, tower, of_images, store.normalized)
    write_folder(path, lambda folder: _save(model, folder, run, store, tower.name))
    return model


def check_folder_is_free(path: Path) -> None:
    """Refuse a folder that a model cannot be written to.

    Args:
        path: the folder.

    Raises:
        ValueError: if it is a file, or not empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is not empty: choose another folder")


class ImageTower(NamedTuple):
    """The teacher of the images of a run, as modules of sentence-transformers.

    Attributes:
        name: of the teacher, with a hash of its weights.
        modules: from images to their features.
        dim: T, the width of the features.
    """

    name: str
    modules: list[nn.Module]
    dim: int


def open_tower(
    store: FeatureStore, teacher: str | None = None, images: str | Path | None = None, device: str | None = None
) -> ImageTower:
    """Load the teacher of a store's images, after a look at whether it is that.

    Args:
        store: the features of a training.
        teacher: as for :func:`export_text_image`.
        images: folder of the images, as there.
        device: of the comparison.

    Raises:
        FileNotFoundError: if there is no such model, or an image is missing.
        ValueError: if it is another teacher, or one that stock modules cannot be made of; says why.
    """
    name = teacher or _published(store)
    kind, source = _kind(name)
    if kind == "transformers":
        encoder: CLIPTeacher | SentenceTransformerTeacher = CLIPTeacher(source, device=device, precision="float32")
        modules: list[nn.Module] = [Transformer(source, model_kwargs={"dtype": torch.float32})]
    else:
        encoder = SentenceTransformerTeacher(source, device=device, precision="float32")
        modules = _image_route(encoder, name)
    combined = _COMBINED in store.teacher
    if encoder.dim != store.dim and not (combined and encoder.dim < store.dim):
        raise ValueError(
            f"the teacher {name} has features of width {encoder.dim}, those of the training are of width {store.dim}: "
            f"give the teacher of the training, {store.teacher}, as `teacher`"
        )
    _check_identity(encoder, name, store, None if images is None else Path(images))
    return ImageTower(encoder.name, modules, encoder.dim)


def text_image_model(
    student: SentenceTransformer,
    grounding: ProjectionHead,
    tower: ImageTower,
    teacher_image: ProjectionHead,
    normalized: bool,
) -> SentenceTransformer:
    """Join a student and the image tower of its teacher.

    Args:
        student: the trained encoder; it is not changed, and shares its parameters with the result.
        grounding: its head.
        tower: the teacher of the images.
        teacher_image: the head of its image features.
        normalized: whether the features of the training had length 1.
    """
    images = [*tower.modules, *([Normalize()] if normalized else []), dense_layer(teacher_image, tower.dim)]
    router = Router({"text": [*student, dense_layer(grounding)], "image": images}, default_route="text")
    model = SentenceTransformer(
        modules=[router, Normalize()],
        device=str(student.device),
        prompts=student.prompts,
        default_prompt_name=student.default_prompt_name,
        similarity_fn_name="cosine",
    )
    model.eval()
    return model


def dense_layer(head: ProjectionHead, width: int | None = None) -> Dense:
    """A head as a stock module, with a copy of its parameters.

    Args:
        head: the head.
        width: of what it takes, where the features of the training were filled up with zeros (as those of a teacher
            are that another one for the texts is wider than); None is all.
    """
    weight = head.dense.weight[:, :width]
    layer = Dense(weight.shape[1], head.dense.out_features, activation_function=nn.Tanh())
    layer.linear.load_state_dict({"weight": weight, "bias": head.dense.bias})
    return layer


class _Trained(NamedTuple):
    """The features of a run: where they were, and their checksum."""

    path: str | None
    checksum: str | None


def _trained(run: Path) -> _Trained:
    if not (run / SUMMARY_NAME).is_file():
        unfinished = "is not finished" if (run / RUN_NAME).is_file() else "is not the folder of a run"
        raise FileNotFoundError(f"{run} {unfinished}: there is no {SUMMARY_NAME} in it")
    summary = read_json(run / SUMMARY_NAME, _REMEDY)
    try:
        return _Trained(summary["options"]["features"], summary["data_sha256"].get("features"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run / SUMMARY_NAME} is damaged ({error!r}): {_REMEDY}") from error


def _features(run: Path, trained: _Trained, given: str | Path | None) -> FeatureStore:
    """The feature store that the run was trained with."""
    # Features in the authors' format were converted into the folder of the run.
    own = run / FEATURES_NAME
    path = Path(given or (own if own.is_dir() or trained.path is None else trained.path))
    if not path.is_dir():
        raise FileNotFoundError(f"the features of {run} are not at {path}: say where they are as `features`")
    store = FeatureStore.open(path)
    if store.checksum != trained.checksum:
        raise ValueError(
            f"{path} is not the feature store of {run}: its checksum is {store.checksum[:12]}, that of the training "
            f"{str(trained.checksum)[:12]}; give that one as `features`"
        )
    return store


def _published(store: FeatureStore) -> str:
    """The model of Hugging Face that a store names."""
    source, _, _ = _of_images(store).partition("@")
    name = PUBLISHED.get(source, source)
    on_hub = source in PUBLISHED or (source.startswith((_TRANSFORMERS, _SENTENCE_TRANSFORMERS)) and "/" in source)
    if not on_hub:
        raise ValueError(
            f"the teacher of {store.path} is {store.teacher}, which names no model of the Hugging Face hub: give the "
            "folder or name of one with the same weights as `teacher`"
        )
    return name


def _of_images(store: FeatureStore) -> str:
    """The name of the teacher that gave the features of the images."""
    return store.teacher.split(_COMBINED)[0]


def _kind(name: str) -> tuple[str, str]:
    """The library of a teacher that stock modules can be made of, and its name there."""
    is_hub_name = ":" not in name and not Path(name).is_dir()
    kind, source = ("transformers", name) if is_hub_name else kind_of_teacher(name)
    if kind == "open_clip":
        raise ValueError(
            f"`teacher` {name} is a model of open_clip, of which no stock module can be made: give the model of "
            "Hugging Face with the same weights"
        )
    return kind, source


def _image_route(teacher: SentenceTransformerTeacher, name: str) -> list[nn.Module]:
    """The modules of a model of sentence-transformers that images go through."""
    model = teacher.model
    if not teacher.knows_images:
        raise ValueError(f"`teacher` {name} takes no images: give the teacher that gave the features of the images")
    if model.truncate_dim is not None or model.default_prompt_name is not None:
        what = "cuts its embeddings off" if model.truncate_dim is not None else "puts a prompt before its inputs"
        raise ValueError(f"`teacher` {name} {what}, which its modules alone do not do: a stock model cannot be made")
    first, *rest = model
    if not isinstance(first, Router):
        return [first, *rest]
    by_name = "image" if "image" in first.sub_modules else first.default_route
    return [*first.sub_modules[first.route_mappings.get((None, "image"), by_name)], *rest]


def _check_identity(
    teacher: CLIPTeacher | SentenceTransformerTeacher, name: str, store: FeatureStore, images: Path | None
) -> None:
    """Refuse a teacher that did not give the features of a store."""
    kind, _, weights = _of_images(store).rpartition("@")
    if kind.startswith((_TRANSFORMERS, _SENTENCE_TRANSFORMERS)):
        if teacher.name.rpartition("@")[2] != weights:
            raise ValueError(
                f"{name} is not the teacher of {store.path}: its weights are {teacher.name}, those of the training "
                f"{store.teacher}"
            )
        return
    if images is None:
        raise ValueError(
            f"{store.path} has features of {store.teacher}: whether {name} has the same weights must be seen on "
            "images; give their folder as `images`"
        )
    rows = np.unique(np.linspace(0, store.num_images - 1, _COMPARED_IMAGES).astype(int))
    files = [images / _id_of(store, row) for row in rows]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{missing[0]} does not exist: give the folder of the images as `images`")
    try:
        found = teacher.encode_images(files, show_progress_bar=False)
    except ImageError as error:
        raise ValueError(f"an image to compare cannot be read: {error}") from error
    stored = np.asarray(store.image_features[rows, : teacher.dim], dtype=np.float32)
    cosines = torch.cosine_similarity(torch.from_numpy(found), torch.from_numpy(stored))
    worst = int(cosines.argmin())
    if not cosines[worst] >= _LEAST_COSINE:
        raise ValueError(
            f"{name} is not the teacher of {store.path}: the feature of {files[worst].name} has cosine "
            f"{cosines[worst]:.3f} with that in the store"
        )
    logger.info("%d images have the features of the store, cosine %.4f or more", len(files), cosines[worst])


def _id_of(store: FeatureStore, image_row: int) -> str:
    captions = np.flatnonzero(store.image_rows == image_row)
    if not len(captions):
        raise ValueError(
            f"{store.path}: image row {image_row} has no caption, and so no id; extract the features again"
        )
    return store.image_id(int(captions[0]))


def _save(model: SentenceTransformer, folder: Path, run: Path, store: FeatureStore, teacher: str) -> None:
    model.save_pretrained(str(folder), create_model_card=False)
    lines = _card(run.resolve().name, store, teacher)
    (folder / _CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _card(run: str, store: FeatureStore, teacher: str) -> Sequence[str]:
    return [
        "---",
        "library_name: sentence-transformers",
        "tags: [sentence-transformers, feature-extraction, text-image]",
        "---",
        "",
        f"# {run}: sentences and images in one space",
        "",
        "Sentences go through a trained sentence encoder and its grounding head, images through the image tower of",
        "its teacher and the teacher's head, as KDMCSE trains them (Nguyen et al., NAACL 2024, arXiv 2403.17486). It",
        "is meant for finding images by sentences. To compare sentences, use the sentence encoder itself.",
        "",
        "```python",
        "from PIL import Image",
        "from sentence_transformers import SentenceTransformer",
        "",
        'model = SentenceTransformer(".")  # the folder of this card',
        'texts = model.encode(["a dog runs on the beach"])',
        'images = model.encode([Image.open("photo.jpg")])',
        "model.similarity(texts, images)",
        "```",
        "",
        f"- Teacher of the images: `{teacher}`",
        f"- Trained with features of `{store.teacher}`: {store.num_images:,} images, {len(store):,} captions",
        f"- SHA-256 of the feature store: `{store.checksum}`",
    ]
