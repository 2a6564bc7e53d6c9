"""Teachers by name, as a command line gives them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from st_kdmcse.teachers.base import Teacher
from st_kdmcse.teachers.clip import CLIPTeacher
from st_kdmcse.teachers.combined import CombinedTeacher
from st_kdmcse.teachers.openclip import OpenCLIPTeacher, import_open_clip, known_model
from st_kdmcse.teachers.sentence_transformer import SentenceTransformerTeacher

_DEFAULT_TAG = "openai"


def load_teacher(name: str, pretrained: str | None = None, text_teacher: str | None = None, **options: Any) -> Teacher:
    """A teacher by its name.

    ==========================================================  ===================================================
    name                                                        teacher
    ==========================================================  ===================================================
    ``ViT-B-32``, ``open_clip:ViT-B-32``                        model of open_clip, with the weights ``pretrained``
    ``hf-hub:owner/name``, ``local-dir:folder``                 the same, with its own weights
    ``config.json``                                             open_clip configuration, weights ``pretrained``
    ``transformers:openai/clip-vit-base-patch32``               CLIP or SigLIP model of transformers
    ``sentence-transformers:clip-ViT-B-32``                     model of sentence-transformers; texts only if it takes
                                                                no images
    a folder                                                    whichever of these it holds
    ==========================================================  ===================================================

    Args:
        name: see the table.
        pretrained: tag or checkpoint of an open_clip model; by default "openai" for a model of open_clip's own.
        text_teacher: name of another teacher, for the captions; ``name`` is for the images then.
        options: ``device``, ``batch_size`` and ``precision`` of the teachers.

    Raises:
        FileNotFoundError: if a folder or file is missing.
        ValueError: if there is no teacher of that name, or it cannot be combined with ``pretrained``.
    """
    if text_teacher is not None:
        images = load_teacher(name, pretrained, **options)
        return CombinedTeacher(images, load_teacher(text_teacher, **options))
    kind, source = kind_of_teacher(name)
    if kind == "open_clip":
        return OpenCLIPTeacher(source, _weights(source, pretrained), **options)
    if pretrained is not None:
        raise ValueError(f"{name} brings its own weights: leave `pretrained` ({pretrained!r}) out")
    make: Callable[..., Teacher] = CLIPTeacher if kind == "transformers" else SentenceTransformerTeacher
    return make(source, **options)


def kind_of_teacher(name: str) -> tuple[str, str]:
    """The library of a teacher, "open_clip", "transformers" or "sentence-transformers", and what it is called there.

    Args:
        name: as for :func:`load_teacher`.

    Raises:
        ValueError: if there is no teacher of that name.
    """
    for kind in ("open_clip", "transformers", "sentence-transformers"):
        if name.startswith(f"{kind}:"):
            source = name.removeprefix(f"{kind}:")
            is_folder = kind == "open_clip" and Path(source).is_dir()
            return kind, f"local-dir:{source}" if is_folder else source
    if Path(name).is_dir():
        return _kind_of_folder(Path(name))
    if not name.startswith(("hf-hub:", "local-dir:")) and not name.endswith(".json"):
        try:
            known_model(name)
        except ValueError as error:
            raise ValueError(
                f"no teacher {name!r}: there is no such folder, and {error}. Models of other libraries have a prefix: "
                "transformers:openai/clip-vit-base-patch32, sentence-transformers:all-mpnet-base-v2"
            ) from error
    return "open_clip", name


def _kind_of_folder(folder: Path) -> tuple[str, str]:
    if (folder / "open_clip_config.json").is_file():
        return "open_clip", f"local-dir:{folder}"
    if (folder / "modules.json").is_file():
        return "sentence-transformers", str(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(
            f"the folder {folder} holds no model: expected an open_clip_config.json (open_clip), a config.json "
            "(transformers) or a modules.json (sentence-transformers)"
        )
    try:
        kind = json.loads(config.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is not the configuration of a model: no model_type") from error
    if kind not in ("clip", "siglip"):
        raise ValueError(
            f"{config}: a {kind} model is no teacher of images; expected model_type clip or siglip. "
            f"For texts only: sentence-transformers:{folder}"
        )
    return "transformers", str(folder)


def _weights(source: str, pretrained: str | None) -> str | None:
    """The weights of an open_clip model."""
    if source.startswith(("hf-hub:", "local-dir:")):
        if pretrained is not None:
            raise ValueError(f"{source} brings its own weights: leave `pretrained` ({pretrained!r}) out")
        return None
    if pretrained is not None:
        return pretrained
    if source.endswith(".json"):
        raise ValueError(f"{source} is a configuration without weights: give the path of a checkpoint as `pretrained`")
    tags = import_open_clip().list_pretrained_tags_by_model(known_model(source))
    if _DEFAULT_TAG not in tags:
        choice = f"one of {', '.join(tags)}" if tags else "the path of a checkpoint"
        raise ValueError(f"{source} has no weights {_DEFAULT_TAG!r}: give {choice} as `pretrained`")
    return _DEFAULT_TAG
