"""Two gloo processes of half the batch against one process of the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import copy_tree, free_port

from st_kdmcse import KDMCSEConfig, KDMCSELoss

WORKER = Path(__file__).with_name("distributed_worker.py")
TESTS = WORKER.parents[1]


def run(folder, world, steps, batch, lr, resume=0, mini_batch=0):
    port = str(free_port())
    arguments = [str(folder), str(steps), str(batch), str(lr), str(resume), str(mini_batch)]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), port, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-4000:]
    return [torch.load(folder / f"result-{world}-{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture
def folder(tmp_path, tiny_bert, store, student, sentences):
    copy_tree(tiny_bert, tmp_path / "bert")
    copy_tree(store.path, tmp_path / "store")
    (tmp_path / "sentences.txt").write_text("\n".join(sentences[:72]))
    KDMCSELoss(student, KDMCSEConfig(), teacher_dim=store.dim).save_heads(tmp_path / "heads")
    return tmp_path


def test_the_first_updates_are_those_of_one_process(folder):
    # Step 1 is a text batch, step 2 a pair batch: with plain SGD the parameters are the sum of both updates.
    (one,) = run(folder, 1, steps=2, batch=16, lr=1.0)
    for mini_batch in (0, 3):  # 3 is with gradient caching; neither mini-batches nor chunks divide the 8 sentences
        first, second = run(folder, 2, steps=2, batch=8, lr=1.0, mini_batch=mini_batch)
        for kind in ("student", "heads"):
            for name, value in one[kind].items():
                assert torch.equal(first[kind][name], second[kind][name]), f"{name} differs between processes"
                # The teacher's features are float32, and so are its similarities.
                torch.testing.assert_close(first[kind][name], value, rtol=1e-8, atol=1e-9)
        for terms in zip(one["logs"], first["logs"], strict=True):
            # Negatives are counted on each process over its own rows: the mean of two halves is half of the whole.
            single, double = (
                {k: v for k, v in entry.items() if k in ("loss", "text", "image", "caption")} for entry in terms
            )
            assert single == pytest.approx(double, abs=2e-4)


def test_processes_draw_from_one_source_at_a_time_and_never_the_same_rows(folder):
    first, second = run(folder, 2, steps=6, batch=8, lr=0.1)
    kinds = [[labels is not None for labels in result["labels"]] for result in (first, second)]
    assert kinds == [[False, True] * 3] * 2
    rows = torch.cat([labels for result in (first, second) for labels in result["labels"] if labels is not None])
    assert len(rows.unique()) == len(rows) == 48


def test_resuming_in_the_second_epoch_is_exact_on_two_processes(folder):
    # An epoch has 8 steps; checkpoint 14 lies in the second.
    whole = run(folder, 2, steps=18, batch=8, lr=0.1)
    record = json.loads((folder / "run-2/checkpoint-14/checksums.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} < record.keys()
    resumed = run(folder, 2, steps=18, batch=8, lr=0.1, resume=14)
    for before, after in zip(whole, resumed, strict=True):
        assert [str(labels) for labels in before["labels"][14:]] == [str(labels) for labels in after["labels"]]
        for kind in ("student", "heads"):
            assert all(torch.equal(value, after[kind][name]) for name, value in before[kind].items())
