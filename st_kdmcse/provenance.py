"""Where a result comes from: model, data, versions, seed, device, date."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import PretrainedConfig

from st_kdmcse._version import __version__
from st_kdmcse.files import read_json, write_json

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
_NO_SETTINGS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""What a configuration of transformers says of where and when a model was saved."""


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

    Where no pooling was saved with it, "pooling" names the one that was taken.

    Args:
        model: any sentence-transformers model.
        name: hub name or folder that it was loaded from.
    """
    assumed = getattr(model, "assumed_pooling", None)
    return {
        **({} if assumed is None else {"pooling": f"{assumed} (none was saved)"}),
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


def model_checksum(model: SentenceTransformer) -> str:
    """SHA-256 of all that decides what a model returns for a text, as 64 hexadecimal digits.

    Beside the parameters these are the settings of the modules, the tokenizer, prompts and lengths.

    Args:
        model: any sentence-transformers model.
    """
    config = model.config
    settings = [
        parameters_checksum(model),
        [(type(module).__name__, module.get_config_dict()) for module in model],
        configuration_content(config) if config else {},
        tokenizer_content(getattr(model[0], "tokenizer", None)),
        [model.prompts, model.default_prompt_name, model.truncate_dim, model.similarity_fn_name, model.max_seq_length],
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def configuration_content(config: PretrainedConfig) -> dict[str, Any]:
    """What a configuration of transformers says of a model, for a checksum: not where and when it was saved."""
    return {name: value for name, value in config.to_diff_dict().items() if name not in _NO_SETTINGS}


def tokenizer_content(tokenizer: Any) -> Any:
    """What decides how a tokenizer cuts texts, for a checksum."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else None
    content = json.loads(fast.to_str())
    return {name: each for name, each in content.items() if name not in ("truncation", "padding")}  # of the last call


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


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """What differs between two records of settings, in words.

    Args:
        earlier: the settings of before.
        now: the settings of now; settings that only ``earlier`` has are not compared.
        free: settings that may differ.

    Returns:
        Sentences such as "max_steps was 100, is 200".

    Example:
        >>> differences({"seed": 1, "lr": 0.1}, {"seed": 2, "lr": 0.1})
        ['seed was 1, is 2']
    """
    return [
        f"{name} was {earlier.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if name not in free and earlier.get(name) != value
    ]


def claim(path: Path, record: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """Write the settings of a piece of work into its folder, or compare them with those that it was begun with.

    Args:
        path: the JSON file of the settings; its folder is made.
        record: the settings, for JSON.
        remedy: what to do if they differ, for the error.

    Returns:
        The settings that the work was begun with.

    Raises:
        ValueError: if the folder was begun with other settings (names them), or the file is damaged.
    """
    if not path.is_file():
        write_json(path, record, keep_existing=True)  # of several processes, the first one writes
    earlier = read_json(path, remedy)
    changes = differences(earlier, json.loads(json.dumps(record)))
    if changes:
        raise ValueError(f"the work in {path.parent} was begun with other settings ({'; '.join(changes)}): {remedy}")
    return earlier
