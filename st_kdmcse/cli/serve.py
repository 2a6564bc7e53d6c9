"""``st-kdmcse serve``."""

from __future__ import annotations

from pathlib import Path

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import friendly_errors, quiet_libraries
from st_kdmcse.search.limits import Limits
from st_kdmcse.search.semantic_index import SemanticIndex
from st_kdmcse.search.server import LOCAL_HOSTS, create_app, is_local, listen
from st_kdmcse.search.server import serve as serve_app

_DEFAULT = Limits()


@command()
@click.argument("address", metavar="DIR")
@click.option("--model", help="Model: hub name or folder, if it has moved since the index was made.")
@click.option("--images", type=click.Path(path_type=Path), help="Folder of images to show.  [the one of the index]")
@click.option(
    "--image-column", default="image", show_default=True, help="Metadata that names a row's file in --images."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve at; 0.0.0.0 is all of them.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option(
    "--max-k", "results", type=int, default=_DEFAULT.results, show_default=True, help="Maximum number of results."
)
@click.option(
    "--max-query",
    "query_characters",
    type=int,
    default=_DEFAULT.query_characters,
    show_default=True,
    help="Maximum number of characters in a query.",
)
@click.option(
    "--rate",
    "requests_per_minute",
    type=int,
    default=_DEFAULT.requests_per_minute,
    show_default=True,
    help="Maximum number of queries per client and minute.",
)
@click.option(
    "--max-queries",
    "queries",
    type=int,
    default=_DEFAULT.queries,
    show_default=True,
    help="Maximum number of queries in a request.",
)
@click.option("--docs", is_flag=True, help="Describe the API at /docs, and for programs at /openapi.json.")
def serve(
    address: str,
    model: str | None,
    images: Path | None,
    image_column: str,
    host: str,
    port: int,
    results: int,
    query_characters: int,
    requests_per_minute: int,
    queries: int,
    docs: bool,
) -> None:
    """Serve a web page and an API that search the index DIR (a folder, or an address of Milvus), until Ctrl-C.

    Only this machine can open the page; --host sets another address. Queries are not logged.

    \b
    st-kdmcse serve my-index
    st-kdmcse serve my-index --images flickr30k-images --port 8080
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors():
        limits = Limits(query_characters, results, requests_per_minute, queries=queries)
        with listen(host, port) as listener:
            hosts = (*LOCAL_HOSTS, host) if is_local(listener) else None
            index = SemanticIndex.open(address, model)
            app = create_app(index, images=images, image_column=image_column, limits=limits, hosts=hosts, docs=docs)
            shown = f"[{host}]" if ":" in host else host
            click.echo(f"{len(index):,} texts at http://{shown}:{listener.getsockname()[1]} (Ctrl-C ends)")
            if hosts is None:
                click.echo(
                    f"warning: other machines can reach {host}, without a password and unencrypted: put a proxy with "
                    "both before it, or leave --host away",
                    err=True,
                )
            serve_app(app, listener)
