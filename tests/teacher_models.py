"""Small, randomly initialised models in the folder layouts of open_clip and of Hugging Face."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

IMAGE_SIZE = 32
CONTEXT_LENGTH = 24
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}


def make_tiny_open_clip(folder: Path, seed: int = 0) -> Path:
    """An open_clip model of 24 dimensions, to be named ``local-dir:folder``."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary_size = save_tokenizer(folder)
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": vocabulary_size, "width": 32, "heads": 2, "layers": 2}
    torch.manual_seed(seed)
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {**text, "hf_tokenizer_name": ".", "pool_type": "eos", "eos_id": 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    model = enlarge_weights(open_clip.create_model(f"local-dir:{folder}", load_weights=False))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def make_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """A ``CLIPModel`` of 20 dimensions with its processor and CLIP's own kind of tokenizer."""
    vocabulary = [end for byte in map(chr, range(33, 127)) for end in (byte, f"{byte}</w>")]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config={
            **tower,
            **special,
            "pad_token_id": special["eos_token_id"],
            "vocab_size": len(vocabulary),
            "max_position_embeddings": CONTEXT_LENGTH,
        },
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": 8},
        projection_dim=20,
    )
    enlarge_weights(CLIPModel(config)).save_pretrained(folder)
    CLIPTokenizer(vocab=numbers, merges=[]).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
    return folder


def make_tiny_multimodal(folder: Path, clip: Path) -> Path:
    """A ``CLIPModel`` as a sentence-transformers model of texts and images."""
    module = Transformer(str(clip), max_seq_length=CONTEXT_LENGTH)
    SentenceTransformer(modules=[module], device="cpu").save_pretrained(str(folder))
    return folder


def make_tiny_siglip(folder: Path, seed: int = 0) -> Path:
    """A ``SiglipModel`` of 32 dimensions, with a tokenizer of the same special tokens as the open_clip one."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary_size = save_tokenizer(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    config = SiglipConfig(
        text_config={
            **tower,
            "vocab_size": vocabulary_size,
            "max_position_embeddings": CONTEXT_LENGTH,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": 8},
    )
    enlarge_weights(SiglipModel(config)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> int:
    """Save a tokenizer of single letters; returns the size of its vocabulary."""
    vocabulary = [*SPECIAL.values(), *(token for byte in map(chr, range(33, 127)) for token in (byte, f"##{byte}"))]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT_LENGTH, **SPECIAL).save_pretrained(
        folder
    )
    return len(vocabulary)


def enlarge_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Make random weights so large that features differ clearly from image to image and from text to text."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                scale = 1.0 if "embedding" in name else parameter[0].numel() ** -0.5
                parameter.normal_(std=scale)
    return model
