"""Search with each kind of index, beside ``sentence_transformers.util.semantic_search`` on the same embeddings.

The corpus is real sentences encoded by all-MiniLM-L6-v2; beyond them, copies with a little noise fill it up. Queries
are sentences that were taken out of it. Each index is built, tuned to the recall and searched in its own process,
so that its peak memory is its own; what is timed is a search from query embeddings to texts.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers.util import semantic_search
from tqdm import tqdm

from st_kdmcse.data import FlickrTokens, iter_sentences
from st_kdmcse.demo.run import minilm_folder
from st_kdmcse.encoding import encode_distinct, load_model
from st_kdmcse.files import check_output_file, write_json
from st_kdmcse.processes import memory_mib
from st_kdmcse.provenance import provenance
from st_kdmcse.search import FaissBackend
from st_kdmcse.search.base import NewRows, unit_rows
from st_kdmcse.search.faiss_library import load_faiss

Matrix = npt.NDArray[np.float32]

K = 10
ROUNDS = 3


@click.command()
@click.option("--captions", type=click.Path(path_type=Path), help="results_20130124.token of Flickr30k.")
@click.option("--sentences", type=click.Path(path_type=Path), help="Sentences, one a line.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps the embeddings for the next time.")
@click.option("--rows", type=int, help="Fill up with noisy copies to so many.  [only the sentences]")
@click.option("--queries", "query_count", default=1000, show_default=True)
@click.option(
    "--factories",
    default="auto,Flat,HNSW32,IVF2048:Flat,IVF2048:PQ48np",
    show_default=True,
    help="':' is FAISS's ','; auto is chosen by size.",
)
@click.option(
    "--recall-target",
    default=0.96,
    show_default=True,
    help="Recall to tune the index to; the recall is then measured on other queries.",
)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the result.")
def main(
    captions: Path | None,
    sentences: Path | None,
    cache: Path | None,
    rows: int | None,
    query_count: int,
    factories: str,
    recall_target: float,
    output: Path | None,
) -> None:
    """Measure queries a second, recall, build time, memory and file size of each index."""
    check_output_file(output)
    with tempfile.TemporaryDirectory() as name:
        folder = cache or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        texts = list(dict.fromkeys(read_texts(captions, sentences)))
        path = folder / f"embeddings-{len(texts)}.npy"
        if not path.exists():
            model = load_model(minilm_folder())
            np.save(path, unit_rows(encode_distinct(model, texts, show_progress_bar=True).matrix))
        corpus_path, queries = split(np.load(path), query_count, rows or 0, Path(name))
        corpus = np.load(corpus_path, mmap_mode="r")
        result: dict[str, Any] = {
            "corpus": {"rows": len(corpus), "dim": corpus.shape[1], "real_sentences": len(texts) - query_count},
            "queries": query_count,
            "k": K,
            "recall_target": recall_target,
            "semantic_search": peer(corpus, queries),
            "indexes": {},
        }
        for factory in tqdm(factory_names(factories), desc="Indexes"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(measure, factory, corpus_path, queries, recall_target).result()
            ratio = found["queries_per_second"] / result["semantic_search"]["queries_per_second"]
            result["indexes"][factory] = {**found, "times_semantic_search": round(ratio, 2)}
            tqdm.write(f"{factory}: {json.dumps(result['indexes'][factory])}")
            if output:
                write_json(output, {**result, **provenance()})
    click.echo(json.dumps({**result, **provenance()}, indent=2))


def factory_names(given: str) -> list[str]:
    """FAISS's names; the comma separates them, so that within a name a colon stands for it."""
    return [name.replace(":", ",") for name in given.split(",")]


def read_texts(captions: Path | None, sentences: Path | None) -> Iterator[str]:
    """The real sentences."""
    if captions is None and sentences is None:
        raise click.UsageError("give --captions, --sentences, or both")
    if captions is not None:
        for record in FlickrTokens(captions, captions.parent).records(check_files=False):
            yield from record.captions
    if sentences is not None:
        yield from iter_sentences(sentences)


def split(embeddings: Matrix, query_count: int, rows: int, folder: Path) -> tuple[Path, Matrix]:
    """Take the queries out, and fill the corpus up with noisy copies; the corpus is left in a file."""
    generator = np.random.default_rng(0)
    order = generator.permutation(len(embeddings))
    queries, real = embeddings[order[:query_count]], embeddings[order[query_count:]]
    path = folder / "corpus.npy"
    total = max(rows, len(real))
    corpus = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(total, real.shape[1]))
    for start in range(0, total, len(real)):
        part = real[: total - start]
        if start:
            noise = generator.normal(scale=0.5 / np.sqrt(part.shape[1]), size=part.shape)
            part = unit_rows(part + noise)
        corpus[start : start + len(part)] = part
    corpus.flush()
    return path, queries


def peer(corpus: Matrix, queries: Matrix) -> dict[str, float]:
    """``semantic_search`` on the same embeddings."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    candidates, wanted = torch.from_numpy(np.array(corpus)).to(device), torch.from_numpy(queries).to(device)
    seconds = timed(lambda: semantic_search(wanted, candidates, top_k=K))
    return {"queries_per_second": round(len(queries) / seconds, 1)}


def measure(factory: str, corpus_path: Path, queries: Matrix, recall_target: float) -> dict[str, Any]:
    """Build, tune and search one index."""
    corpus = np.load(corpus_path, mmap_mode="r")
    before = memory_mib("VmRSS")
    texts = [f"sentence {row}" for row in range(len(corpus))]
    rows = NewRows(texts, texts, corpus, [{}] * len(corpus))
    started = time.perf_counter()
    backend = FaissBackend.build(rows, None if factory == "auto" else factory, recall_target)
    build_seconds = time.perf_counter() - started
    seconds = timed(lambda: backend.search(queries, K))
    one_by_one = timed(lambda: [backend.search(query[None], K) for query in queries[:100]])
    with tempfile.NamedTemporaryFile() as file:
        load_faiss().write_index(backend.index, file.name)
        size = Path(file.name).stat().st_size
    return {
        "factory": backend.factory,
        "queries_per_second": round(len(queries) / seconds, 1),
        "milliseconds_of_one_query": round(10 * one_by_one, 2),
        "recall_at_10": round(recall(backend, corpus, queries), 4),
        "tuning": None if backend.tuning is None else asdict(backend.tuning),
        "build_seconds": round(build_seconds, 1),
        "peak_memory_mib": round(memory_mib("VmHWM") - before),
        "file_mib": round(size / 2**20, 1),
    }


def recall(backend: FaissBackend, corpus: Matrix, queries: Matrix) -> float:
    """Share of the ten nearest that were found; one as near as the tenth counts."""
    faiss = load_faiss()
    best, _ = faiss.knn(queries, np.ascontiguousarray(corpus), K, faiss.METRIC_INNER_PRODUCT)
    hits = backend.search(queries, K)
    found = np.array([[int(hit.id.split()[1]) for hit in of_query] for of_query in hits])
    scores = np.einsum("qd,qkd->qk", queries, corpus[found.ravel()].reshape(*found.shape, -1))
    return float((scores >= best[:, -1:] - 1e-5).mean())


def timed(run: Callable[[], Any]) -> float:
    """Median seconds of some runs, after one to warm up."""
    seconds: list[float] = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
