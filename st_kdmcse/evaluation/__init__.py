"""Evaluation of sentence encoders: STS and transfer tasks, alignment and uniformity, dropout maps, neighbours, plots.

A name is imported when it is used: scikit-learn and matplotlib load with what needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_kdmcse.evaluation.similarity import TokenizedSimilarityEvaluator
    from st_kdmcse.evaluation.sts import STSEvaluator, STSResult, evaluate_poolings, evaluate_sts
    from st_kdmcse.evaluation.transfer import TransferProtocol, evaluate_transfer
    from st_kdmcse.evaluation.visualize import DropoutMap, dropout_map, nearest_neighbours

__all__ = [
    "DropoutMap",
    "STSEvaluator",
    "STSResult",
    "TokenizedSimilarityEvaluator",
    "TransferProtocol",
    "dropout_map",
    "evaluate_poolings",
    "evaluate_sts",
    "evaluate_transfer",
    "nearest_neighbours",
]

_MODULES = {
    "DropoutMap": "visualize",
    "STSEvaluator": "sts",
    "STSResult": "sts",
    "TokenizedSimilarityEvaluator": "similarity",
    "TransferProtocol": "transfer",
    "dropout_map": "visualize",
    "evaluate_poolings": "sts",
    "evaluate_sts": "sts",
    "evaluate_transfer": "transfer",
    "nearest_neighbours": "visualize",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is used."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
