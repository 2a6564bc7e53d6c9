"""The list of commands."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from st_kdmcse.cli.main import COMMANDS, main


def run(*arguments):
    return CliRunner().invoke(main, arguments)


def test_help_lists_all_commands():
    result = run("--help")
    assert result.exit_code == 0
    lines = [line.strip() for line in result.output.splitlines()]
    assert [name for name in COMMANDS if any(line.startswith(f"{name} ") for line in lines)] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_where_the_table_says(name):
    result = run(name, "--help")
    assert result.exit_code == 0, result.output
    assert f"{name} " in result.output.splitlines()[0]


def test_an_unknown_command():
    result = run("serch")
    assert (result.exit_code, "No such command 'serch'" in result.output) == (2, True)


def test_the_list_of_commands_imports_none_of_them():
    code = (
        "import sys\n"
        "from st_kdmcse.cli.main import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "main(['--version'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])\n"
        "print(sorted(name for name in sys.modules if name.startswith('st_kdmcse.cli.')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-2:] == ["[]", "['st_kdmcse.cli.main']"]
