"""The whole training loop at real shapes, beside the stock trainer and a loop in the style of research code.

Each contestant trains in its own process, with the same encoder, sentences, pairs, batch size, learning rate and
evaluation; rounds alternate, so that a drifting machine does not matter. What is timed are whole runs of the trainer
after some steps to warm up: data, steps, logging and evaluation, without loading and saving. Times by phase come from a
further, shorter run in which the device is waited for after each phase.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    PreTrainedConfig,
    RobertaConfig,
    TrainerCallback,
    set_seed,
)

from st_kdmcse import FeatureStore, KDMCSELoss, KDMCSETrainer, read_sentences
from st_kdmcse.data import STSPairs, load_sts_benchmark
from st_kdmcse.evaluation.similarity import TokenizedSimilarityEvaluator
from st_kdmcse.files import check_output_file, write_json
from st_kdmcse.precision import bfloat16_is_faster
from st_kdmcse.processes import memory_mib
from st_kdmcse.provenance import provenance
from st_kdmcse.training.schedule import StepRatioBatchSampler


@dataclass(frozen=True)
class Options:
    """What of our own training is on; None is what a user gets without asking."""

    unpad: bool | None = None
    pretokenize: bool = True
    tokenized_evaluator: bool = True
    features_on_device: bool = True
    fast_dropout: bool = True
    group_by_length: bool = False
    bf16: bool = True
    compile_mode: str | None = None


OURS = {
    "st_kdmcse": Options(),
    "st_kdmcse, padded": Options(unpad=False),
    "st_kdmcse, padded, grouped by length": Options(unpad=False, group_by_length=True),
    "st_kdmcse, dropout of PyTorch": Options(fast_dropout=False),
    "st_kdmcse, unpadded": Options(unpad=True),
    "st_kdmcse, tokenized by step": Options(pretokenize=False),
    "st_kdmcse, stock evaluator": Options(tokenized_evaluator=False),
    "st_kdmcse, features on disk": Options(features_on_device=False),
    "st_kdmcse, float32": Options(bf16=False),
    "st_kdmcse, compiled": Options(compile_mode="default"),
    "st_kdmcse, CUDA graphs": Options(compile_mode="reduce-overhead"),
    "st_kdmcse, none of it": Options(False, False, False, False, False, bf16=False),
}
CONTESTANTS = (*OURS, "stock trainer", "stock trainer, bf16", "research style")
# On a CPU features stay on disk and padding is left out anyway.
CUDA_ONLY = ("unpadded", "on disk", "compiled", "graphs")
WITH_BFLOAT16 = ("float32", "bf16")
PHASES = ("data", "forward", "backward", "optimizer", "evaluation")
_MATRIX = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Settings:
    """What all contestants share."""

    encoder: str
    tokenizer: str
    layers: int
    hidden: int
    text: str
    features: str
    eval_data: str | None
    batch_size: int
    steps: int
    warmup: int
    eval_steps: int
    pair_every: int | None
    device: str
    folder: str


@click.command()
@click.option("--encoder", type=click.Choice(["bert", "roberta"]), default="bert", show_default=True)
@click.option("--tokenizer", help="Folder or hub name of a tokenizer.  [that of all-MiniLM-L6-v2]")
@click.option("--layers", default=12, show_default=True)
@click.option("--hidden", default=768, show_default=True)
@click.option("--text", required=True, help="Sentences, one a line.")
@click.option("--features", required=True, help="Feature store of the pairs.")
@click.option("--eval-data", help="SentEval directory with STS-B; without it there is no evaluation.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--steps", default=2000, show_default=True, help="Of each run that is timed.")
@click.option("--warmup", default=50, show_default=True, help="First steps, which do not count.")
@click.option("--eval-steps", default=125, show_default=True)
@click.option("--pair-every", type=int, help="Steps from one pair batch to the next.  [by the sizes]")
@click.option("--rounds", default=2, show_default=True)
@click.option(
    "--only", multiple=True, type=click.Choice(CONTESTANTS), help="Contestants; repeat it for several.  [all]"
)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the result.")
def main(tokenizer: str | None, rounds: int, only: tuple[str, ...], output: Path | None, **options: Any) -> None:
    """Measure steps and tokens a second, use of the hardware, times by phase, and peak memory."""
    check_output_file(output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [name for name in CONTESTANTS if name in only or not only]
    if device == "cpu":
        left_out = CUDA_ONLY if bfloat16_is_faster(device) else CUDA_ONLY + WITH_BFLOAT16
        names = [name for name in names if not name.endswith(left_out) or name in only]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(tokenizer=tokenizer or minilm(), device=device, folder=folder, **options)
        for turn in tqdm(range(rounds), desc="Rounds"):
            for name in tqdm(names[turn % len(names) :] + names[: turn % len(names)], desc="Contestants", leave=False):
                runs[name].append(in_a_process(contest, name, settings, profile=False))
                tqdm.write(f"{name}: {json.dumps(runs[name][-1])}")
        phases = {name: in_a_process(contest, name, settings, profile=True)["phases"] for name in names}
    result = {
        "settings": named(settings),
        "contestants": summary(runs, phases),
        "matrix_product_tflops": {kind: round(measured_tflops(device, kind), 3) for kind in kinds(device)},
        **provenance(),
    }
    click.echo(json.dumps(result, indent=2))
    if output:
        write_json(output, result)


def named(settings: Settings) -> dict[str, Any]:
    """The settings for the result, with the names of files and folders and not where they are."""
    shown = {**asdict(settings), "folder": None}
    for name in ("tokenizer", "text", "features", "eval_data"):
        shown[name] = shown[name] and Path(shown[name]).name
    return shown


def summary(runs: Mapping[str, list[dict[str, Any]]], phases: Mapping[str, Any]) -> dict[str, Any]:
    """Medians over the rounds, and the ratio of each round to the first contestant's."""
    first = next(iter(runs))
    found: dict[str, Any] = {}
    for name, each in runs.items():
        pairs = zip(runs[first], each, strict=True)
        ratios = [mine["steps_per_second"] / other["steps_per_second"] for mine, other in pairs]
        found[name] = {key: statistics.median(run[key] for run in each) for key in each[0] if key != "phases"}
        found[name][f"times_as_slow_as_{first}"] = round(statistics.median(ratios), 3)
        found[name]["range"] = [round(min(ratios), 3), round(max(ratios), 3)]
        found[name]["milliseconds_a_step_by_phase"] = phases[name]
    return found


def in_a_process(function: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> dict[str, Any]:
    """Run a function in a new process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, started=time.time(), **options).result()


def contest(name: str, settings: Settings, profile: bool, started: float) -> dict[str, Any]:
    """One run of a contestant."""
    set_seed(0)
    model = make_student(settings.encoder, settings.tokenizer, settings.layers, settings.hidden).to(settings.device)
    clock = Clock(settings, started, profile)
    dev = load_sts_benchmark(settings.eval_data, "dev") if settings.eval_data else None
    if name == "research style":
        clock.count_tokens(model)
        research_loop(model, dev, settings, clock)
    else:
        trainer = make_trainer(name, model, dev, settings, clock)
        if trainer.args.torch_compile:
            clock.count_tokens_of_two_views(trainer.loss)
        else:
            clock.count_tokens(model)
        clock.watch(trainer)
        with without_defaults(OURS.get(name)):
            trainer.train()
    return clock.result(model)


@contextmanager
def without_defaults(ours: Options | None) -> Iterator[None]:
    """Replace what the trainer has no option for: the masks of dropout, and the batches."""
    with ExitStack() as stack:
        if ours and not ours.fast_dropout:  # one random number an element, as in any other code
            stack.enter_context(patch("st_kdmcse.dropout.dropout", F.dropout))
            stack.enter_context(patch("st_kdmcse.upstream.fast_dropout", F.dropout))
        if ours and ours.group_by_length:
            stack.enter_context(patch("st_kdmcse.training.trainer.StepRatioBatchSampler", GroupedByLength))
        yield


class GroupedByLength(StepRatioBatchSampler):
    """Batches of sentences of similar length, from groups of 50 batches, as transformers groups them."""

    def _stream(self, source: int) -> Iterator[list[int]]:
        lengths = [len(text) for dataset in self.dataset.datasets for text in dataset["sentence"]]
        batches = super()._stream(source)
        while True:
            group = sorted(chain.from_iterable(islice(batches, 50)), key=lengths.__getitem__)
            cut = [group[start : start + self.batch_size] for start in range(0, len(group), self.batch_size)]
            random.Random(self.seed).shuffle(cut)
            yield from cut


def make_student(encoder: str, tokenizer_name: str, layers: int, hidden: int) -> SentenceTransformer:
    """BERT or RoBERTa of the given size with random weights; its dropout is that of the published models."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 64),
        "intermediate_size": 4 * hidden,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config: PreTrainedConfig = BertConfig(**sizes) if encoder == "bert" else RobertaConfig(**sizes)
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=32)
    return SentenceTransformer(modules=[transformer, Pooling(hidden, "cls")])


def make_trainer(
    name: str, model: SentenceTransformer, dev: STSPairs | None, settings: Settings, clock: Clock
) -> SentenceTransformerTrainer:
    """The trainer of a contestant: ours as `train` sets it up, or the stock one at its defaults."""
    ours = OURS.get(name)
    cuda = settings.device == "cuda"
    arguments = SentenceTransformerTrainingArguments(
        output_dir=settings.folder,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=3e-5,
        lr_scheduler_type="linear",
        bf16=bfloat16_is_faster(settings.device) and (ours.bf16 if ours else name.endswith("bf16")),
        use_cpu=not cuda,
        torch_compile=bool(ours and ours.compile_mode),
        torch_compile_mode=ours.compile_mode if ours else None,
        seed=0,
        eval_strategy="steps" if dev else "no",
        eval_steps=settings.eval_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(
            {"logging_steps": 25, "logging_nan_inf_filter": False, "accelerator_config": {"non_blocking": cuda}}
            if ours
            else {}
        ),
    )
    evaluates = TokenizedSimilarityEvaluator if ours and ours.tokenized_evaluator else EmbeddingSimilarityEvaluator
    evaluator = evaluates(dev.sentences1, dev.sentences2, dev.scores, name="sts-dev") if dev else None
    texts = read_sentences(settings.text)
    if not ours:
        both = Dataset.from_dict({"anchor": texts["sentence"][:], "positive": texts["sentence"][:]})
        loss = MultipleNegativesRankingLoss(model)
        return SentenceTransformerTrainer(model, arguments, both, loss=loss, evaluator=evaluator, callbacks=[clock])
    store = FeatureStore.open(settings.features)
    grounded = KDMCSELoss(model, features=store)
    grounded.keep_features_on_device = ours.features_on_device
    return KDMCSETrainer(
        model,
        arguments,
        DatasetDict(text=texts, pairs=store.dataset()),
        loss=grounded,
        evaluator=evaluator,
        callbacks=[clock],
        pair_every=settings.pair_every,
        pretokenize=ours.pretokenize,
        pad_to_multiple_of=8 if ours.compile_mode else 1,
        unpad=ours.unpad,
        token_cache=settings.folder,
    )


def research_loop(model: SentenceTransformer, dev: STSPairs | None, settings: Settings, clock: Clock) -> None:
    """KDMCSE as research code has it: float32, tokenized by the collator, inputs repeated, a look at each loss."""
    texts = read_sentences(settings.text)["sentence"][:]
    store = FeatureStore.open(settings.features)
    loss = KDMCSELoss(model, teacher_dim=store.dim)
    captions = [caption for _, caption in store.captions()]
    every = settings.pair_every or max(2, -(-len(texts) // len(captions)))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=3e-5, foreach=False)
    tokenizer = model.tokenizer
    generator = np.random.default_rng(0)
    evaluator = (
        EmbeddingSimilarityEvaluator(dev.sentences1, dev.sentences2, dev.scores, name="sts-dev") if dev else None
    )
    model.train()
    clock.begin()
    for step in range(1, settings.steps + 1):
        pairs = step % every == 0
        rows = generator.integers(len(captions) if pairs else len(texts), size=settings.batch_size)
        sentences = [(captions if pairs else texts)[row] for row in rows]
        tokens = tokenizer(
            [text for text in sentences for _ in range(2)],
            padding="max_length",
            truncation=True,
            max_length=32,
            return_tensors="pt",
        )
        features = {name: value.to(settings.device) for name, value in tokens.items()}
        teacher = {}
        if pairs:
            batch = store.gather(rows)
            teacher = {
                "image_features": torch.from_numpy(batch.image_features).float().to(settings.device),
                "text_features": torch.from_numpy(batch.text_features).float().to(settings.device),
            }
        clock.mark("data")
        views = model(features)["sentence_embedding"].view(settings.batch_size, 2, -1)
        value: Tensor = loss.compute_loss_from_embeddings((views[:, 0], views[:, 1]), **teacher).total
        clock.mark("forward")
        value.backward()
        clock.mark("backward")
        torch.nn.utils.clip_grad_norm_(list(loss.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value.item()
        clock.mark("optimizer")
        if evaluator and step % settings.eval_steps == 0:
            evaluator(model)
            model.train()
            clock.mark("evaluation")
        clock.step_done(step)


class Clock(TrainerCallback):
    """Times steps, and the phases of each where it profiles."""

    def __init__(self, settings: Settings, started: float, profile: bool) -> None:
        self._settings, self._started, self._profile = settings, started, profile
        self._cuda = settings.device == "cuda"
        self._phases = dict.fromkeys(PHASES, 0.0)
        self._real = torch.zeros((), dtype=torch.long, device=settings.device)
        self._computed = 0
        self._mark = self._since = time.perf_counter()
        self._first_step = self._seconds = 0.0
        self._steps = 0

    def begin(self) -> None:
        """Now the run begins."""
        self._mark = time.perf_counter()

    def mark(self, phase: str) -> None:
        """A phase is over."""
        if self._profile:
            now = self._now()
            self._phases[phase] += now - self._mark
            self._mark = now

    def step_done(self, step: int) -> None:
        """A step is over."""
        if step == 1:
            self._now()
            self._first_step = time.time() - self._started
        if step == self._settings.warmup:
            self._since = self._mark = self._now()
            self._phases = dict.fromkeys(PHASES, 0.0)
            self._real, self._computed = torch.zeros_like(self._real), 0
        if step == self._settings.steps:
            self._seconds = self._now() - self._since
            self._steps = step - self._settings.warmup

    def count_tokens(self, model: SentenceTransformer) -> None:
        """Count the tokens that go in, and those that the encoder computes, in training."""

        def count_real(module: Any, arguments: tuple[dict[str, Tensor], ...]) -> None:
            if module.training:
                self._real += arguments[0]["attention_mask"].sum()

        def count_computed(module: Any, arguments: tuple[Tensor, ...]) -> None:
            if module.training:
                self._computed += arguments[0].numel()

        model[0].register_forward_pre_hook(count_real)
        model[0].auto_model.get_input_embeddings().register_forward_pre_hook(count_computed)

    def count_tokens_of_two_views(self, loss: torch.nn.Module) -> None:
        """The same for a compiled encoder, which computes padding; counting inside would compile it again each time."""

        def count(module: Any, arguments: tuple[Any, ...]) -> None:
            if module.training:
                for column in arguments[0]:
                    self._real += 2 * column["attention_mask"].sum()
                    self._computed += 2 * column["input_ids"].numel()

        loss.register_forward_pre_hook(count)

    def watch(self, trainer: Any) -> None:
        """Have a trainer tell when its phases are over."""
        for owner, name, before, after in (
            (trainer, "compute_loss", "data", "forward"),
            (trainer.accelerator, "backward", None, "backward"),
            (trainer, "_evaluate", None, "evaluation"),
        ):
            self._wrap(owner, name, before, after)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin."""
        self.begin()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer has made its step."""
        self.mark("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step of a trainer is over."""
        self.step_done(state.global_step)

    def result(self, model: SentenceTransformer) -> dict[str, Any]:
        """Figures of the steps after the first ones."""
        real, computed = int(self._real), self._computed
        layers = sum(value.numel() for name, value in model.named_parameters() if "embeddings." not in name)
        flops = 6 * layers / self._seconds / 1e12
        return {
            "steps_per_second": round(self._steps / self._seconds, 3),
            "real_tokens_per_second": round(real / self._seconds),
            "padding_share": round(1 - real / max(computed, 1), 4),
            "model_tflops_real_tokens": round(flops * real, 4),
            "model_tflops_computed_tokens": round(flops * computed, 4),
            "seconds_to_first_step": round(self._first_step, 1),
            "peak_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20 if self._cuda else memory_mib()),
            "phases": {name: round(1000 * value / self._steps, 2) for name, value in self._phases.items()},
        }

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _wrap(self, owner: Any, name: str, before: str | None, after: str) -> None:
        function = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            if before:
                self.mark(before)
            result = function(*arguments, **options)
            self.mark(after)
            return result

        setattr(owner, name, timed)


def kinds(device: str) -> list[str]:
    """Types of numbers that matter on a device."""
    return ["float32", "bfloat16"] if bfloat16_is_faster(device) else ["float32"]


def measured_tflops(device: str, kind: str) -> float:
    """What a large matrix product reaches: a roof that is measured, not read off a data sheet."""
    size = _MATRIX[device]
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, kind)) for _ in range(2))
    seconds = []
    with torch.inference_mode():
        for _ in range(5):
            started = time.perf_counter()
            torch.mm(a, b)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds) / 1e12


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2, for its tokenizer."""
    from st_kdmcse.demo.run import minilm_folder

    return minilm_folder()


if __name__ == "__main__":
    main()
