"""Forged manifests and nonsense from clients, of fixed seeds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from st_kdmcse import build_student
from st_kdmcse.search import SemanticIndex

pytest.importorskip("fastapi")
WORKER = Path(__file__).with_name("fuzzed_index_worker.py")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is capped by what Linux says is used")
def test_what_is_forged_or_nonsense_has_a_documented_error(tiny_bert, tmp_path, sentences):
    build_student(str(tiny_bert)).save_pretrained(str(tmp_path / "model"))
    metadata = [{"year": 2000 + row} for row in range(100)]
    SemanticIndex.build(
        str(tmp_path / "model"), sentences[:100], metadata=metadata, factory="IVF4,Flat", path=tmp_path / "index"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, WORKER, tmp_path / "index", "0", "400"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["refused"] > 200
    assert found["read"] > 5
    assert set(found["requests"]) >= {"200", "404", "405", "422"}
