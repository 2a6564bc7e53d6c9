"""Extracts in child processes that are killed at random moments, until one ends: usage PHOTOS MODEL STORE.

Prints how many were killed. It forks before it computes anything: a child of a process whose threads have run hangs.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import open_clip  # noqa: F401 - imported once, not by each child

from st_kdmcse.data.readers import CaptionsCSV
from st_kdmcse.extraction import extract
from st_kdmcse.teachers import OpenCLIPTeacher

photos, model, path = (Path(argument) for argument in sys.argv[1:])


def run() -> None:
    if path.exists() and not path.with_name(f"{path.name}.parts").exists():
        return  # killed after its last step
    reader = CaptionsCSV(photos / "captions.txt", photos / "Images")
    teacher = OpenCLIPTeacher(f"local-dir:{model}", batch_size=4)
    extract(reader, teacher, path, workers=1, part_size=8, show_progress_bar=False)


moments = random.Random(7)
killed = 0
while True:
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        run()
        os._exit(0)
    # The later the attempt, the more time it gets: none at all for the first, and enough for the last.
    deadline = time.monotonic() + moments.uniform(0.5, 1) * 0.025 * (killed + 1)
    status = None
    while time.monotonic() < deadline and status is None:
        done, code = os.waitpid(process, os.WNOHANG)
        status = code if done else None
        time.sleep(0.005)
    if status is None:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        killed += 1
        continue
    if status != 0:
        sys.exit("the extraction failed")
    break
sys.stdout.write(f"{killed}\n")
