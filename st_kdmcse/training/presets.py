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
        title: the data, for the script's help.
        output_dir: folder of the run.
        config: options of :class:`~st_kdmcse.KDMCSEConfig`.
        extraction: options of :class:`~st_kdmcse.extraction.ExtractionOptions`.
        teachers: open_clip name of the CLIP model that features are extracted with, by recipe.
        example: options for the publisher's files, for the script's help.
    """

    title: str
    output_dir: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    extraction: Mapping[str, Any] = field(default_factory=dict)
    teachers: Mapping[str, str] = field(default_factory=lambda: {"paper": "ViT-B-32", "released": "ViT-L-14"})
    example: str = ""


PRESETS = {
    "flickr": DatasetPreset(
        "Wikipedia and Flickr30k (29,783 training images)",
        Path("kdmcse-bert"),
        example="--captions results_20130124.token --images flickr30k-images --split train.txt",
    ),
    "coco": DatasetPreset(
        "Wikipedia and MS-COCO (82,783 training images of 2014)",
        Path("kdmcse-bert-coco"),
        config={"multimodal_weight": 0.05},
        example="--captions annotations/captions_train2014.json --images train2014",
    ),
    "cc12m": DatasetPreset(
        "Wikipedia and a million pairs of CC12M (Appendix B; --subset-seed draws another subset)",
        Path("kdmcse-bert-cc12m"),
        # A crawl has holes: images that are gone or broken are the rule.
        extraction={"limit": 1_000_000, "on_error": "skip"},
        example="--captions 'cc12m/{00000..01242}.tar'",
    ),
}
"""The data sets of the paper by name; the weight is MCSE's where the paper prints none, see Appendix B for CC12M."""
