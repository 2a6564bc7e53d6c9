"""What the model card of a trained student says about its teacher and its heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from st_kdmcse.config import KDMCSEConfig, MCSEConfig
from st_kdmcse.losses.base import TwoViewLoss
from st_kdmcse.losses.grounded import GroundedLoss
from st_kdmcse.losses.heads import HEADS_DIR
from st_kdmcse.losses.mcse import MCSELoss

_CARD = "README.md"
_BEFORE = "### Framework Versions"


def describe_training(folder: Path, losses: Sequence[TwoViewLoss], sizes: Sequence[int] = ()) -> None:
    """Add the teacher of the features, their checksum, and how to load the heads, to the model card of a folder.

    Features by value have no known teacher: nothing is said about it then. A folder without a card is left alone.

    Args:
        folder: of a saved model, with the heads beside it.
        losses: those that it was trained with.
        sizes: that embeddings can be cut to, if it was trained for that.
    """
    card = folder / _CARD
    if len(losses) != 1 or not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if _BEFORE not in text:
        return
    section = "\n\n".join([*_sizes(sizes), *_teacher(losses[0]), *_heads(losses[0])])
    card.write_text(text.replace(_BEFORE, f"{section}\n\n{_BEFORE}", 1), encoding="utf-8")


def _sizes(sizes: Sequence[int]) -> list[str]:
    if not sizes:
        return []
    return [
        "### Embedding Sizes",
        f"The first dimensions of an embedding can be used alone; it was trained with {', '.join(map(str, sizes))}:",
        "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        f'SentenceTransformer(".", truncate_dim={min(sizes)})  # the folder of this card\n```',
    ]


def _teacher(loss: TwoViewLoss) -> list[str]:
    store = loss.features if isinstance(loss, GroundedLoss) else None
    if store is None:
        return []
    return [
        "### Teacher Features",
        f"- Teacher: `{store.teacher}`\n- SHA-256 of the feature store: `{store.checksum}`\n"
        f"- {store.num_images:,} images, {len(store):,} captions, {store.dim} dimensions",
    ]


def _heads(loss: TwoViewLoss) -> list[str]:
    """How the heads that are saved beside the model are loaded."""
    name = type(loss).__name__
    arguments: dict[str, Any] = {}
    if isinstance(loss, GroundedLoss):
        arguments["teacher_dim"] = loss.teacher_dim
        if loss.get_config_dict().get("use_captions"):
            arguments["use_captions"] = True
    call = ", ".join(["model", *_config(loss), *(f"{key}={value!r}" for key, value in arguments.items())])
    return [
        "### Projection Heads",
        f"Embeddings do not need the projection heads of the training. The folder `{HEADS_DIR}` holds them, to go on "
        "training or to compare sentences with images:",
        "```python\nimport st_kdmcse\nfrom sentence_transformers import SentenceTransformer\n\n"
        'folder = "."  # the folder of this card\n'
        f"model = SentenceTransformer(folder)\nloss = st_kdmcse.{name}({call})\n"
        f'loss.load_heads(f"{{folder}}/{HEADS_DIR}")\n```',
    ]


def _config(loss: TwoViewLoss) -> list[str]:
    """The options that decide which heads there are, and their shapes."""
    if not isinstance(loss, GroundedLoss):
        return []
    config = loss.config
    options: dict[str, Any] = {}
    if config.projection_dim != KDMCSEConfig().projection_dim:
        options["projection_dim"] = config.projection_dim
    if config.multimodal_weight in (0, "auto"):
        options["multimodal_weight"] = config.multimodal_weight
    kind = MCSEConfig if isinstance(loss, MCSELoss) else KDMCSEConfig
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return [f"config=st_kdmcse.{kind.__name__}({given})"] if options else []
