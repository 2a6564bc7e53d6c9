"""Messages of the library in the words of a command."""

import logging
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from helpers import load_command

from st_kdmcse.cli import extraction
from st_kdmcse.cli.common import friendly_errors, quiet_libraries, with_flags
from st_kdmcse.cli.main import main
from st_kdmcse.cli.search_options import SizeType

ROOT = Path(__file__).resolve().parents[2]


@click.command()
@click.option("--batch-size", "-b", type=int)
@click.option("--teacher-precision", "extraction_precision")
@click.option("--deduplicate/--no-deduplicate")
@click.argument("store")
@click.option("--warn", is_flag=True)
def command(warn, **_):
    quiet_libraries()
    with friendly_errors():
        message = "`batch_size` is 0, `precision` is odd, `deduplicate` too, `store` and `other_name` stay"
        if warn:
            logging.getLogger("st_kdmcse").warning(message)
        else:
            raise ValueError(message)


@pytest.mark.parametrize("flags", [[], ["--warn"]])
def test_parameters_become_flags_of_the_command(flags, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    result = CliRunner().invoke(command, ["somewhere", *flags])
    assert result.exit_code == (0 if flags else 2)
    expected = "--batch-size is 0, --teacher-precision is odd, --deduplicate too, `store` and `other_name` stay"
    assert expected in result.output


def test_outside_of_a_command_nothing_changes():
    assert with_flags("`batch_size` is 0") == "`batch_size` is 0"


def test_a_traceback_on_request(tmp_path):
    arguments = ["inspect", str(tmp_path / "nowhere")]
    plain, whole = (CliRunner().invoke(main, [*arguments, *more]) for more in ([], ["--traceback"]))
    assert (plain.exit_code, whole.exit_code) == (2, 2)
    assert "Traceback" not in plain.output
    assert whole.output.startswith("Traceback (most recent call last):")
    assert whole.output.splitlines()[-1] == plain.output.splitlines()[-1]
    assert "in open\n" in whole.output


def numeric_options():
    """Each option of the training, evaluation and extraction commands that takes a number."""
    scripts = [path for folder in ("training", "evaluation") for path in sorted((ROOT / folder).glob("*.py"))]
    commands = [load_command(str(path)) for path in scripts]
    commands += [extraction.extract, extraction.inspect]
    for command in commands:
        for each in command.commands.values() if isinstance(command, click.Group) else [command]:
            for option in each.params:
                if isinstance(option, click.Option) and not option.is_flag and takes_numbers(each, option):
                    yield each, option


def takes_numbers(command, option):
    try:
        value = option.type_cast_value(click.Context(command), "1")
    except click.BadParameter:
        return False
    return isinstance(value, int | float)


def test_every_number_is_finite_and_within_32_bits():
    names = set()
    for command, option in numeric_options():
        names.add(option.opts[0])
        context = click.Context(command)
        wrong = ["inf", "-inf", "nan", "1e999", "9" * 30 if option.type.name == "integer" else "infinity"]
        wrong += ["-1", "4294967296"] if option.opts[0].endswith("seed") else []
        for value in wrong:
            with pytest.raises(click.BadParameter) as error:
                option.type_cast_value(context, value)
            assert f"'{option.opts[0]}'" in error.value.format_message()
    assert {"--lr", "--margin", "--threshold", "--masked", "--jobs", "--quantile", "--folds", "--limit"} <= names


def test_sizes_are_finite():
    for value in ("9" * 400 + "T", "9" * 25, "inf", "0.1"):
        with pytest.raises(click.BadParameter, match="is not a size"):
            SizeType().convert(value, None, None)
    assert SizeType().convert("1.5K", None, None) == 1536
