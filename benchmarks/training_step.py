"""Time and peak memory of a training step against the stock MultipleNegativesRankingLoss, in one run.

Encoder, batch, data and optimizer are the same for all; the steps of a round are taken in turn, in changing order, and
compared within the round, so that a drifting machine does not matter. The stock loss gets each sentence twice, which is
how SimCSE is trained with it. Peak memory is the allocator's on a GPU; on a CPU it is that of a separate process for
each kind of step, whole, so that the ratio includes interpreter, libraries and weights.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import nn
from tqdm import trange
from transformers import BertConfig, BertModel, BertTokenizerFast

from st_kdmcse import FeatureStore, KDMCSEConfig, KDMCSELoss, build_student
from st_kdmcse.processes import memory_mib

Step = Callable[[], None]
TEACHER_DIM = 512
IMAGES, CAPTIONS = 400, 5
PLAIN: dict[str, dict[str, Any]] = {"text": {}, "pair": {}}
OPTIONS: dict[str, dict[str, Any]] = {
    "text, consistency": {"consistency_weight": 1.0},
    "text, retention": {"retention_weight": 1.0},
    "pair, lists": {"list_weight": 1.0},
    "pair, lists by ListMLE": {"list_weight": 1.0, "list_loss": "listmle"},
    "pair, soft positives": {"same_image": "positive"},
    "pair, quantile margins and filter": {
        "soft_label_calibration": "quantile",
        "filter_calibration": "quantile",
        "image_threshold": 0.99,
        "text_threshold": 0.99,
    },
    "pair, grounded": {"multimodal_weight": 0.1, "list_weight": 1.0, "same_image": "positive"},
}


@click.command()
@click.option("--model", help="Encoder to use; without it, a BERT of --layers and --hidden with random weights.")
@click.option("--layers", default=6, show_default=True)
@click.option("--hidden", default=384, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--words", default=24, show_default=True, help="Words a sentence, of random length up to this.")
@click.option("--rounds", default=30, show_default=True)
@click.option("--options", is_flag=True, help="Compare steps with options beyond the paper, too.")
@click.option("--device", help="cuda or cpu; by default cuda where there is one.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the result.")
def main(
    model: str | None,
    layers: int,
    hidden: int,
    batch_size: int,
    words: int,
    rounds: int,
    options: bool,
    device: str | None,
    output: Path | None,
) -> None:
    """Compare a text step and a pair step of KDMCSE with the step of the stock loss."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batches = [random_sentences(batch_size, words, seed) for seed in range(rounds + 2)]
    student = make_student(model, layers, hidden, device)
    steps = {name: make_step(name, student, batches) for name in ("stock", *PLAIN, *(OPTIONS if options else ()))}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory = dict.fromkeys(steps, 0)
    for turn in trange(rounds + 2, desc="rounds", unit="round"):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken, peak = measure(steps[name], device)
            if turn >= 2:  # the first two warm up
                seconds[name].append(taken)
                memory[name] = max(memory[name], peak)
    if not device.startswith("cuda"):
        arguments = (model, layers, hidden, batches[:4])
        context = multiprocessing.get_context("spawn")
        for name in steps:
            with context.Pool(1) as pool:
                memory[name] = pool.apply(process_peak, (name, *arguments))
    result = report(seconds, memory, student, device, batch_size, words)
    click.echo(json.dumps(result, indent=2))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_student(model: str | None, layers: int, hidden: int, device: str) -> SentenceTransformer:
    """The same weights in every process."""
    torch.manual_seed(0)
    student = (build_student(model, pooling="cls") if model else random_student(layers, hidden)).to(device)
    student.train()
    return student


def make_step(name: str, student: SentenceTransformer, batches: list[list[str]]) -> Step:
    """A step by name: stock, or of :data:`PLAIN` or :data:`OPTIONS`."""
    if name == "stock":
        return stock_step(student, batches)
    return kdmcse_step(student, batches, name.startswith("pair"), KDMCSEConfig(**(PLAIN | OPTIONS)[name]))


def process_peak(name: str, model: str | None, layers: int, hidden: int, batches: list[list[str]]) -> int:
    """Peak resident bytes of a process that does nothing but take some steps of a kind (Linux)."""
    step = make_step(name, make_student(model, layers, hidden, "cpu"), batches)
    for _ in batches:
        step()
    return round(memory_mib() * 2**20)


def measure(step: Step, device: str) -> tuple[float, int]:
    """Seconds and peak bytes on the GPU of one step."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() if cuda else 0


def stock_step(student: SentenceTransformer, batches: list[list[str]]) -> Step:
    """A step of the stock loss: both columns hold the same sentences, each is tokenized and encoded."""
    loss = MultipleNegativesRankingLoss(student, scale=20)
    return training_step(loss, batches, lambda sentences: ([student.preprocess(sentences) for _ in range(2)], None))


def kdmcse_step(student: SentenceTransformer, batches: list[list[str]], pairs: bool, config: KDMCSEConfig) -> Step:
    """A step of KDMCSELoss on sentences alone, or on captions with rows of a feature store."""
    with tempfile.TemporaryDirectory() as folder:
        loss = KDMCSELoss(student, config, features=random_store(Path(folder) / "features")).to(student.device)
    generator = torch.Generator().manual_seed(1)

    def prepare(sentences: list[str]) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        rows = torch.randint(IMAGES * CAPTIONS, (len(sentences), 1), generator=generator)
        return [student.preprocess(sentences)], rows if pairs else None

    return training_step(loss, batches, prepare)


def random_store(path: Path) -> FeatureStore:
    """Features of random images, and of captions that lie near their image."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(IMAGES, TEACHER_DIM)).astype(np.float32)
    rows = np.repeat(np.arange(IMAGES), CAPTIONS)
    texts = images[rows] + generator.normal(size=(len(rows), TEACHER_DIM)).astype(np.float32)
    names = [f"{image}.jpg" for image in range(IMAGES)]
    captions = [f"caption {row}" for row in range(len(rows))]
    return FeatureStore.from_arrays(path, images, texts, captions, rows, names, teacher="random")


def training_step(loss: nn.Module, batches: list[list[str]], prepare: Callable[[list[str]], Any]) -> Step:
    """Tokenize, forward, backward, clip, update: what a trainer does at each step."""
    parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    queue = iter(batches)

    def step() -> None:
        columns, labels = prepare(next(queue))
        device = parameters[0].device
        moved = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in one.items()} for one in columns]
        value = loss(moved, labels.to(device) if labels is not None else None)
        total = torch.stack(list(value.values())).sum() if isinstance(value, dict) else value
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def report(
    seconds: dict[str, list[float]],
    memory: dict[str, int],
    student: SentenceTransformer,
    device: str,
    batch_size: int,
    words: int,
) -> dict[str, Any]:
    """Medians, and the median over the rounds of each ratio to the stock step."""

    def ratios(name: str, base: str = "stock") -> dict[str, float]:
        each = [mine / other for mine, other in zip(seconds[name], seconds[base], strict=True)]
        low, _, high = statistics.quantiles(each, n=4)
        return {"median": round(statistics.median(each), 4), "quartiles": [round(low, 4), round(high, 4)]}  # type: ignore[dict-item]

    config = student[0].auto_model.config
    return {
        "encoder": f"{config.model_type}, {config.num_hidden_layers} layers, hidden {config.hidden_size}",
        "batch_size": batch_size,
        "words": words,
        "rounds": len(seconds["stock"]),
        "median_ms": {name: round(1000 * statistics.median(values), 2) for name, values in seconds.items()},
        "time_ratio_to_stock": {name: ratios(name) for name in PLAIN},
        "time_ratio_to_plain": {name: ratios(name, name.split(",")[0]) for name in OPTIONS if name in seconds},
        "peak_mib": {name: round(value / 2**20, 1) for name, value in memory.items()},
        "peak_ratio_to_stock": {name: round(memory[name] / memory["stock"], 3) for name in PLAIN},
        "peak_ratio_to_plain": {
            name: round(memory[name] / memory[name.split(",")[0]], 3) for name in OPTIONS if name in seconds
        },
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "sentence-transformers", "st-kdmcse")},
        },
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def random_student(layers: int, hidden: int) -> SentenceTransformer:
    """A BERT of the given size with random weights and a vocabulary of numbered words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{number}" for number in range(3000))]
    with tempfile.TemporaryDirectory() as folder:
        BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
        BertModel(
            BertConfig(
                vocab_size=len(words),
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=hidden // 32,
                intermediate_size=4 * hidden,
            )
        ).save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=32)
    return SentenceTransformer(modules=[transformer, Pooling(hidden, "cls")])


def random_sentences(count: int, words: int, seed: int) -> list[str]:
    """Sentences of half to all of ``words`` words, so that padding occurs."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(words // 2, words + 1, size=count)
    return [" ".join(f"w{word}" for word in generator.integers(3000, size=length)) for length in lengths]


if __name__ == "__main__":
    main()
