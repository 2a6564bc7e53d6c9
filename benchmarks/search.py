"""Search with each kind of index, beside ``sentence_transformers.util.semantic_search`` on the same embeddings.

The corpus is real sentences encoded by all-MiniLM-L6-v2; beyond them, copies with a little noise fill it up. Queries
are sentences that were taken out of it before, several sets of them. Each index is built, tuned to the recall and
searched in its own process, so that its peak memory is its own; what is timed is a search from query embeddings to
texts. The index that is chosen by size is built for each recall target, and measured again after a tenth of its rows
was replaced. What --output has already is not measured again.
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
from st_kdmcse.files import atomic_path, check_output_file, write_json
from st_kdmcse.processes import memory_mib
from st_kdmcse.provenance import provenance
from st_kdmcse.search import FaissBackend
from st_kdmcse.search.base import NewRows, unit_rows
from st_kdmcse.search.faiss_library import load_faiss
from st_kdmcse.search.tuning import exact_search

Matrix = npt.NDArray[np.float32]

K = 10
ROUNDS = 3


@click.command()
@click.option("--captions", type=click.Path(path_type=Path), help="results_20130124.token of Flickr30k.")
@click.option("--sentences", type=click.Path(path_type=Path), help="Sentences, one a line.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps the embeddings for the next time.")
@click.option("--rows", type=int, help="Fill up with noisy copies to so many.  [only the sentences]")
@click.option("--queries", "query_count", default=1000, show_default=True, help="Queries of each set.")
@click.option("--seeds", default=5, show_default=True, help="Sets of queries, none of them in the index.")
@click.option(
    "--factories",
    default="auto,Flat,HNSW32,IVF2048:Flat,IVF2048:PQ48np",
    show_default=True,
    help="':' is FAISS's ','; auto is chosen by size.",
)
@click.option(
    "--recall-targets",
    default="0.9,0.95,0.98",
    show_default=True,
    help="Recall to tune the chosen index to; the others are tuned to the middle one.",
)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the result.")
def main(
    captions: Path | None,
    sentences: Path | None,
    cache: Path | None,
    rows: int | None,
    query_count: int,
    seeds: int,
    factories: str,
    recall_targets: str,
    output: Path | None,
) -> None:
    """Measure queries a second, recall, build time, memory and file size of each index."""
    check_output_file(output)
    targets = [float(each) for each in recall_targets.split(",")]
    with tempfile.TemporaryDirectory() as name:
        embeddings = real_embeddings(captions, sentences, cache or Path(name))
        corpus_path, queries = split(embeddings, seeds * query_count, rows or 0, Path(name))
        corpus, sets = np.load(corpus_path, mmap_mode="r"), queries.reshape(seeds, query_count, -1)
        setting = {
            "corpus": {"rows": len(corpus), "dim": corpus.shape[1], "real_sentences": len(embeddings) - len(queries)},
            "queries": query_count,
            "query_sets": seeds,
            "k": K,
        }
        result = earlier(output, setting) or {**setting, "semantic_search": peer(corpus, sets[0]), "indexes": {}}
        runs = [
            (factory, target)
            for factory in factory_names(factories)
            for target in (targets if factory == "auto" else targets[len(targets) // 2 :][:1])
        ]
        for factory, target in tqdm(runs, desc="Indexes"):
            if (key := f"{factory} {target:g}") in result["indexes"]:
                continue
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(measure, factory, corpus_path, sets, target, Path(name)).result()
            ratio = found["queries_per_second"] / result["semantic_search"]["queries_per_second"]
            result["indexes"][key] = {**found, "times_semantic_search": round(ratio, 2)}
            tqdm.write(f"{key}: {json.dumps(result['indexes'][key])}")
            if output:
                write_json(output, {**result, **provenance()})
    click.echo(json.dumps({**result, **provenance()}, indent=2))


def earlier(output: Path | None, setting: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run with the same setting has measured."""
    if output is None or not output.is_file():
        return None
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found if all(found.get(name) == value for name, value in setting.items()) else None


def real_embeddings(captions: Path | None, sentences: Path | None, folder: Path) -> Matrix:
    """Embeddings of the real sentences, from the folder if they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(dict.fromkeys(read_texts(captions, sentences)))
    path = folder / f"embeddings-{len(texts)}.npy"
    if not path.exists():
        model = load_model(minilm_folder())
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, unit_rows(encode_distinct(model, texts, show_progress_bar=True).matrix))
    embeddings: Matrix = np.load(path)
    return embeddings


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


def measure(factory: str, corpus_path: Path, sets: Matrix, recall_target: float, folder: Path) -> dict[str, Any]:
    """Build, tune and search one index; what exact search finds is kept in the folder for the next one."""
    corpus = np.load(corpus_path, mmap_mode="r")
    before = memory_mib("VmRSS")
    texts = [f"sentence {row}" for row in range(len(corpus))]
    rows = NewRows(texts, texts, corpus, [{}] * len(corpus))
    started = time.perf_counter()
    backend = FaissBackend.build(rows, None if factory == "auto" else factory, recall_target)
    build_seconds = time.perf_counter() - started
    seconds = timed(lambda: backend.search(sets[0], K))
    one_by_one = timed(lambda: [backend.search(query[None], K) for query in sets[0][:100]])
    with tempfile.NamedTemporaryFile() as file:
        load_faiss().write_index(backend.index, file.name)
        size = Path(file.name).stat().st_size
    recalls = recall(backend, corpus, sets, folder / "best.npy")
    result = {
        "factory": backend.factory,
        "queries_per_second": round(sets.shape[1] / seconds, 1),
        "milliseconds_of_one_query": round(10 * one_by_one, 2),
        "recall_at_10": round(statistics.mean(recalls), 4),
        "recall_at_10_of_each_set": recalls,
        "tuning": None if backend.tuning is None else {**asdict(backend.tuning), "met": backend.tuning.met},
        "build_seconds": round(build_seconds, 1),
        "peak_memory_mib": round(memory_mib("VmHWM") - before),
        "file_mib": round(size / 2**20, 1),
        "device": backend.info()["device"],
    }
    if factory == "auto":
        updated = Updated(corpus)
        for start in range(0, len(updated.rows), 10_000):
            some = updated.rows[start : start + 10_000].tolist()
            names = [texts[row] for row in some]
            backend.replace(NewRows(names, names, updated[np.array(some)], [{}] * len(some)))
        result["after_a_tenth_of_updates"] = recall(backend, updated, sets, folder / "best-updated.npy")
    return result


class Updated:
    """The corpus after a tenth of its rows was replaced by noisy copies of other rows.

    Args:
        corpus: (n, dim).

    Attributes:
        rows: that were replaced.
    """

    def __init__(self, corpus: Matrix) -> None:
        self.shape = corpus.shape
        self._corpus = corpus
        generator = np.random.default_rng(1)
        self.rows = np.sort(generator.choice(len(corpus), len(corpus) // 10, replace=False))
        sources = generator.permutation(self.rows)
        noise = generator.normal(scale=0.5 / np.sqrt(corpus.shape[1]), size=(len(self.rows), corpus.shape[1]))
        self._new = unit_rows(corpus[sources] + noise)

    def __getitem__(self, wanted: Any) -> Matrix:
        numbers = np.arange(*wanted.indices(self.shape[0])) if isinstance(wanted, slice) else np.asarray(wanted)
        found = np.array(self._corpus[numbers])
        place = np.minimum(np.searchsorted(self.rows, numbers), len(self.rows) - 1)
        new = self.rows[place] == numbers
        found[new] = self._new[place[new]]
        return found


def recall(backend: FaissBackend, corpus: Any, sets: Matrix, known: Path) -> list[float]:
    """For each set of queries the share of the ten nearest that were found; one as near as the tenth counts."""
    queries = sets.reshape(-1, sets.shape[-1])
    if not known.is_file():
        np.save(known, exact_search(corpus, queries, K)[0])
    best = np.load(known)
    shares = np.zeros(len(queries))
    for start in range(0, len(queries), 500):
        these = slice(start, start + 500)
        rows = np.array([[int(hit.id.split()[1]) for hit in hits] for hits in backend.search(queries[these], K)])
        scores = np.einsum("qd,qkd->qk", queries[these], corpus[rows.ravel()].reshape(*rows.shape, -1))
        shares[these] = (scores >= best[these, -1:] - 1e-5).mean(axis=1)
    return [round(float(each), 4) for each in shares.reshape(len(sets), -1).mean(axis=1)]


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
