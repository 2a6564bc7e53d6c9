"""The model that an index belongs to: written with the index, and compared when it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from st_kdmcse.encoding import encode_documents, load_model
from st_kdmcse.provenance import model_identity

PROBE = "A dog runs across a field of grass."
"""A sentence whose embedding is kept with an index, to recognise its model."""

_PROBE_COSINE = 0.999  # of one model on two machines, or in batches of different padding


def model_header(model: SentenceTransformer, name: str | None = None, precision: str | None = None) -> dict[str, Any]:
    """What an index keeps of its model: its identity, the embedding of a probe sentence, and the precision of texts.

    Args:
        model: that encodes texts and queries.
        name: hub name or folder that it was loaded from.
        precision: that the texts were encoded in; None where that is not known.
    """
    probe = encode_documents(model, [PROBE])[0]
    return {
        "model": model_identity(model, name or name_of(model)),
        "probe": {"text": PROBE, "embedding": [round(float(value), 7) for value in probe]},
        "precision": precision,
    }


def load_named(model: SentenceTransformer | str) -> tuple[SentenceTransformer, str | None]:
    """A model and its name; loaded if it is only named. The name of a folder is its whole path."""
    if not isinstance(model, str):
        return model, name_of(model)
    return load_model(model), str(Path(model).resolve()) if Path(model).is_dir() else model


def name_of(model: SentenceTransformer) -> str | None:
    """Where a model was loaded from, as far as it knows."""
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    name = getattr(config, "_name_or_path", None) or None
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def check_model(model: SentenceTransformer, header: Mapping[str, Any], place: str) -> None:
    """Refuse a model that is not the one of an index."""
    expected, probe = header["model"], header["probe"]
    made_by = f"the index {place} was made with the model {expected['name'] or 'of no name'}"
    remedy = "give that model, or build the index again with this one"
    found = model_identity(model, name_of(model))
    if found["dimension"] != expected["dimension"]:
        raise ValueError(
            f"{made_by}, whose embeddings are of width {expected['dimension']}; those of {found['name']} are of width "
            f"{found['dimension']}: {remedy}"
        )
    if found["parameters_sha256"] != expected["parameters_sha256"]:
        raise ValueError(
            f"{made_by} (parameters {expected['parameters_sha256'][:12]}), which {found['name']} (parameters "
            f"{found['parameters_sha256'][:12]}) is not, or in another precision: {remedy}"
        )
    cosine = float(encode_documents(model, [probe["text"]])[0] @ np.array(probe["embedding"]))
    if not cosine >= _PROBE_COSINE:
        raise ValueError(
            f"{made_by}. This one has the same parameters, but embeds a probe sentence differently (cosine "
            f"{cosine:.4f}): its pooling, prompts or input length are others; {remedy}"
        )


def same_model(header: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two indexes were made with one model, as far as their headers tell."""
    if header["model"]["parameters_sha256"] != other["model"]["parameters_sha256"]:
        return False
    return float(np.dot(header["probe"]["embedding"], other["probe"]["embedding"])) >= _PROBE_COSINE


def load_expected(header: Mapping[str, Any], place: str) -> tuple[SentenceTransformer, str | None]:
    """The model that an index was made with, from where it was then."""
    name = header["model"]["name"]
    if not name:
        raise ValueError(f"the index {place} does not know the name of its model: give the model as `model`")
    try:
        return load_named(name)
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(
            f"the index {place} was made with the model {name}, which could not be loaded: give it as `model` ({error})"
        ) from error
