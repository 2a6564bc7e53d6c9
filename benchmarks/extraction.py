"""Images per second of an extraction against a plain open_clip loop, and its peak memory, in one run.

Both encode the same images and captions with the same weights, batch size, number of decoding processes and precision;
they take turns, and each round gives a ratio. Where the precision is not float32, a plain loop in float32 takes part
too. The plain loop is what one would write by hand: a DataLoader of files, a loop over captions, numpy.save. The
extraction does all that it does for a user: parts, checksums, the joined store. Peak memory is measured in a separate
process, for a small and for a large data set (the same files under other names).
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import open_clip
import torch
from PIL import Image
from ratios import spread
from torch.utils.data import DataLoader, Dataset
from tqdm import trange

from st_kdmcse.data import CaptionsCSV
from st_kdmcse.extraction import extract
from st_kdmcse.extraction.options import default_workers
from st_kdmcse.precision import autocast
from st_kdmcse.processes import memory_mib
from st_kdmcse.teachers import OpenCLIPTeacher

CAPTIONS = 5
IN_FLOAT32 = "plain loop, float32"
SMALL_MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@click.command()
@click.option("--images", type=click.Path(path_type=Path), help="Folder of images to repeat; generated without it.")
@click.option("--model", default="small", show_default=True, help="open_clip model, or small; with random weights.")
@click.option("--count", default=1000, show_default=True, help="Images a round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--workers", default=default_workers(), show_default=True)
@click.option(
    "--memory",
    type=int,
    nargs=2,
    default=(1000, 20_000),
    show_default=True,
    help="Images, few and many; 0 0 does not measure it.",
)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the result.")
def main(
    images: Path | None,
    model: str,
    count: int,
    rounds: int,
    batch_size: int,
    workers: int,
    memory: tuple[int, int],
    output: Path | None,
) -> None:
    """Compare the extraction with a plain open_clip loop."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = sorted(images.glob("*.jpg")) if images else generated_images(folder / "generated")
        result = {
            **speed(folder, files, model, count, rounds, batch_size, workers),
            "memory": peak_memory(folder, files, memory, batch_size, workers) if memory[0] else None,
            "images": "real files" if images else "generated",
            "versions": {
                "python": platform.python_version(),
                **{package: version(package) for package in ("torch", "open_clip_torch", "st-kdmcse")},
            },
            "date": datetime.now(timezone.utc).date().isoformat(),
        }
    click.echo(json.dumps(result, indent=2))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def speed(
    folder: Path, files: Sequence[Path], model: str, count: int, rounds: int, batch_size: int, workers: int
) -> dict[str, Any]:
    """Images per second of both, and the ratio of each round."""
    teacher, weights = make_teacher(folder, model, batch_size)
    captions = make_data_set(folder / "speed", files, count)
    reader = CaptionsCSV(captions, captions.parent / "Images")
    loops = {"plain loop": PlainLoop(model, weights, batch_size, workers, teacher, teacher.precision)}
    if teacher.precision != "float32":
        loops[IN_FLOAT32] = PlainLoop(model, weights, batch_size, workers, teacher, "float32")
    seconds: dict[str, list[float]] = {name: [] for name in ("extraction", *loops)}
    for turn in trange(rounds + 1, desc="rounds", unit="round"):
        for which in list(seconds) if turn % 2 else list(seconds)[::-1]:
            target = folder / "result"
            started = time.perf_counter()
            if which == "extraction":
                extract(reader, teacher, target, workers=workers, show_progress_bar=False)
            else:
                loops[which].run(captions, target)
            if turn:  # the first one warms up
                seconds[which].append(time.perf_counter() - started)
            shutil.rmtree(target)
    return {
        "model": f"{model}, random weights",
        "device": torch.cuda.get_device_name()
        if teacher.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "precision": teacher.precision,
        "batch_size": batch_size,
        "workers": workers,
        "images_a_round": count,
        "captions_an_image": CAPTIONS,
        "rounds": rounds,
        "images_per_second": {name: round(count / statistics.median(each), 2) for name, each in seconds.items()},
        "ratio_to": {name: spread(seconds["extraction"], seconds[name]) for name in loops},
    }


def make_teacher(folder: Path, model: str, batch_size: int) -> tuple[OpenCLIPTeacher, Path]:
    """A teacher of random weights, and its checkpoint."""
    torch.manual_seed(0)
    weights = folder / f"{model}.pt"
    name = model
    if model == "small":
        config = folder / "small.json"
        config.write_text(json.dumps(SMALL_MODEL), encoding="utf-8")
        open_clip.add_model_config(config)
        name = str(config)
    torch.save(open_clip.create_model(model).state_dict(), weights)
    return OpenCLIPTeacher(name, str(weights), batch_size=batch_size), weights


class Files(Dataset[torch.Tensor]):
    """Image files, preprocessed."""

    def __init__(self, paths: Sequence[Path], preprocess: Any) -> None:
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels: torch.Tensor = self.preprocess(Image.open(self.paths[index]))
        return pixels


class PlainLoop:
    """Encoding with open_clip as one would write it by hand."""

    def __init__(
        self, model: str, weights: Path, batch_size: int, workers: int, teacher: OpenCLIPTeacher, precision: str
    ) -> None:
        self.model, self.preprocess = open_clip.create_model_from_pretrained(model, str(weights))
        self.device = teacher.device
        self.model.eval().to(self.device)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.batch_size, self.workers = batch_size, workers
        self.autocast = autocast(precision, self.device)

    @torch.inference_mode()
    def run(self, captions: Path, target: Path) -> None:
        """Encode a data set and save two arrays."""
        with captions.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        paths = [captions.parent / "Images" / name for name in dict.fromkeys(row["image"] for row in rows)]
        pin = self.device.type == "cuda"
        files = Files(paths, self.preprocess)
        loader = DataLoader(files, self.batch_size, num_workers=self.workers, pin_memory=pin)
        features: dict[str, list[Any]] = {"image": [], "text": []}
        with self.autocast:
            for pixels in loader:
                encoded = self.model.encode_image(pixels.to(self.device, non_blocking=True))
                features["image"].append(encoded.float().cpu().numpy())
            for start in range(0, len(rows), self.batch_size):
                tokens = self.tokenizer([row["caption"] for row in rows[start : start + self.batch_size]])
                features["text"].append(self.model.encode_text(tokens.to(self.device)).float().cpu().numpy())
        target.mkdir()
        for name, parts in features.items():
            np.save(target / f"{name}.npy", np.concatenate(parts).astype(np.float16))


def peak_memory(
    folder: Path, files: Sequence[Path], counts: Sequence[int], batch_size: int, workers: int
) -> dict[str, Any]:
    """Peak resident memory of an extraction with a small model, by the number of images (Linux)."""
    peaks = {}
    for count in counts:
        captions = make_data_set(folder / f"memory-{count}", files, count)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks[count] = pool.submit(process_peak, folder, captions, batch_size, workers).result()
    small, large = (peaks[count]["process_mib"] for count in counts)
    return {"peaks": {str(count): peak for count, peak in peaks.items()}, "ratio": round(large / small, 4)}


def process_peak(folder: Path, captions: Path, batch_size: int, workers: int) -> dict[str, float]:
    """Peak resident memory of this process and of its largest worker after an extraction."""
    teacher, _ = make_teacher(folder, "small", batch_size)
    reader = CaptionsCSV(captions, captions.parent / "Images")
    started = time.perf_counter()
    extract(reader, teacher, captions.parent / "features", workers=workers, show_progress_bar=True)
    seconds = time.perf_counter() - started
    peak = memory_mib()
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "process_mib": round(peak, 1),
        "largest_worker_mib": round(children / 2**10, 1),
        "seconds": round(seconds, 1),
    }


def make_data_set(folder: Path, files: Sequence[Path], count: int) -> Path:
    """Links to ``count`` images, files repeated under other names, with five captions each; returns the CSV file."""
    (folder / "Images").mkdir(parents=True)
    words = np.random.default_rng(0).choice(["two", "dogs", "run", "along", "a", "wide", "sandy", "beach"], (64, 10))
    with (folder / "captions.txt").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number in range(count):
            source = files[number % len(files)].resolve()
            name = f"{number:07d}{source.suffix}"
            (folder / "Images" / name).symlink_to(source)
            for caption in range(CAPTIONS):
                writer.writerow([name, f"{number} {' '.join(words[(number + caption) % 64])} ."])
    return folder / "captions.txt"


def generated_images(folder: Path, count: int = 64) -> list[Path]:
    """Smooth noise as JPEG, of the size of a photograph of Flickr."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        noise = generator.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((500, 375)).save(folder / f"{number:03d}.jpg")
    return sorted(folder.iterdir())


if __name__ == "__main__":
    main()
