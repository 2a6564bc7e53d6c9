"""Fixtures that several test modules share."""

import os
import shutil
import socket
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: no test reaches for the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, RobertaConfig, RobertaModel

from st_kdmcse import FeatureStore, build_student


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets; a test that needs it is skipped where it is absent."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("ST_KDMCSE_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set ST_KDMCSE_DATA")
    return folder


collect_ignore = ["distributed_worker.py"]


def copy_tree(source: Path, target: Path) -> Path:
    """A copy of a folder, so that a test may change it."""
    return Path(shutil.copytree(source, target))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


WORDS = "a the two dog dogs man woman child runs plays sits on in of grass beach ball red blue small large snow".split()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """Folder of a real, small, randomly initialised BERT with its tokenizer, as a hub folder looks."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizerFast(vocab={token: number for number, token in enumerate([*special, *WORDS])})
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory, tiny_bert) -> Path:
    """The same for RoBERTa, of random weights and with 39 positions for tokens: the first one is padding's."""
    folder = tmp_path_factory.mktemp("tiny-roberta")
    tokenizer = BertTokenizerFast.from_pretrained(tiny_bert)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
        pad_token_id=0,
    )
    RobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def student(tiny_bert):
    """A fresh student of the tiny encoder, on the CPU."""
    torch.manual_seed(0)
    return build_student(str(tiny_bert)).to("cpu")


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """200 distinct sentences of the tiny vocabulary."""
    generator = np.random.default_rng(0)
    return sorted({" ".join(generator.choice(WORDS, size=6)) for _ in range(220)})[:200]


@pytest.fixture(scope="session")
def store(tmp_path_factory, sentences) -> FeatureStore:
    """A feature store of 24 images with three captions each, 8 dimensions."""
    generator = np.random.default_rng(1)
    images = generator.normal(size=(24, 8))
    rows = np.repeat(np.arange(24), 3)
    texts = images[rows] + 0.7 * generator.normal(size=(72, 8))
    return FeatureStore.from_arrays(
        tmp_path_factory.mktemp("store") / "features",
        (images / np.linalg.norm(images, axis=1, keepdims=True)).astype(np.float32),
        (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32),
        sentences[:72],
        rows,
        [f"{image}.jpg" for image in range(24)],
        teacher="random",
    )
