"""Maps of sentences under repeated dropout (Figures 8 to 12), and nearest neighbours of several models."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from st_kdmcse.cli.commands import Group
from st_kdmcse.cli.common import COUNT, SEED, friendly_errors, quiet_libraries
from st_kdmcse.cli.named_models import named_models
from st_kdmcse.data import iter_sentences, sha256_file
from st_kdmcse.encoding import load_model
from st_kdmcse.evaluation.plots import check_plot, save_figure
from st_kdmcse.evaluation.visualize import (
    DEFAULT_SENTENCES,
    dropout_map,
    nearest_neighbours,
    neighbours_dict,
    neighbours_markdown,
    neighbours_text,
    plot_dropout_maps,
)
from st_kdmcse.files import atomic_file, check_output_file, write_json
from st_kdmcse.provenance import model_identity, provenance

PathOption = click.Path(path_type=Path)
Models = click.argument("models", metavar="MODEL...", nargs=-1, required=True)


@click.group(cls=Group, context_settings={"show_default": True})
def main() -> None:
    """Look at what models make of sentences. A MODEL is a hub name or folder, or LABEL=PATH."""


@main.command()
@Models
@click.option("--sentences", type=PathOption, help="File of one sentence a line, also .gz or .parquet.  [eight own]")
@click.option("--repeats", type=COUNT, default=20, help="Copies of each sentence.")
@click.option("--seed", type=SEED, default=0, help="Seed of dropout and t-SNE.")
@click.option("--output", type=PathOption, help="JSON file to write.")
@click.option("--plot", type=PathOption, default=Path("tsne.png"), help="PNG, SVG or PDF file to write.")
def tsne(
    models: tuple[str, ...], sentences: Path | None, repeats: int, seed: int, output: Path | None, plot: Path
) -> None:
    """Draw sentences that are encoded repeatedly under dropout, a panel for each MODEL."""
    quiet_libraries()
    with friendly_errors():
        check_output_file(output)
        check_plot(plot)
        names = named_models(models)
        chosen = list(DEFAULT_SENTENCES) if sentences is None else list(iter_sentences(sentences, deduplicate=True))
        loaded = {label: load_model(path) for label, path in names.items()}
        maps = [dropout_map(model, chosen, repeats, seed, label) for label, model in loaded.items()]
        width = max(5, *map(len, names))
        click.echo(f"Mean cosine of {repeats} copies of {len(chosen)} sentences under dropout")
        click.echo(f"{'model':{width}}  within a sentence  between sentences")
        for each in maps:
            note = "" if each.has_dropout else "  has no dropout: all copies are the same"
            click.echo(f"{each.label:{width}}  {each.within:17.4f}  {each.between:17.4f}{note}")
        if output is not None:
            checksums = {} if sentences is None else {sentences.name: sha256_file(sentences)}
            results = [
                each.to_dict() | {"model": model_identity(loaded[each.label], names[each.label])} for each in maps
            ]
            record = {"sentences": chosen, "repeats": repeats, "models": results}
            write_json(output, {**provenance(data_sha256=checksums, seed=seed), **record})
        save_figure(plot_dropout_maps(maps), plot)
        click.echo(f"map: {plot}")


@main.command()
@Models
@click.option("--corpus", type=PathOption, required=True, help="File of one sentence a line (also .gz), or a .parquet.")
@click.option("--column", help="The column of a .parquet.  [the only one of text]")
@click.option("--query", "queries", multiple=True, required=True, help="Sentence to look for; may be given again.")
@click.option("-k", type=COUNT, default=5, help="Neighbours of each query.")
@click.option("--output", type=PathOption, help="Markdown (.md) or JSON (.json) file to write.")
def neighbours(
    models: tuple[str, ...], corpus: Path, column: str | None, queries: tuple[str, ...], k: int, output: Path | None
) -> None:
    """Show the nearest sentences of a corpus, side by side for each MODEL."""
    quiet_libraries()
    with friendly_errors():
        if output is not None and output.suffix not in (".md", ".json"):
            raise ValueError(f"--output {output}: name a .md or a .json file")
        check_output_file(output)
        names = named_models(models)
        sentences = list(iter_sentences(corpus, column, deduplicate=True))
        loaded = {label: load_model(path) for label, path in names.items()}
        found = {label: nearest_neighbours(model, sentences, queries, k) for label, model in loaded.items()}
        click.echo(neighbours_text(queries, found, shutil.get_terminal_size((120, 24)).columns))
        if output is None:
            return
        record = provenance(data_sha256={corpus.name: sha256_file(corpus)})
        if output.suffix == ".json":
            identities = {label: model_identity(model, names[label]) for label, model in loaded.items()}
            write_json(output, {**record, "models": identities, "queries": neighbours_dict(queries, found)})
        else:
            source = f"Of {len(sentences):,} sentences of {corpus.name} (SHA-256 {record['data_sha256'][corpus.name]})"
            where = ", ".join(f"{label} = {path}" for label, path in names.items())
            text = f"{source}.\nModels: {where}.\n{record['date']}, st-kdmcse {record['versions']['st-kdmcse']}.\n\n"
            with atomic_file(output) as file:
                file.write(text + neighbours_markdown(queries, found))
