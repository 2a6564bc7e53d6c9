"""One FAISS, or an error that says what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = "from st_kdmcse.search.faiss_library import load_faiss; print(load_faiss().__name__)"


def run(*folders):
    path = os.pathsep.join([*map(str, folders), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.fixture
def wheels(tmp_path):
    """Folders that hold what pip records of a wheel."""
    for name in ("faiss_cpu", "faiss_gpu"):
        folder = tmp_path / name / f"{name}-1.15.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.15.0\n")
    return [tmp_path / "faiss_cpu", tmp_path / "faiss_gpu"]


def test_one_wheel_is_loaded(wheels):
    pytest.importorskip("faiss")
    assert run().stdout.strip() == "faiss"


def test_both_wheels_are_refused_with_what_to_remove(wheels):
    result = run(*wheels)
    assert result.returncode != 0
    assert "both faiss-cpu and faiss-gpu are installed" in result.stderr
    assert "pip uninstall faiss-cpu faiss-gpu" in result.stderr


def test_without_faiss_the_extras_are_named(tmp_path):
    (tmp_path / "faiss.py").write_text("raise ImportError('no faiss')")
    result = run(tmp_path)
    assert 'pip install "st-kdmcse[search]", or on a GPU "st-kdmcse[faiss-gpu]"' in result.stderr
