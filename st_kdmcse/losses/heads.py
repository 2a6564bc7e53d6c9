"""Projection heads: one linear layer and tanh each, used in training only and saved beside the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from st_kdmcse.files import write_json

logger = logging.getLogger(__name__)

HEADS_DIR = "heads"
"""The folder beside a saved model that holds its heads."""
WEIGHTS_NAME = "heads.safetensors"
CONFIG_NAME = "heads_config.json"


class ProjectionHead(nn.Module):
    """``tanh(W x + b)``.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        of_unit_vectors: whether inputs have length 1. Initial weights are then larger by ``sqrt(in_features)``, so that
            they count as much beside the bias as with the vectors of an encoder.
    """

    def __init__(self, in_features: int, out_features: int, of_unit_vectors: bool = False) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)
        if of_unit_vectors:
            with torch.no_grad():
                self.dense.weight.mul_(math.sqrt(in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Project ``x``.

        Args:
            x: (N, in_features), or narrower: embeddings truncated by MatryoshkaLoss meet the first columns of W.

        Returns:
            (N, out_features), in (-1, 1).

        Raises:
            ValueError: if ``x`` is wider than the head.
        """
        width = x.shape[-1]
        if width > self.dense.in_features:
            raise ValueError(f"the head takes vectors of width {self.dense.in_features}, got {width}")
        return torch.tanh(F.linear(x.to(self.dense.weight.dtype), self.dense.weight[:, :width], self.dense.bias))


class GradientBalance(nn.Module):
    """The weight of a term by the gradients of the first batches: its own is to be a share of another term's.

    The state is saved with the heads, so that a run which is resumed has the same weight.

    Args:
        share: of the other term's gradient norm, > 0.
        batches: how many batches to measure, >= 1.
    """

    def __init__(self, share: float = 0.3, batches: int = 20) -> None:
        super().__init__()
        self.share = share
        self.batches = batches
        self._sum, self._count = 0.0, 0

    @property
    def settled(self) -> bool:
        """Whether the weight is fixed."""
        return self._count >= self.batches

    @property
    def weight(self) -> float:
        """``share`` times the mean ratio so far; 0 before the first batch."""
        return self.share * self._sum / max(1, self._count)

    def add(self, ratio: float) -> None:
        """Count a batch.

        Args:
            ratio: of the other term's gradient norm to this one's; one that is not finite does not count.
        """
        if self._count < self.batches and math.isfinite(ratio):
            self._sum, self._count = self._sum + ratio, self._count + 1
            if self._count == self.batches:
                logger.info("the weight of the cross-modal terms is %.4g from now on", self.weight)

    def get_extra_state(self) -> Tensor:
        """The sum of the ratios and their number, (2,) float64."""
        return torch.tensor([self._sum, self._count], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from a state of :meth:`get_extra_state`."""
        total, count = state.tolist()
        self._sum, self._count = total, int(count)


def save_heads(heads: nn.ModuleDict, path: str | Path, config: Mapping[str, object]) -> None:
    """Write ``heads`` to ``path/heads.safetensors`` and what they are to ``path/heads_config.json``.

    Args:
        heads: the heads by name.
        path: a directory, which is made.
        config: further entries of the JSON file, for the reader.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    shapes = {name: list(value.shape) for name, value in heads.state_dict().items()}
    save_file({name: value.contiguous() for name, value in heads.state_dict().items()}, path / WEIGHTS_NAME)
    write_json(path / CONFIG_NAME, {**config, "shapes": shapes})


def load_heads(heads: nn.ModuleDict, path: str | Path) -> None:
    """Read what :func:`save_heads` wrote into ``heads``, in place.

    Args:
        heads: the heads by name.
        path: the directory.

    Raises:
        FileNotFoundError: if there are no heads at ``path``.
        ValueError: if the file is damaged, or a parameter is missing, unknown or of another shape. Nothing is changed
            then.
    """
    file, saved = _read(path)
    expected = heads.state_dict()
    problems = [f"{name} is missing from the file" for name in expected.keys() - saved.keys()]
    problems += [f"{name} is unknown to this loss" for name in saved.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(saved[name].shape)} in the file, {tuple(expected[name].shape)} in this loss"
        for name in expected.keys() & saved.keys()
        if saved[name].shape != expected[name].shape
    ]
    if problems:
        raise ValueError(
            f"{file} does not fit this loss: {'; '.join(sorted(problems))}. Build the loss with the model, "
            "`teacher_dim` and `projection_dim` that it was trained with"
        )
    heads.load_state_dict(saved)


def load_head(path: str | Path, name: str) -> ProjectionHead:
    """One of the heads that :func:`save_heads` wrote.

    Args:
        path: the directory.
        name: "text", "grounding", "teacher_image" or "teacher_text".

    Raises:
        FileNotFoundError: if there are no heads at ``path``.
        ValueError: if the file is damaged, or has no such head.
    """
    file, saved = _read(path)
    weight, bias = saved.get(f"{name}.dense.weight"), saved.get(f"{name}.dense.bias")
    if weight is None or bias is None:
        known = sorted({key.split(".")[0] for key in saved})
        raise ValueError(f"{file} has no {name} head, only {', '.join(known)}: train with mcse or kdmcse")
    head = ProjectionHead(weight.shape[1], weight.shape[0])
    head.dense.load_state_dict({"weight": weight, "bias": bias})
    return head.eval()


def _read(path: str | Path) -> tuple[Path, dict[str, Tensor]]:
    file = Path(path) / WEIGHTS_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: {path} is not a directory that save_heads wrote")
    try:
        return file, load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read, it may be truncated: {error}") from error
