"""``st-kdmcse tune``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml
from click.core import ParameterSource

from st_kdmcse.cli.commands import OPTIONS_OF_A_FILE, command, nearest, parameters_by_name
from st_kdmcse.cli.common import Whole, friendly_errors, quiet_libraries
from st_kdmcse.cli.grid import split_options
from st_kdmcse.cli.training import config_options, training_options

_NOT_HERE = {
    *("output_dir", "resume", "run_name", "push_to_hub", "private", "metric", "nanobeir_data"),
    *("export", "export_teacher", "export_images"),
}
_OF_A_RANGE = ("low", "high", "log", "step")


class SpaceType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Options of the command by name, each with a list of values or a range."""

    name = OPTIONS_OF_A_FILE

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The values by the parameters of the command, each checked as on the command line."""
        if isinstance(value, str):
            try:
                value = yaml.safe_load(value)
            except (yaml.YAMLError, RecursionError) as error:
                self.fail(f"{value!r} cannot be read: {error}", param, ctx)
        if not isinstance(value, Mapping) or not value:
            self.fail("expected options by name, each with [values] or {low: ..., high: ...}", param, ctx)
        assert ctx is not None
        parameters = parameters_by_name(ctx.command)
        found: dict[str, Any] = {}
        for key, values in value.items():
            name = str(key).lstrip("-").replace("-", "_")
            if name not in parameters:
                self.fail(f"there is no option {str(key)!r}{nearest(name, parameters)}", param, ctx)
            found[str(parameters[name].name)] = self._values(str(key), values, parameters[name], ctx)
        return found

    def _values(self, key: str, values: Any, parameter: click.Parameter, context: click.Context) -> Any:
        def one(each: Any) -> Any:
            try:
                return parameter.type.convert("none" if each is None else each, parameter, context)
            except click.UsageError as error:
                self.fail(f"{key}: {error.message}", None, context)

        if isinstance(values, list):
            return [one(each) for each in values]
        if not isinstance(values, Mapping) or not {"low", "high"} <= set(values) <= set(_OF_A_RANGE):
            self.fail(f"{key}: expected a list of values, or low and high, and if need be log or step", None, context)
        numbers = {name: one(values[name]) for name in ("low", "high", "step") if name in values}
        if any(isinstance(each, str | bool) for each in numbers.values()):
            self.fail(f"{key}: a range is one of numbers", None, context)
        return {**numbers, "log": bool(values.get("log", False))}


def _options(function: Any) -> Any:
    function = training_options(config_options(function), Path())
    parameters: list[click.Parameter] = function.__click_params__
    parameters[:] = [each for each in parameters if each.name not in _NOT_HERE]
    space = "Options to search, such as {lr: {low: 1e-5, high: 1e-4, log: true}, margin: [0.1, 0.15]}."
    prune = "End a trial whose dev score is below the median of the earlier ones."
    for option in (
        click.option("--prune/--no-prune", default=True, show_default=True, help=prune),
        click.option(
            "--trials", type=Whole(1), default=20, show_default=True, help="Trials, those made before included."
        ),
        click.option("--search-space", type=SpaceType(), required=True, help=space),
        click.argument("root", type=click.Path(path_type=Path)),
    ):
        function = option(function)
    return function


def _or_none(name: str, value: Any) -> Any:
    """None for the word that stands for no threshold."""
    return None if value == "none" and name.endswith("threshold") else value


@command()
@_options
def main(root: Path, search_space: dict[str, Any], trials: int, prune: bool, **arguments: Any) -> None:
    """Search for the options with the best score on STS-B dev, in trials in ROOT, and train the winner again.

    \b
    st-kdmcse tune tuning --config tune.yaml --trials 20

    where tune.yaml has the options of a training, and under search-space those to search:

    \b
    text: wiki1m_for_simcse.txt
    features: flickr30k-features
    max-steps: 2000
    search-space:
      lr: {low: 1e-5, high: 1e-4, log: true}
      margin: [0.1, 0.125, 0.15]
      threshold: [auto, 0.8]

    A study that was interrupted goes on where it was, and one that is finished with more --trials: give the same
    command again. All trials have the same --seed.
    """  # noqa: D301 - click reads the backspace character
    quiet_libraries()
    with friendly_errors("stopped; the same command goes on from there"):
        from st_kdmcse.experiments.study import Range, tune  # of the extra `tune`

        context = click.get_current_context()
        twice = [
            f"`{name}`" for name in search_space if context.get_parameter_source(name) is not ParameterSource.DEFAULT
        ]
        if twice:
            raise ValueError(f"{', '.join(twice)} has a value, and others in `search_space`: choose one of both")
        space = {
            name: Range(**values) if isinstance(values, dict) else [_or_none(name, each) for each in values]
            for name, values in search_space.items()
        }
        options, config = split_options(arguments, root)
        tuned = tune(root, space, trials, config, prune, **options)
        click.echo(f"\n{tuned.report}\nwinner: {tuned.winner}, report: {root / 'report.md'}")
