"""Builds, adds to, saves, or copies an index in child processes that are killed at file operations.

Usage: MODEL FOLDER build|add|save|copy. Prints, as JSON, how many were killed and, of `add`, the rows after each.
It forks before it computes anything: a child of a process whose threads have run hangs.
"""

import json
import os
import random
import sys
import traceback
from itertools import count
from pathlib import Path

import faiss  # noqa: F401 - imported once, not by each child
import sentence_transformers.sentence_transformer.model_card  # noqa: F401 - likewise
import torch
from file_events import at_operation, kill_group
from helpers import WORDS

from st_kdmcse import build_student
from st_kdmcse.search import SemanticIndex, TextRecord, build_index, copy_index, faiss_backend
from st_kdmcse.search.storage import is_index

ROWS, ADDED = 120, 30
TEXTS = [" ".join(random.Random(row).choices(WORDS, k=7)) for row in range(ROWS + 20 * ADDED)]


def records():
    return (TextRecord(f"r{row}", TEXTS[row], {"row": row}) for row in range(ROWS))


def build(model, path):
    build_index(records, model, None, path, source={"rows": str(ROWS)}, block_rows=16, show_progress_bar=False)


def add(model, path):
    index = SemanticIndex.load(path, model)
    rows = range(len(index), len(index) + ADDED)
    index.add([TEXTS[row] for row in rows], [f"r{row}" for row in rows], [{"row": row} for row in rows])
    index.save()


def save(model, path):
    """Save a new index."""
    SemanticIndex.build(model, TEXTS[:8]).save(path)


def copy(model, path):
    """Copy the index beside it in parts; to write a part through to the disk counts as a file operation."""
    fsync = os.fsync

    def synced(descriptor):
        fsync(descriptor)
        sys.audit("os.mkdir", f"{path}.synced", 0, -1)

    os.fsync, faiss_backend._ROWS_AT_A_TIME = synced, 50
    copy_index(path.with_name("source"), path, factory="IVF4,Flat")


def check(model, path):
    """The index must be whole: every row finds itself. Leaves the number of rows in a file."""
    index = SemanticIndex.load(path, model)
    assert len(index) >= ROWS
    assert (len(index) - ROWS) % ADDED == 0
    hits = index.get([f"r{row}" for row in range(len(index))])
    assert [hit.text for hit in hits] == TEXTS[: len(index)]
    found = index.search(TEXTS[: len(index)], k=1)
    assert all(hits[0].score > 0.9999 for hits in found)
    Path(f"{path}.rows").write_text(str(len(index)))


def in_child(act, path, operation=None):
    """Whether the child was killed, before its file operation of that number; its model is loaded by then."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            torch.set_num_threads(1)
            model = build_student(sys.argv[1]).to("cpu")
            if act is add:
                check(model, path)
            if operation is not None:
                at_operation(operation, kill_group)
            act(model, path)
            status = 0
        except BaseException:  # noqa: BLE001 - whatever it is, the child ends here
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(process, 0)
    if status and not os.WIFSIGNALED(status):
        sys.exit(f"{act.__name__} failed")
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    path, act = Path(sys.argv[2]), {"build": build, "add": add, "save": save, "copy": copy}[sys.argv[3]]
    killed, rows = 0, []
    if act is build:
        while in_child(build, path, 5 * (killed + 1)):
            killed += 1
            if is_index(path) and not Path(f"{path}.parts", "run.json").exists():
                break  # killed when all was done
        in_child(check, path)
    elif act in (save, copy):
        if act is copy:
            in_child(build, path / "source")
        for operation in count(1, 3 if act is copy else 1):
            folder = path / str(operation)
            if not in_child(act, folder, operation):
                break
            killed += 1
            if act is copy or not is_index(folder):
                in_child(act, folder)
            if act is copy:
                in_child(check, folder)
    else:
        for operation in range(1, 13):
            killed += in_child(add, path, operation)
            rows.append(int(Path(f"{path}.rows").read_text()))
        in_child(check, path)
        rows.append(int(Path(f"{path}.rows").read_text()))
    sys.stdout.write(json.dumps({"killed": killed, "rows": rows}))
