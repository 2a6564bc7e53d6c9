"""What all commands have: a width, options from a file with ``--config``, and ``--traceback``."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import click

OPTIONS_OF_A_FILE = "YAML"
"""The name of a type of options whose values are themselves options by name."""

_EXTRACTION = "extraction"
_TRACEBACK = "st_kdmcse.traceback"
_RECORD = "st_kdmcse.record"
_OF_A_NEW_RUN = ("output_dir", "resume", "run_name", "push_to_hub", "private")


class Command(click.Command):
    """A command with ``--config``, whose file gives the options that the command line does not, and ``--traceback``."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **_with_width(settings))
        from_file = "YAML or JSON file of options, or the run.json of a run; the command line goes first."
        self.params += [
            _option("--config", _read_defaults, from_file, type=click.Path(path_type=Path)),
            _option("--traceback", _remember, "Show where in the code an error comes from.", is_flag=True),
        ]


class Group(click.Group):
    """A group of such commands."""

    command_class = Command

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **_with_width(settings))


def command(name: str | None = None, **settings: Any) -> Callable[[Callable[..., Any]], Command]:
    """Make a :class:`Command` of a function, as ``click.command`` does.

    Args:
        name: of the command; None takes the function's.
        settings: as for ``click.command``.
    """
    return click.command(name, cls=Command, **settings)


def shows_tracebacks() -> bool:
    """Whether the command that runs was given ``--traceback``."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_TRACEBACK))


def repeated_run() -> Mapping[str, Any] | None:
    """The record of the run that ``--config`` names for the command that runs; None if it names none."""
    record: Mapping[str, Any] | None = click.get_current_context().meta.get(_RECORD)
    return record


def _option(flag: str, callback: Callable[..., None], text: str, **settings: Any) -> click.Option:
    return click.Option([flag], is_eager=True, expose_value=False, callback=callback, help=text, **settings)


def _remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.meta[_TRACEBACK] = value


def _with_width(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "context_settings": {"max_content_width": 120, **(settings.get("context_settings") or {})}}


def _read_defaults(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    content = _read(path)
    if "data_sha256" in content and isinstance(content.get("options"), Mapping):
        context.meta[_RECORD] = content
        content = _of_run(content)
    context.default_map = {**(context.default_map or {}), **_options_of(context.command, path, content)}


def _options_of(command: click.Command, path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file by the names of the command's parameters."""
    parameters = parameters_by_name(command)
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in parameters:
            raise click.UsageError(f"{path}: there is no option {key!r}{nearest(name, parameters)}")
        chosen = parameters[name]
        assert chosen.name is not None
        if chosen.name in found:
            raise click.UsageError(f"{path}: {key!r} is there twice, also by another of its names")
        if value is not None:
            found[chosen.name] = _value(path, str(key), chosen, value)
    return found


def parameters_by_name(command: click.Command) -> dict[str, click.Parameter]:
    """The parameters of a command by what a file may call them, with underscores."""
    return {name: each for each in command.params for name in _names(each)}


def nearest(name: str, names: Collection[str]) -> str:
    """A hint at the name that was meant, for the end of a message."""
    near = difflib.get_close_matches(name, names, n=1)
    return f": did you mean {near[0].replace('_', '-')!r}?" if near else ""


def _names(parameter: click.Parameter) -> list[str]:
    """What a file may call a parameter: as the command line does, or as Python does."""
    if not parameter.expose_value or parameter.name is None:
        return []
    flags = parameter.opts if isinstance(parameter, click.Option) else []
    return list(dict.fromkeys([parameter.name, *(flag.lstrip("-").replace("-", "_") for flag in flags)]))


def _value(path: Path, key: str, parameter: click.Parameter, value: Any) -> Any:
    is_flag = isinstance(parameter, click.Option) and parameter.is_bool_flag
    takes_list = parameter.multiple or parameter.nargs != 1 or parameter.type.name == "A,B,..."
    if is_flag != isinstance(value, bool):
        wanted = "true or false" if is_flag else "a text or number; put it in quotes if it is a text"
        raise click.UsageError(f"{path}: {key!r} is {json.dumps(value, default=str)}, expected {wanted}")
    if parameter.type.name == OPTIONS_OF_A_FILE:
        return value
    if isinstance(value, Mapping) or (isinstance(value, list) and not takes_list):
        raise click.UsageError(f"{path}: {key!r} takes one value, got {json.dumps(value, default=str)}")
    if parameter.multiple or parameter.nargs != 1:
        return value if isinstance(value, list) else [value]
    return value


def _read(path: Path) -> Mapping[str, Any]:
    """What is in a file."""
    import yaml  # not before it is needed: the list of commands is shown in a tenth of a second

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError as error:
        raise click.UsageError(f"--config {path} does not exist") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise click.UsageError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise click.UsageError(f"--config {path}: expected options by name, one a line, as in `batch-size: 64`")
    return content


def _of_run(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run, as its ``run.json`` or its summary has them."""
    options = {name: value for name, value in record["options"].items() if name not in _OF_A_NEW_RUN}
    config, extraction = options.pop("config", None) or {}, options.pop(_EXTRACTION, None) or {}
    given = {name: value for name, value in options.items() if value is not None}
    given |= {name: "none" if value is None else value for name, value in config.items()}
    given |= {f"{_EXTRACTION}_{name}": value for name, value in extraction.items() if value is not None}
    if "bf16" in record:
        given["bf16"] = record["bf16"]
    if not given.get("permute_images"):
        given.pop("permute_images", None)
    return given
