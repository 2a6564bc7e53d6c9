"""Load the search server over the loopback: requests a second and 99th percentile, beside that of another checkout.

Real sentences, encoded by all-MiniLM-L6-v2, are served by ``st-kdmcse serve`` as a user starts it. A query is the first
six words of a sentence that is not in the index. Clients of one process each send one as soon as the one before is
answered, over a connection that is kept; they share the cores with the server. Servers take turns of a few seconds, so
that they meet the same machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import click
import numpy as np

from st_kdmcse.data import iter_sentences
from st_kdmcse.demo.run import minilm_folder
from st_kdmcse.files import check_output_file, write_json
from st_kdmcse.provenance import provenance
from st_kdmcse.search import SemanticIndex

HERE = Path(__file__).resolve().parents[1]
BATCH = 16
ROUNDS = 3
WORDS = 6


@click.command()
@click.option("--sentences", type=click.Path(path_type=Path), required=True, help="Sentences, one a line.")
@click.option("--rows", default=20_000, show_default=True, help="Sentences to index; those after them are queries.")
@click.option(
    "--beside", type=click.Path(path_type=Path), help="Another checkout, to be measured in turn with this one."
)
@click.option("--clients", default="1,8,32", show_default=True, help="Numbers of clients at a time.")
@click.option("--seconds", default=30.0, show_default=True, help="Of each measurement.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the result.")
def main(sentences: Path, rows: int, beside: Path | None, clients: str, seconds: float, output: Path | None) -> None:
    """Measure requests a second and latency of the search server."""
    check_output_file(output)
    texts = list(islice(iter_sentences(sentences), rows + 2000))
    queries = [" ".join(text.split()[:WORDS]) for text in texts[rows:]]
    servers = {"this": HERE} | ({} if beside is None else {"beside": beside.resolve()})
    measured: dict[str, dict[str, Any]] = {name: {} for name in servers}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        index = Path(folder) / "index"
        SemanticIndex.build(minilm_folder(), texts[:rows], path=index)
        urls = {name: running.enter_context(serving(checkout, index)) for name, checkout in servers.items()}
        for count in map(int, clients.split(",")):
            contests = [(name, 1) for name in servers] + ([("this", BATCH)] if count == 1 else [])
            found = {contest: Load() for contest in contests}
            for _ in range(ROUNDS):
                for name, batch in contests:
                    asyncio.run(load(urls[name], count, seconds / ROUNDS, queries, batch, found[name, batch]))
            for (name, batch), each in found.items():
                title = f"{count} clients" + (f", {batch} queries a request" if batch > 1 else "")
                measured[name][title] = each.summary(seconds)
                click.echo(f"{name}, {title}: {json.dumps(measured[name][title])}")
    threads = os.environ.get("OMP_NUM_THREADS")
    result = {"rows": rows, "seconds": seconds, "threads": threads, "servers": measured, **provenance()}
    click.echo(json.dumps(result, indent=2))
    if output:
        write_json(output, result)


@dataclass
class Load:
    """Seconds of each request that was answered, and the number of answers of each status."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def summary(self, seconds: float) -> dict[str, Any]:
        """Figures of so many seconds."""
        median, last = 1000 * np.quantile(self.seconds or [np.nan], [0.5, 0.99])
        return {
            "requests_per_second": round(len(self.seconds) / seconds, 1),
            "milliseconds": {"median": round(median, 1), "p99": round(last, 1)},
            "statuses": dict(self.statuses),
        }


@contextmanager
def serving(checkout: Path, index: Path) -> Iterator[str]:
    """The URL of the server of a checkout."""
    command = [sys.executable, "-m", "st_kdmcse", "serve", str(index), "--port", "0", "--rate", "1000000"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise click.ClickException(f"the server of {checkout} does not start")
            yield found[0]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


async def load(url: str, clients: int, seconds: float, queries: list[str], batch: int, found: Load) -> None:
    """Ask for a time, after half a second to warm up, as several clients."""
    start = time.perf_counter() + 0.5
    end = start + seconds

    async def ask(client: int) -> None:
        reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
        generator = np.random.default_rng([client, len(found.seconds)])
        while (begun := time.perf_counter()) < end:
            asked = [queries[row] for row in generator.integers(len(queries), size=batch)]
            writer.write(request(asked))
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            await reader.readexactly(int(length[1]) if length else 0)
            status, now = int(head.split()[1]), time.perf_counter()
            if start <= now <= end:
                found.statuses[status] += 1
                if status == 200:
                    found.seconds.append(now - begun)
            if status == 503:
                await asyncio.sleep(0.05)  # a client that is refused comes back
        writer.close()

    await asyncio.gather(*map(ask, range(clients)))


def request(queries: list[str]) -> bytes:
    """A search over HTTP: GET for one query, POST for several."""
    if len(queries) == 1:
        return f"GET /api/search?{urlencode({'q': queries[0]})} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    body = json.dumps({"queries": queries}).encode()
    return f"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


if __name__ == "__main__":
    main()
