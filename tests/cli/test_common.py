"""Messages of the library in the words of a command."""

import logging

import click
import pytest
from click.testing import CliRunner

from st_kdmcse.cli.common import friendly_errors, quiet_libraries, with_flags
from st_kdmcse.cli.main import main


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
