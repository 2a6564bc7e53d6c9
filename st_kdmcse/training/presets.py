"""What the paper does differently from one image-caption data set to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DatasetPreset:
    """Defaults of a training script; each is an option of it.

    Args:
        output_dir: folder of the run.
        config: options of :class:`~st_kdmcse.KDMCSEConfig`.
        extraction: options of :class:`~st_kdmcse.extraction.ExtractionOptions`.
        teachers: open_clip name of the CLIP model that features are extracted with, by recipe.
    """

    output_dir: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    extraction: Mapping[str, Any] = field(default_factory=dict)
    teachers: Mapping[str, str] = field(
        default_factory=lambda: {"paper": "ViT-B-32", "released": "ViT-L-14", "grounded": "ViT-B-32"}
    )


PRESETS = {
    "flickr": DatasetPreset(Path("kdmcse-bert")),
    "coco": DatasetPreset(Path("kdmcse-bert-coco"), config={"multimodal_weight": 0.05}),
    # A crawl has holes: missing and broken images are the rule.
    "cc12m": DatasetPreset(Path("kdmcse-bert-cc12m"), extraction={"limit": 1_000_000, "on_error": "skip"}),
}
"""The data sets of the paper by name; the weight is MCSE's where the paper prints none, see Appendix B for CC12M."""
