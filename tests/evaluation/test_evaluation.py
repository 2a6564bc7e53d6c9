"""The public names of the package."""

import subprocess
import sys

import pytest

from st_kdmcse import evaluation


def test_public_names_are_documented():
    assert all(getattr(evaluation, name).__doc__ for name in evaluation.__all__)
    assert set(evaluation.__all__) <= set(dir(evaluation))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'st_kdmcse\.evaluation' has no attribute 'evaluate_everything'"):
        evaluation.evaluate_everything  # noqa: B018


def test_the_import_loads_no_heavy_library():
    program = """
import sys
import st_kdmcse.evaluation
assert not {"matplotlib", "sklearn", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
