"""Trains the small CLIP teacher of the demo on generated scenes and writes it as an open_clip ``local-dir:`` folder.

Example:
    python training/train_demo_teacher.py --output-dir st_kdmcse/demo/teacher
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import open_clip
import pandas as pd
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from st_kdmcse.cli.common import COUNT, NUMBER, SEED
from st_kdmcse.demo.scenes import (
    Scene,
    captions,
    edit_scene,
    make_pairs,
    make_scene_pairs,
    make_scenes,
    render,
    similarity,
)
from st_kdmcse.teachers import OpenCLIPTeacher

CONTEXT_LENGTH = 32
SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
BOS_ID, EOS_ID = 2, 3  # the trainer of the tokenizer numbers the special tokens in their order
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
MAX_LOGIT_SCALE = float(np.log(100))


@click.command()
@click.option("--output-dir", type=click.Path(path_type=Path), required=True, help="Folder of the teacher.")
@click.option("--steps", type=COUNT, default=2500, show_default=True, help="Training steps.")
@click.option(
    "--batch-size", type=COUNT, default=128, show_default=True, help="Scenes a step; half of them edit the other half."
)
@click.option("--learning-rate", type=NUMBER, default=1e-3, show_default=True, help="Peak of the one-cycle schedule.")
@click.option("--weight-decay", type=NUMBER, default=0.05, show_default=True, help="AdamW weight decay.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the weights and the scenes.")
def main(output_dir: Path, steps: int, batch_size: int, learning_rate: float, weight_decay: float, seed: int) -> None:
    """Trains the demo teacher and reports it on held-out scenes."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_config(output_dir, vocab_size=write_tokenizer(output_dir))

    torch.manual_seed(seed)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{output_dir}", load_weights=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{output_dir}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.08)
    loss_function = ClipLoss()
    model.train()
    progress = tqdm(range(steps), desc="Training")
    for step in progress:
        rng = np.random.default_rng((seed, step))
        scenes = draw_batch(batch_size, rng)
        images = torch.stack([preprocess(render(scene)) for scene in scenes])
        texts = tokenizer([captions(scene, 1, rng)[0] for scene in scenes])
        loss = loss_function(*model(images, texts))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        progress.set_postfix(loss=f"{loss.item():.3f}", scale=f"{model.logit_scale.exp().item():.1f}")

    weights = {  # in half precision; open_clip loads them into its float32 parameters
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, output_dir / "open_clip_model.safetensors", metadata={"format": "pt"})
    for name, value in evaluate(OpenCLIPTeacher(f"local-dir:{output_dir}")).items():
        print(f"{name}: {value:.3f}")


def write_tokenizer(output_dir: Path) -> int:
    """Writes a WordPiece tokenizer of the generator's words; returns the size of its vocabulary."""
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    texts = [caption for scene in make_scenes(5000, seed=0) for caption in captions(scene, 2, rng)]
    trainer = trainers.WordPieceTrainer(vocab_size=1000, special_tokens=list(SPECIAL_TOKENS.values()))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", BOS_ID), ("[EOS]", EOS_ID)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=CONTEXT_LENGTH, **SPECIAL_TOKENS
    ).save_pretrained(output_dir)
    return tokenizer.get_vocab_size()


def write_config(output_dir: Path, vocab_size: int) -> None:
    """Writes open_clip's configuration of the model; open_clip reads the tokenizer from the same folder."""
    model_config = {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "hf_tokenizer_name": ".",
            "width": 128,
            "heads": 4,
            "layers": 3,
            "pool_type": "eos",
            "eos_id": EOS_ID,
        },
    }
    config = {"model_cfg": model_config, "preprocess_cfg": PREPROCESS}
    (output_dir / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def draw_batch(batch_size: int, rng: np.random.Generator) -> list[Scene]:
    """Distinct scenes of the training split: one half random, one half their near neighbours as hard negatives."""
    scenes = dict.fromkeys(make_scenes(batch_size // 2, int(rng.integers(2**62))))
    anchors = list(scenes)
    while len(scenes) < batch_size:
        anchor = anchors[int(rng.integers(len(anchors)))]
        neighbour = edit_scene(anchor, int(rng.integers(1, 3)), rng)
        if neighbour.split == "train":
            scenes[neighbour] = None
    return list(scenes)


def evaluate(teacher: OpenCLIPTeacher, n_scenes: int = 200, n_pairs: int = 1000) -> dict[str, float]:
    """Recall of the right image among held-out scenes, and rank correlation of cosines with the gold similarity."""
    rng = np.random.default_rng(1)
    scenes = make_scenes(n_scenes, seed=1, split="heldout")
    image_features = teacher.encode_images([render(scene) for scene in scenes])
    text_features = teacher.encode_texts([captions(scene, 1, rng)[0] for scene in scenes])
    scores = F.normalize(torch.from_numpy(text_features)) @ F.normalize(torch.from_numpy(image_features)).T
    right = torch.arange(n_scenes)

    texts_a, texts_b, gold = zip(*make_pairs(n_pairs, seed=1), strict=True)
    scene_pairs = make_scene_pairs(n_pairs, seed=1)
    features_a, features_b = (torch.from_numpy(teacher.encode_texts(texts)) for texts in (texts_a, texts_b))
    features_b_image = torch.from_numpy(teacher.encode_images([render(scene) for _, scene in scene_pairs]))
    return {
        "text->image R@1": (scores.argmax(1) == right).float().mean().item(),
        "image->text R@1": (scores.argmax(0) == right).float().mean().item(),
        "text-text Spearman": spearman(F.cosine_similarity(features_a, features_b), gold),
        "text-image Spearman": spearman(
            F.cosine_similarity(features_a, features_b_image), [similarity(a, b) for a, b in scene_pairs]
        ),
    }


def spearman(predicted: torch.Tensor, gold: list[float] | tuple[float, ...]) -> float:
    """Rank correlation of two lists of N numbers."""
    return float(pd.Series(predicted.numpy()).corr(pd.Series(gold), method="spearman"))


if __name__ == "__main__":
    main()
