"""Where a result comes from: model, data, versions, seed, device, date."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from st_kdmcse import __version__

_LIBRARIES = (
    "sentence-transformers",
    "transformers",
    "torch",
    "datasets",
    "numpy",
    "scipy",
    "scikit-learn",
    "faiss-cpu",
    "faiss-gpu",
)


def provenance(
    model: SentenceTransformer | None = None,
    model_name: str | None = None,
    data_sha256: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """What to write beside a result, so that it can be traced and made again.

    Args:
        model: the model that was measured.
        model_name: hub name or folder that it was loaded from.
        data_sha256: checksum of each data file or set, by name.
        seed: of whatever was drawn.

    Returns:
        A dictionary for JSON: model, data_sha256, seed, device, versions, date (UTC).
    """
    return {
        "model": model_identity(model, model_name) if model is not None else None,
        "data_sha256": dict(data_sha256 or {}),
        "seed": seed,
        "device": device_name(model.device if model is not None else None),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def model_identity(model: SentenceTransformer, name: str | None = None) -> dict[str, Any]:
    """What a model is, whatever it is called: dimension, modules, and the checksum of its parameters.

    Args:
        model: any sentence-transformers model.
        name: hub name or folder that it was loaded from.
    """
    return {
        "name": name,
        "parameters_sha256": parameters_checksum(model),
        "dimension": model.get_embedding_dimension(),
        "max_seq_length": model.max_seq_length,
        "modules": [type(module).__name__ for module in model],
    }


def parameters_checksum(model: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes, types and values of parameters and buffers, as 64 hexadecimal digits.

    An encoder's own pooler is left out: no embedding comes from it, and where a checkpoint lacks it, as RoBERTa's do,
    transformers draws another one at every loading.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".pooler." in name:
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def device_name(device: torch.device | None = None) -> str:
    """The name of a device for people: the GPU's, or the CPU with its number of threads.

    Args:
        device: which; None is the GPU if there is one.
    """
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device.type if device is not None else 'cpu'}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that decide a result."""
    found = {"st-kdmcse": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # an optional one
            continue
    return found


def check_output(path: Path | None) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Args:
        path: the file; None for none. Its folder is made if need be.

    Raises:
        ValueError: if it is a folder, or its folder cannot be made or written to.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder of {path} cannot be made: {error}") from error
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} cannot be written to: name a file elsewhere")


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all; its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
