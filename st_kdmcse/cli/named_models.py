"""Models that a user lists on the command line, with the names that they get in tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def named_models(arguments: Sequence[str]) -> dict[str, str]:
    """Labels and paths from ``LABEL=PATH``, or from ``PATH``, whose last part is the label then.

    Args:
        arguments: hub names or folders, with or without a label.

    Returns:
        Hub name or folder by label, in the order given.

    Raises:
        ValueError: if a label or path is empty, or two models have one label.

    Example:
        >>> named_models(["SimCSE=runs/1", "sentence-transformers/all-MiniLM-L6-v2"])
        {'SimCSE': 'runs/1', 'all-MiniLM-L6-v2': 'sentence-transformers/all-MiniLM-L6-v2'}
    """
    models: dict[str, str] = {}
    for argument in arguments:
        label, separator, path = argument.partition("=")
        if not separator or Path(argument).exists():
            path = argument
            label = Path(path).name or Path(path).resolve().name
        if not label.strip() or not path.strip():
            raise ValueError(f"{argument!r} names no model: give a hub name or folder, or LABEL=PATH")
        if label in models:
            raise ValueError(
                f"{models[label]} and {path} would both be called {label!r}: give them labels, as in SimCSE={path}"
            )
        models[label] = path
    return models
