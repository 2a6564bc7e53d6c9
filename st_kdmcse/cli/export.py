"""``st-kdmcse export``."""

from __future__ import annotations

from pathlib import Path

import click

from st_kdmcse.cli.commands import command
from st_kdmcse.cli.common import friendly_errors, quiet_libraries
from st_kdmcse.training.text_image import export_text_image

_PATH = click.Path(path_type=Path)


@command()
@click.argument("run", type=_PATH)
@click.option("--out", "path", type=_PATH, required=True, help="Folder for the model; a new one.")
@click.option(
    "--teacher",
    help="Model that gave the features: hub name or folder of a CLIP or SigLIP, or sentence-transformers:NAME.  "
    "[that of the features]",
)
@click.option("--features", type=_PATH, help="Feature store of the run.  [where the run found it]")
@click.option("--images", type=_PATH, help="Folder of the images, to see that --teacher gave the features.")
@click.option("--device", help="Device, such as cpu or cuda:1.  [a GPU if there is one]")
def main(
    run: Path, path: Path, teacher: str | None, features: Path | None, images: Path | None, device: str | None
) -> None:
    """Make a model of sentences and images of the finished run in RUN, which was trained with mcse or kdmcse.

    \b
    st-kdmcse export kdmcse-bert --out kdmcse-bert-image
    st-kdmcse export kdmcse-bert --out kdmcse-bert-image --teacher openai/clip-vit-base-patch32 --images flickr30k

    The model needs sentence-transformers alone. It encodes strings and PIL images, to be compared by cosine.
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors():
        model = export_text_image(run, path, teacher=teacher, features=features, images=images, device=device)
        click.echo(f"model of sentences and images: {path} ({model.get_embedding_dimension()} dimensions)")
        click.echo(f'    SentenceTransformer("{path}").encode([Image.open("photo.jpg")])')
