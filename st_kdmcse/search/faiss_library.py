"""The library FAISS, of whichever wheel is installed."""

from __future__ import annotations

from functools import cache
from importlib.metadata import distributions
from typing import Any


def load_faiss() -> Any:
    """The module ``faiss``, of either wheel.

    It uses all cores; the environment variable OMP_NUM_THREADS sets another number.

    Raises:
        ImportError: if it is not installed (names the extra), or if both wheels are, of which one has overwritten files
            of the other (says what to remove).
    """
    if len(_faiss_wheels()) > 1:
        raise ImportError(
            "both faiss-cpu and faiss-gpu are installed, and each has overwritten files of the other: run "
            "`pip uninstall faiss-cpu faiss-gpu`, then install one of them again"
        )
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            'the search index needs FAISS: pip install "st-kdmcse[search]", or on a GPU "st-kdmcse[faiss-gpu]" '
            "(never both)"
        ) from error
    return faiss


def faiss_reason(error: Exception) -> str:
    """What an exception of FAISS says, without the place in its source."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rsplit(": ", 1)[-1]


@cache
def _faiss_wheels() -> list[str]:
    """The wheels of FAISS that are installed."""
    return [name for name in ("faiss-cpu", "faiss-gpu") if any(distributions(name=name))]


def gpus() -> int:
    """GPUs that FAISS can use: none with the wheel for CPUs."""
    faiss = load_faiss()
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0
