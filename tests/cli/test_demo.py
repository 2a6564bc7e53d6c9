"""The command line of the demo."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from st_kdmcse.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("call", [["training/train_flickr.py", "--demo"], ["-m", "st_kdmcse", "demo"]])
def test_both_ways_to_start_it(call, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    arguments = [sys.executable, *call, "--output-dir", str(tmp_path / "full")]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 2
    assert "is not empty: choose another directory" in result.stderr
    assert "--output-dir" in result.stderr


def test_other_options_are_refused():
    result = CliRunner().invoke(main, ["demo", "--margin", "0.1"])
    assert (result.exit_code, "No such option" in result.output) == (2, True)
