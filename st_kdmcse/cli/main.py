"""The command ``st-kdmcse``."""

from __future__ import annotations

import click

from st_kdmcse.cli.extraction import extract, inspect, merge_command


@click.group(context_settings={"max_content_width": 120})
@click.version_option(package_name="st-kdmcse")
def main() -> None:
    """Teacher features for training sentence encoders with knowledge from CLIP."""


for command in (extract, merge_command, inspect):
    main.add_command(command)
