"""Where a run reports its curves to: TensorBoard, Weights & Biases, Trackio, or another tracker of transformers."""

from __future__ import annotations

import difflib
import os
from importlib.util import find_spec
from pathlib import Path

from transformers import Trainer
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)

DOCUMENTED = ("tensorboard", "wandb", "trackio")
"""The trackers that the documentation names."""

_PACKAGES = {"tensorboard": '"st-kdmcse[tensorboard]"', "azure_ml": "azureml-core"}  # where pip has another name
_SET_BY_A_CLUSTER = {"flyte", "kubeflow"}


def trackers(report_to: str) -> list[str]:
    """The trackers that a run reports to, each of them installed.

    Args:
        report_to: names separated by commas; "none", or "all" for those that are installed.

    Raises:
        ValueError: for a name that transformers does not know.
        ImportError: if the package of a tracker is missing; says how to install it.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    if names == ["none"]:
        return []
    if names == ["all"]:
        return [str(name) for name in get_available_reporting_integrations()]
    known = sorted(set(INTEGRATION_TO_CALLBACK) - _SET_BY_A_CLUSTER)
    if not names:
        raise ValueError(f"`report_to` names no tracker: give none, or some of {', '.join(known)}")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}, or none"
            raise ValueError(f"`report_to` knows no tracker {name!r}: {hint}")
    for name in names:
        if not _is_installed(name):
            raise ImportError(f"`report_to` {name} needs a package: pip install {_PACKAGES.get(name, name)}")
    return names


def check_run_name(name: str | None) -> None:
    """Refuse a name of a run that is empty or no name of a folder: TensorBoard's event files go there.

    Args:
        name: None for a run without one.

    Raises:
        ValueError: if it is such a name.
    """
    if name is not None and (
        not name.strip() or name in (".", "..") or not name.isprintable() or set(name) & set("/\\")
    ):
        raise ValueError(f"`run_name` must be a name without slashes, got {name!r}")


def place_event_files(trainer: Trainer, folder: Path, resumed_from: int | None) -> None:
    """Let TensorBoard's event files go to one folder, whatever the process, so that a resumed run goes on with a curve.

    The variable ``TENSORBOARD_LOGGING_DIR`` goes first.

    Args:
        trainer: before training; without TensorBoard it stays as it is.
        folder: for the files.
        resumed_from: the step that a run goes on from; points of later steps are replaced. None is a new run.
    """
    if os.environ.get("TENSORBOARD_LOGGING_DIR") or not trainer.pop_callback(TensorBoardCallback):
        return
    if trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter  # of the extra `tensorboard`

        writer = SummaryWriter(str(folder), purge_step=None if resumed_from is None else resumed_from + 1)
        trainer.add_callback(TensorBoardCallback(writer))


def _is_installed(name: str) -> bool:
    if name in DOCUMENTED:
        return find_spec(name) is not None
    return name in get_available_reporting_integrations()
