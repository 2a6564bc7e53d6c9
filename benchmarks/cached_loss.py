"""Peak memory and time of a step of CachedKDMCSELoss against KDMCSELoss at growing batch sizes, in one run.

Each measurement runs in its own process and takes steps on pair batches only: tokens and features are
ready, and the student has random weights. Peak memory is the allocator's on a GPU. On a CPU (Linux) it is that of the
process: whole, and what the steps added to interpreter, libraries and weights.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import click
import torch
from tqdm import tqdm
from training_step import TEACHER_DIM, random_sentences, random_student

from st_kdmcse import CachedKDMCSELoss, KDMCSELoss
from st_kdmcse.files import check_output_file, write_json
from st_kdmcse.processes import memory_mib
from st_kdmcse.provenance import device_name, versions


@click.command()
@click.option("--batch-size", "batch_sizes", type=int, multiple=True, default=(64, 128, 256), show_default=True)
@click.option("--mini-batch-size", default=32, show_default=True)
@click.option("--chunk-rows", default=512, show_default=True)
@click.option("--layers", default=6, show_default=True)
@click.option("--hidden", default=384, show_default=True)
@click.option("--words", default=24, show_default=True, help="Words a sentence, of random length up to this.")
@click.option("--steps", default=2, show_default=True, help="Steps of a process; the first one is not timed.")
@click.option("--device", help="cuda or cpu; by default cuda where there is one.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the result.")
def main(batch_sizes: tuple[int, ...], device: str | None, output: Path | None, **options: int) -> None:
    """Compare the cached loss with the plain one; a batch that does not fit on the GPU is null in the result."""
    check_output_file(output)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for batch_size in tqdm(batch_sizes, desc="batch sizes"):
        plain, cached = (in_own_process(cached, batch_size, device, options) for cached in (False, True))
        rows.append(
            {"batch_size": batch_size, "plain": plain, "cached": cached, "cached_to_plain": ratios(plain, cached)}
        )
    result = {
        "encoder": f"bert, {options['layers']} layers, hidden {options['hidden']}",
        **options,
        "rows": rows,
        "device": device_name(torch.device(device)),
        "versions": versions(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    click.echo(json.dumps(result, indent=2))
    if output:
        write_json(output, result)


def in_own_process(cached: bool, batch_size: int, device: str, options: dict[str, int]) -> dict[str, float] | None:
    """What :func:`measure` says in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, cached, batch_size, device, **options).result()


def measure(
    cached: bool,
    batch_size: int,
    device: str,
    *,
    mini_batch_size: int,
    chunk_rows: int,
    layers: int,
    hidden: int,
    words: int,
    steps: int,
) -> dict[str, float] | None:
    """Median seconds of a step and peak memory in MiB, None if the GPU's memory does not suffice."""
    torch.manual_seed(0)
    student = random_student(layers, hidden).to(device).train()
    loss = (
        CachedKDMCSELoss(student, mini_batch_size=mini_batch_size, chunk_rows=chunk_rows)
        if cached
        else KDMCSELoss(student)
    )
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-6)
    tokens = student.preprocess(random_sentences(batch_size, words, seed=0))
    features = {name: value.to(device) for name, value in tokens.items() if isinstance(value, torch.Tensor)}
    labels = torch.randn(batch_size, 2 * TEACHER_DIM, device=device)
    seconds = []
    before = peak_mib(device)
    try:
        for _ in range(steps):
            started = time.perf_counter()
            loss([features], labels).total.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        return None
    peak = peak_mib(device)
    return {
        "seconds": round(statistics.median(seconds[1:] or seconds), 3),
        "peak_mib": round(peak, 1),
        "added_mib": round(peak - before, 1),
    }


def peak_mib(device: str) -> float:
    """Peak memory of this process so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return memory_mib()


def ratios(plain: dict[str, float] | None, cached: dict[str, float] | None) -> dict[str, float] | None:
    """The cached loss's measures by the plain one's, where both fit."""
    return {name: round(cached[name] / plain[name], 3) for name in plain} if plain and cached else None


if __name__ == "__main__":
    main()
