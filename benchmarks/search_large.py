"""An index that is larger than memory: built from a stream within a limit, opened memory-mapped, and searched.

The corpus is real sentences encoded by all-MiniLM-L6-v2, filled up with noisy copies; queries are sentences that were
taken out of it before. Everything lies in --folder, about 3.3 KB of disk a row, and what is there is not made again: an
interrupted run goes on with the corpus where it was, and with what else it had begun from its beginning. Building and
searching run in processes of their own. Their memory is read many times a second: what the process has allocated
("anonymous"), and all that is resident, of which mapped pages are the system's to take back at any time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from search import K, Matrix, real_embeddings
from tqdm import tqdm

from st_kdmcse.cli.search_options import SizeType
from st_kdmcse.demo.run import minilm_folder
from st_kdmcse.encoding import load_model
from st_kdmcse.files import check_output_file, progress_bar, write_json
from st_kdmcse.processes import memory_mib
from st_kdmcse.provenance import provenance
from st_kdmcse.search.base import unit_rows
from st_kdmcse.search.factory import choose_factory, stays_on_disk
from st_kdmcse.search.model_check import model_header
from st_kdmcse.search.on_disk import EXACT
from st_kdmcse.search.storage import fill_index, is_index, read_index
from st_kdmcse.search.table import RowTable
from st_kdmcse.search.tuning import exact_search

BLOCK = 16_384


@click.command()
@click.option("--captions", type=click.Path(path_type=Path), help="results_20130124.token of Flickr30k.")
@click.option("--sentences", type=click.Path(path_type=Path), help="Sentences, one a line.")
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Folder of corpus and index.")
@click.option("--rows", default=10_000_000, show_default=True)
@click.option("--queries", "query_count", default=1000, show_default=True)
@click.option("--memory-limit", type=SizeType(), default="4GiB", show_default=True)
@click.option("--recall-target", default=0.95, show_default=True)
@click.option("--factory", help="':' is FAISS's ','.  [chosen by size]")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the result.")
def main(
    captions: Path | None,
    sentences: Path | None,
    folder: Path,
    rows: int,
    query_count: int,
    memory_limit: int,
    recall_target: float,
    factory: str | None,
    output: Path | None,
) -> None:
    """Measure build time, peak memory, time to open, and queries a second and recall cold and warm."""
    check_output_file(output)
    embeddings = real_embeddings(captions, sentences, folder)
    order = np.random.default_rng(0).permutation(len(embeddings))
    queries, real = embeddings[order[:query_count]], embeddings[order[query_count:]]
    corpus = Corpus(folder / f"corpus-{rows}.f32", rows, embeddings.shape[1])
    corpus.fill(real)
    del embeddings, real
    best_path = folder / f"best-{rows}-{query_count}.npy"
    if not best_path.is_file():
        np.save(best_path, exact_search(corpus, queries, K, show_progress_bar=True)[0])
    best = np.load(best_path)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        factory = factory and factory.replace(":", ",")
        built = pool.submit(build, folder, corpus, factory, memory_limit, recall_target).result()
    searched = {}
    for temperature in tqdm(("cold", "warm"), desc="Searching"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            searched[temperature] = pool.submit(search, folder / "index", corpus, queries, best, temperature).result()
    result = {
        "corpus": {"rows": rows, "dim": queries.shape[1]},
        "queries": query_count,
        "k": K,
        "memory_limit_mib": memory_limit >> 20,
        "build": built,
        "search": searched,
        **provenance(),
    }
    if output:
        write_json(output, result)
    click.echo(json.dumps(result, indent=2))


class Corpus:
    """Vectors in a file, read as they are needed, by a buffer and not a map, so that they count as nobody's memory.

    Args:
        path: the file.
        rows: how many.
        dim: width.
    """

    def __init__(self, path: Path, rows: int, dim: int) -> None:
        self.path = path
        self.shape = (rows, dim)

    def fill(self, real: Matrix) -> None:
        """Write what is missing: the real rows, then copies of them with noise, drawn by block."""
        rows, dim = self.shape
        width = 4 * dim * BLOCK
        done = self.path.stat().st_size // width if self.path.is_file() else 0
        with self.path.open("r+b" if done else "wb") as file, progress_bar(rows, "Corpus", "row") as progress:
            file.seek(done * width)
            file.truncate()
            progress.update(min(rows, done * BLOCK))
            for start in range(done * BLOCK, rows, BLOCK):
                numbers = np.arange(start, min(start + BLOCK, rows))
                noise = np.random.default_rng(start).normal(scale=0.5 / np.sqrt(dim), size=(len(numbers), dim))
                noise[numbers < len(real)] = 0
                file.write(unit_rows(real[numbers % len(real)] + noise).tobytes())
                progress.update(len(numbers))

    def __getitem__(self, wanted: Any) -> Matrix:
        rows, dim = self.shape
        numbers = np.arange(*wanted.indices(rows)) if isinstance(wanted, slice) else np.asarray(wanted)
        found = np.empty((len(numbers), dim), dtype=np.float32)
        blocks = numbers // BLOCK
        with self.path.open("rb") as file:
            for block in np.unique(blocks).tolist():
                here = blocks == block
                low, high = int(numbers[here].min()), int(numbers[here].max()) + 1
                file.seek(4 * dim * low)
                read = np.fromfile(file, dtype=np.float32, count=(high - low) * dim).reshape(-1, dim)
                found[here] = read[numbers[here] - low]
        return found


def build(folder: Path, corpus: Corpus, factory: str | None, memory_limit: int, recall_target: float) -> dict[str, Any]:
    """Build the index, unless it is there."""
    notes = folder / "build.json"
    if is_index(folder / "index") and notes.is_file():
        found: dict[str, Any] = json.loads(notes.read_text(encoding="utf-8"))
        return found
    rows, dim = corpus.shape
    if not stays_on_disk(rows, dim, factory, memory_limit, True if factory else None):
        raise click.UsageError("so many rows fit into --memory-limit: give less, or more rows")
    factory = factory or choose_factory(rows, dim).factory
    header = model_header(load_model(minilm_folder()), minilm_folder())
    for old in folder.glob("rows.sqlite*"):
        old.unlink()
    with watched() as memory:
        started = time.perf_counter()
        table = RowTable.create(folder / "rows.sqlite")
        with table.transaction(), progress_bar(rows, "Texts", "row") as progress:
            for start in range(0, rows, BLOCK):
                numbers = range(start, min(start + BLOCK, rows))
                names = [f"sentence {number}" for number in numbers]
                table.insert(numbers, names, names, [{}] * len(names))
                progress.update(len(names))
        texts_seconds = time.perf_counter() - started
        fill_index(folder / "index", corpus, table, header, factory, recall_target, memory_limit, exact=folder / EXACT)
        seconds = time.perf_counter() - started
    table.close()
    for old in folder.glob("rows.sqlite*"):
        old.unlink()
    backend, manifest = read_index(folder / "index")
    tuning = backend.tuning
    result = {
        "factory": factory,
        "seconds": round(seconds, 1),
        "of_which_texts": round(texts_seconds, 1),
        "peak_memory_mib": memory,
        "tuning": None if tuning is None else {**asdict(tuning), "met": tuning.met},
        "k_factor": manifest["on_disk"]["k_factor"],
        "files_mib": {name: known["bytes"] >> 20 for name, known in manifest["files"].items()},
    }
    write_json(notes, result)
    return result


def search(path: Path, corpus: Corpus, queries: Matrix, best: Matrix, temperature: str) -> dict[str, Any]:
    """Open the index, and search it for all queries; once where it is cold, again where it is warm."""
    if temperature == "cold":
        forget(path)
    with watched() as memory:
        started = time.perf_counter()
        backend, _ = read_index(path, mmap=True)
        opened = time.perf_counter() - started
        started = time.perf_counter()
        first = backend.search(queries[:1], K)
        milliseconds = 1000 * (time.perf_counter() - started)
        if temperature == "warm":
            backend.search(queries, K)
        started = time.perf_counter()
        hits = [*first, *backend.search(queries[1:], K)]
        seconds = time.perf_counter() - started
    rows = np.array([[int(hit.id.split()[1]) for hit in of_query] for of_query in hits])
    scores = np.einsum("qd,qkd->qk", queries, corpus[rows.ravel()].reshape(*rows.shape, -1))
    return {
        "open_seconds": round(opened, 3),
        "milliseconds_of_the_first_query": round(milliseconds, 1),
        "queries_per_second": round((len(queries) - 1) / seconds, 1),
        "recall_at_10": round(float((scores >= best[:, -1:] - 1e-5).mean()), 4),
        "peak_memory_mib": memory,
    }


def forget(path: Path) -> None:
    """Have the system drop what it keeps of the files in memory."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Peaks of the memory of this process while the block runs, beyond what it had before."""
    before, peaks, stop = memory_mib("RssAnon"), {"anonymous": 0, "resident": 0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peaks["anonymous"] = max(peaks["anonymous"], round(memory_mib("RssAnon")))
            peaks["resident"] = max(peaks["resident"], round(memory_mib("VmRSS")))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()
        peaks["anonymous_of_the_libraries"] = round(before)


if __name__ == "__main__":
    main()
