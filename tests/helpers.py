"""What several test modules use."""

import os
import runpy
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from st_kdmcse import precision

WORDS = "a the two dog dogs man woman child runs plays sits on in of grass beach ball red blue small large snow".split()


def data_folder() -> Path:
    """Where real data is, if there is any."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    return Path(os.environ.get("ST_KDMCSE_DATA", default))


@contextmanager
def cpu_with_bfloat16(faster: bool):
    """Take the CPU for one that is faster at bfloat16, or that has no instructions for it."""
    times = {torch.float32: 3.0, torch.bfloat16: 1.0}
    with (
        patch.object(precision, "_lacks_instructions", lambda: not faster),
        patch.object(precision, "_seconds", times.__getitem__),
    ):
        precision.bfloat16_is_faster.cache_clear()
        yield
    precision.bfloat16_is_faster.cache_clear()


def copy_tree(source: Path, target: Path) -> Path:
    """A copy of a folder, so that a test may change it."""
    return Path(shutil.copytree(source, target))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def load_command(script: str):
    """The command of a script, for click's CliRunner.

    Args:
        script: path from the repository root, such as "evaluation/sts.py".
    """
    return runpy.run_path(str(Path(__file__).resolve().parents[1] / script))["main"]


def without_dropout(model):
    """The model, whose dropout is switched off for good, in training too."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model[0].auto_model.config.attention_probs_dropout_prob = 0.0
    return model


def gradients(loss, total):
    """Every gradient after a backward pass from ``total``, by name; they are cleared before and after."""
    loss.zero_grad()
    total.backward()
    found = {name: value.grad.clone() for name, value in loss.named_parameters() if value.grad is not None}
    loss.zero_grad()
    return found


def with_large_weights(model):
    """The model, with weights so large that embeddings are far apart and rounding does not decide about ranks."""
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model
