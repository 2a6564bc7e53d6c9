"""What the losses share: two dropout views from one forward pass, the text head, gathering, saving."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from sentence_transformers.util import all_gather, all_gather_with_grad
from sentence_transformers.util.distributed import get_rank, get_world_size
from torch import Tensor, nn

from st_kdmcse.losses import heads as heads_io
from st_kdmcse.losses.components import LossComponents
from st_kdmcse.losses.heads import ProjectionHead
from st_kdmcse.upstream import check_layers, embed_columns

Views = tuple[Tensor, Tensor]

AnchorTensors = dict[str, Tensor]
"""Tensors by name, with a row for each anchor."""

AnchorLoss = Callable[[AnchorTensors, int], tuple[Tensor, ...]]
"""Takes some anchors and the row of the first one's positive; returns the mean loss of the anchors, and counts."""


class _Loads:
    """Counts how often a state was loaded into a model; a hook of it, and copied and pickled with it."""

    count = 0

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        self.count += 1


def _count_loads(model: nn.Module) -> _Loads:
    """The counter of a model; a new one at the first call."""
    counter = vars(model).get("_st_kdmcse_loads")
    if counter is None:
        counter = model._st_kdmcse_loads = _Loads()  # type: ignore[assignment]
        model.register_load_state_dict_post_hook(counter)
    return counter


class TwoViewLoss(nn.Module):
    """Base of the losses: a contrastive text loss between two dropout views of each sentence.

    Subclasses give :meth:`text_loss`; those that learn from a teacher extend :meth:`compute_loss_from_embeddings` and
    :meth:`teacher_batch`.

    Args:
        model: the student.
        gather_across_devices: use the batches of all processes as candidates.

    Raises:
        ValueError: if the model has a ``truncate_dim``: training sees whole embeddings.
    """

    def __init__(self, model: SentenceTransformer, gather_across_devices: bool = False) -> None:
        super().__init__()
        if model.truncate_dim is not None:
            raise ValueError(
                f"the model has truncate_dim {model.truncate_dim}, and training sees whole embeddings: make it "
                "without, wrap the loss in MatryoshkaLoss, and truncate when you encode"
            )
        self.model = model
        self.gather_across_devices = gather_across_devices
        self.hidden_dim: int = model.get_embedding_dimension()
        self.heads = nn.ModuleDict({"text": self.student_head(self.hidden_dim)}).to(model.device)
        self._loads = _count_loads(model)
        self._loads_before = self._loads.count

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> LossComponents:
        """The loss of a tokenized batch.

        Args:
            sentence_features: one tokenized column, which is doubled to give two dropout views in one forward pass; or
                two, which are the views (as with ``InputExample(texts=[sentence, sentence])``).
            labels: the teacher's side of the batch, see the class; None for a batch of plain text.

        Returns:
            The terms of the loss.

        Raises:
            ValueError: if the student's weights have been loaded since the loss was made and the heads have not, as
                when ``SentenceTransformer.fit`` or the stock trainer resumes; or if AdaptiveLayerLoss wraps the loss.
        """
        self._check_heads()
        check_layers(self.model)
        columns = [dict(features) for features in sentence_features]
        if len(columns) == 1:
            columns.append(dict(columns[0]))
        if len(columns) != 2:
            raise ValueError(
                f"{type(self).__name__} takes one column of sentences, or two views of it; got {len(columns)}"
            )
        views = self.embed(columns)
        given = self.text_batch(columns) if labels is None else self.teacher_batch(labels, views[0].device)
        return self.compute_loss_from_embeddings(views, **given)

    def embed(self, columns: list[dict[str, Tensor]]) -> Views:
        """The two views, (N, hidden) each, from two tokenized columns of N sentences."""
        first, second = embed_columns(self.model, columns, separate_first=False)
        return first, second

    def compute_loss_from_embeddings(
        self,
        views: Views,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        image_ids: Any = None,
    ) -> LossComponents:
        """The loss of sentences that are encoded already.

        Args:
            views: two (N, hidden) tensors, the sentence embeddings under two dropout masks.
            image_features: (N, T) teacher features of each sentence's image; None for a batch of plain text.
            text_features: (N, T) teacher features of each sentence.
            image_ids: N integers (or any hashable values) that are equal where the image is.

        Returns:
            The terms, whose sum is the training loss.
        """
        anchors, candidates, offset = self.project_text(views)

        def text_loss(given: AnchorTensors, offset: int) -> tuple[Tensor, ...]:
            return (self.text_loss(given["anchors"], candidates, offset),)

        (term,) = self.over_anchors(text_loss, {"anchors": anchors}, offset)
        return LossComponents({"text": term})

    def text_loss(self, anchors: Tensor, candidates: Tensor, offset: int) -> Tensor:
        """The text term: (N, hidden) and (M, hidden) head outputs to a scalar."""
        raise NotImplementedError

    def student_head(self, width: int) -> ProjectionHead:
        """A head of ``width`` outputs that reads sentence embeddings."""
        return ProjectionHead(self.hidden_dim, width, of_unit_vectors=isinstance(list(self.model)[-1], Normalize))

    def text_batch(self, columns: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a batch of plain text brings for :meth:`compute_loss_from_embeddings`, besides its views."""
        return {}

    def teacher_batch(self, labels: Tensor, device: torch.device) -> dict[str, Any]:
        """What the labels bring for :meth:`compute_loss_from_embeddings`; nothing for a loss without teacher."""
        return {}

    def over_anchors(self, loss: AnchorLoss, anchors: AnchorTensors, offset: int) -> tuple[Tensor, ...]:
        """The mean of a loss over all anchors, and the sums of its counts; this base takes all anchors at once.

        Args:
            loss: the loss of some anchors against all candidates.
            anchors: what it needs of each anchor.
            offset: the row of the first anchor's positive among the candidates.
        """
        return loss(anchors, offset)

    def project_text(self, views: Views) -> tuple[Tensor, Tensor, int]:
        """Text-head outputs of the anchors, of the candidates of all processes, and the first positive's row."""
        anchors, candidates = (self.heads["text"](view) for view in views)
        return anchors, self.gather(candidates, with_grad=True), self.offset(anchors)

    def gather(self, rows: Tensor, with_grad: bool = False) -> Tensor:
        """The rows of all processes one after the other, if the loss gathers; else the rows."""
        if not self.gathers:
            return rows
        gathered: Tensor = all_gather_with_grad(rows) if with_grad else all_gather(rows)
        return gathered

    def offset(self, rows: Tensor) -> int:
        """Where this process's rows begin among the gathered ones."""
        return get_rank() * len(rows) if self.gathers else 0

    @property
    def gathers(self) -> bool:
        """Whether there are other processes whose rows become candidates."""
        return self.gather_across_devices and get_world_size() > 1

    def save_heads(self, path: str | Path) -> None:
        """Write the heads to the directory ``path``: ``heads.safetensors`` and ``heads_config.json``."""
        heads_io.save_heads(self.heads, path, {"loss": type(self).__name__, **self.get_config_dict()})

    def load_heads(self, path: str | Path) -> None:
        """Read the heads that :meth:`save_heads` wrote.

        Raises:
            FileNotFoundError: if ``path`` holds none.
            ValueError: if a parameter is missing, unknown or of another shape, by name; nothing is changed then.
        """
        heads_io.load_heads(self.heads, path)
        self.heads_fit()

    def heads_fit(self) -> None:
        """Take note that the heads belong to the student's weights as they are now."""
        self._loads_before = self._loads.count

    def _check_heads(self) -> None:
        if self._loads.count != self._loads_before and torch.is_grad_enabled():
            raise ValueError(
                "the student's weights were loaded after this loss was made, and its heads are random still: the stock "
                "trainer and fit save no heads, so their runs cannot be resumed. Use KDMCSETrainer, which saves and "
                "restores them; or make the loss after the weights are loaded"
            )

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {"gather_across_devices": self.gather_across_devices}
