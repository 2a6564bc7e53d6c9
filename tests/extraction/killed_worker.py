"""Extracts in child processes, each killed before one of its file operations, until one ends: PHOTOS MODEL STORE.

Prints how many were killed. It forks before it computes anything: a child of a process whose threads have run hangs.
"""

import os
import sys
from pathlib import Path

import open_clip  # noqa: F401 - imported once, not by each child

sys.path.insert(0, str(Path(__file__).parents[1]))

from file_events import at_operation, kill_group

from st_kdmcse.data.readers import CaptionsCSV
from st_kdmcse.extraction import extract
from st_kdmcse.teachers import OpenCLIPTeacher

photos, model, path = (Path(argument) for argument in sys.argv[1:])


def run() -> None:
    if path.exists() and not path.with_name(f"{path.name}.parts").exists():
        return  # killed after its last step
    reader = CaptionsCSV(photos / "captions.txt", photos / "Images")
    teacher = OpenCLIPTeacher(f"local-dir:{model}", batch_size=4, precision="float32")
    extract(reader, teacher, path, workers=1, part_size=8, show_progress_bar=False)


killed = 0
while True:
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        at_operation(4 * (killed + 1), kill_group)  # the later the attempt, the further it gets
        run()
        os._exit(0)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        killed += 1
    elif status:
        sys.exit("the extraction failed")
    else:
        break
sys.stdout.write(f"{killed}\n")
