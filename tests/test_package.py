"""What an installation must and must not need."""

import subprocess
import sys
from importlib.metadata import version

import st_kdmcse


def test_import_needs_neither_torchvision_nor_faiss_nor_open_clip():
    program = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
absent = ("torchvision", "faiss", "open_clip", "PIL")
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in absent else find(name, *rest))
import st_kdmcse, st_kdmcse.training.run, st_kdmcse.cli.main, st_kdmcse.cli.training
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_public_names_are_documented():
    assert all(getattr(st_kdmcse, name).__doc__ for name in st_kdmcse.__all__)


def test_the_metadata_has_the_version_of_the_package():
    assert st_kdmcse.__version__ == version("st-kdmcse")
