"""Building an index from text, encoding included, in bfloat16 and in float32, and what of its recall is lost.

Both build an exact index of the same sentences with the same model and take turns. Recall@10 is that of queries which
were taken out of the corpus, encoded in float32 as they are by default, against the exact search of float32.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
from ratios import spread
from tqdm import tqdm

from st_kdmcse.data import iter_sentences
from st_kdmcse.demo.run import minilm_folder
from st_kdmcse.encoding import encode_queries, load_model
from st_kdmcse.files import check_output_file, write_json
from st_kdmcse.precision import Precision, bfloat16_is_faster
from st_kdmcse.provenance import provenance
from st_kdmcse.search.build import build_index
from st_kdmcse.search.records import TextRecord

K = 10
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


@click.command()
@click.option("--sentences", required=True, type=click.Path(path_type=Path), help="Sentences, one a line.")
@click.option("--rows", default=20_000, show_default=True)
@click.option("--queries", "query_count", default=1000, show_default=True)
@click.option("--model", help="Hub name or folder.  [all-MiniLM-L6-v2]")
@click.option("--rounds", default=3, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the result.")
def main(sentences: Path, rows: int, query_count: int, model: str | None, rounds: int, output: Path | None) -> None:
    """Compare the time of both, and measure the recall."""
    check_output_file(output)
    encoder = load_model(model or minilm_folder())
    if not bfloat16_is_faster(encoder.device.type):
        raise click.ClickException("this device is not faster at bfloat16: there is nothing to compare")
    texts = list(islice(dict.fromkeys(iter_sentences(sentences)), rows + query_count))
    if len(texts) <= query_count:
        raise click.ClickException(f"{sentences} holds {len(texts)} distinct sentences, too few")
    queries, corpus = (
        texts[:query_count],
        [TextRecord(str(row), text, {}) for row, text in enumerate(texts[query_count:])],
    )
    seconds: dict[Precision, list[float]] = {each: [] for each in PRECISIONS}
    found: dict[Precision, list[list[str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in tqdm(range(rounds), desc="Rounds"):
            for each in PRECISIONS if turn % 2 else PRECISIONS[::-1]:
                started = time.perf_counter()
                index = build_index(
                    lambda: corpus,
                    encoder,
                    None,
                    Path(folder, f"{each}-{turn}"),
                    source={},
                    factory="Flat",
                    precision=each,
                )
                seconds[each].append(time.perf_counter() - started)
                hits = index.backend.search(encode_queries(encoder, queries), K)
                found[each] = [[hit.id for hit in of_query] for of_query in hits]
    same = [len({*one} & {*other}) / K for one, other in zip(found["float32"], found["bfloat16"], strict=True)]
    result: dict[str, Any] = {
        "rows": len(corpus),
        "queries": query_count,
        "rounds": rounds,
        "seconds": {name: round(statistics.median(each), 2) for name, each in seconds.items()},
        "times_as_fast_in_bfloat16": spread(seconds["bfloat16"], seconds["float32"]),
        "recall_at_10_of_bfloat16": round(float(np.mean(same)), 4),
        **provenance(encoder, model or "all-MiniLM-L6-v2"),
    }
    click.echo(json.dumps(result, indent=2))
    if output:
        write_json(output, result)


if __name__ == "__main__":
    main()
