"""Runs side by side in processes of their own."""

import multiprocessing

import pytest
from side_by_side import be_killed, tell, train_and_interrupt
from small_runs import options, write_data

from st_kdmcse.experiments.grid import method_grid
from st_kdmcse.experiments.workers import train_side_by_side
from st_kdmcse.training.callbacks import Interrupted
from st_kdmcse.training.checkpoints import latest_checkpoint


@pytest.fixture
def runs(tmp_path_factory, tmp_path, tiny_bert, sentences, store):
    data = write_data(tmp_path_factory.mktemp("data"), sentences, store)
    endless = {"max_steps": 100_000, "save_steps": 10, "eval_steps": 0}
    return method_grid(tmp_path, ["simcse"], [0, 1, 2], **options(data, tiny_bert, **endless))


def test_each_run_is_announced_and_tells_how_it_went(runs):
    announced = []
    outcomes = {each.seed: error for each, error in train_side_by_side(runs, tell, announced.append, 2)}
    assert announced == runs
    assert outcomes == {0: "seed 0", 1: None, 2: None}


def test_a_process_that_is_killed_does_not_lose_the_others(runs):
    outcomes = {each.seed: error for each, error in train_side_by_side(runs, be_killed, lambda _: None, 3)}
    assert outcomes == {0: None, 1: "its process ended with exit code -9", 2: None}


def test_ctrl_c_stops_all_runs_with_a_checkpoint(runs):
    with pytest.raises(Interrupted, match="the same command goes on from there"):
        list(train_side_by_side(runs, train_and_interrupt, lambda _: None, 2))
    assert multiprocessing.active_children() == []
    assert latest_checkpoint(runs[0].output_dir / "checkpoints") is not None
    assert not runs[2].output_dir.exists()
