"""A run goes on from checkpoints that are whole, and ends with the weights of one that was never interrupted."""

import json
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from helpers import copy_tree
from safetensors.torch import load_file, save_file
from small_runs import options, write_data

from st_kdmcse.files import locked
from st_kdmcse.training.callbacks import StopOnSignal
from st_kdmcse.training.checkpoints import best_step, check_files, latest_checkpoint, record_files
from st_kdmcse.training.mlm import MaskingOptions, make_raw_student
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run import train

DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
}
WEIGHTS = ("model.safetensors", "heads/heads.safetensors", "last/model.safetensors", "last/heads/heads.safetensors")


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences, store):
    return write_data(tmp_path_factory.mktemp("data"), sentences, store)


@pytest.fixture
def run_options(data, tiny_bert):
    def build(output_dir, **changes):
        steps = {"max_steps": 6, "eval_steps": 1, "save_steps": 2, "lr": 3e-3}
        return TrainingOptions(output_dir=output_dir, **options(data, tiny_bert, **{**steps, **changes}))

    return build


@pytest.fixture(scope="module")
def whole(data, tiny_bert, tmp_path_factory):
    """The folder of a run that was never interrupted, with the checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    values = options(data, tiny_bert, max_steps=6, eval_steps=1, save_steps=2, lr=3e-3)
    train(TrainingOptions(output_dir=folder, **values))
    assert sorted(path.name for path in (folder / "checkpoints").glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    return folder


@pytest.fixture
def killed(whole, tmp_path):
    """A copy of that run as a kill before its end leaves it."""
    return killed_copy(whole, tmp_path / "killed")


def killed_copy(whole, target):
    shutil.copytree(whole, target)
    for name in ("training_summary.json", *WEIGHTS):
        (target / name).unlink()
    return target


def assert_same_end(run, whole):
    for name in WEIGHTS:
        expected, actual = (load_file(folder / name) for folder in (whole, run))
        assert expected.keys() == actual.keys()
        assert all(torch.equal(value, actual[key]) for key, value in expected.items()), name
    curves = [json.loads((folder / "training_summary.json").read_text())["sts_dev_curve"] for folder in (whole, run)]
    assert curves[0] == curves[1]


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_damaged_file_of_any_kind_costs_its_checkpoint(killed, whole, caplog):
    checkpoints = killed / "checkpoints"
    newest = checkpoints / "checkpoint-6"
    names = files_of(newest)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "checksums.json"} < set(names)
    for name in names:
        for damage in DAMAGES.values():
            caplog.clear()
            damage(newest / name)
            assert latest_checkpoint(checkpoints) == checkpoints / "checkpoint-4", name
            assert str(newest / name) in caplog.text or name == "checksums.json"
            assert "checkpoint-6 cannot be gone on from" in caplog.text
            shutil.copyfile(whole / "checkpoints" / "checkpoint-6" / name, newest / name)
    assert latest_checkpoint(checkpoints) == newest


def test_with_any_file_damaged_a_run_ends_with_the_same_weights(whole, tmp_path, run_options):
    damages = list(DAMAGES.values())
    for number, name in enumerate(files_of(whole / "checkpoints" / "checkpoint-6")):
        run = killed_copy(whole, tmp_path / str(number))
        damages[number % len(damages)](run / "checkpoints" / "checkpoint-6" / name)
        train(run_options(run, resume=True))
        assert_same_end(run, whole)


def test_the_best_model_of_a_checkpoint_must_be_whole_too(killed, whole, run_options, caplog):
    (best,) = (killed / "checkpoints").glob("best-*")
    DAMAGES["flipped"](best / "model.safetensors")
    train(run_options(killed, resume=True))
    assert str(best / "model.safetensors") in caplog.text
    assert_same_end(killed, whole)


def test_without_a_whole_checkpoint_training_begins_again(killed, whole, run_options, caplog):
    for checkpoint in (killed / "checkpoints").glob("checkpoint-*"):
        DAMAGES["deleted"](checkpoint / "optimizer.pt")
    train(run_options(killed, resume=True))
    assert "training begins again" in caplog.text
    assert_same_end(killed, whole)


def test_folders_of_other_names_are_no_checkpoints_and_stay(killed, whole, run_options):
    checkpoints = killed / "checkpoints"
    shutil.rmtree(checkpoints / "checkpoint-6")
    others = ["checkpoint-5-backup", "checkpoint-005", "checkpoint-9-x", "best-one"]
    for name in others:
        copy_tree(checkpoints / "checkpoint-4", checkpoints / name)
    (checkpoints / "checkpoint-8").write_text("a file")
    assert latest_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    train(run_options(killed, resume=True))
    assert_same_end(killed, whole)
    assert all((checkpoints / name / "trainer_state.json").is_file() for name in others)


def test_the_best_of_the_older_checkpoint_is_kept(tmp_path, run_options):
    """Of any two checkpoints that are kept, each has the best model up to its step."""
    seen = []

    class Look(StopOnSignal):
        def on_step_begin(self, *args, **kwargs):
            for checkpoint in (tmp_path / "run/checkpoints").glob("checkpoint-*"):
                log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
                check_files(checkpoint.parent / f"best-{best_step(log)}")
                seen.append(best_step(log))

    train(run_options(tmp_path / "run", max_steps=12, save_steps=1, lr=1e-2), Look())
    assert len(set(seen)) > 1  # the best has changed, or this shows nothing


def test_a_run_without_records_is_not_gone_on_from(killed, run_options):
    record = json.loads((killed / "run.json").read_text())
    del record["student_sha256"]
    (killed / "run.json").write_text(json.dumps(record))
    for path in (killed / "checkpoints").glob("*/checksums.json"):
        path.unlink()
    with pytest.raises(ValueError, match="started by an earlier version"):
        train(run_options(killed, resume=True))
    assert (killed / "checkpoints" / "checkpoint-6" / "optimizer.pt").is_file()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weights", lambda folder: save_file(other_weights(folder), folder / "model.safetensors", {"format": "pt"})),
        ("configuration", lambda folder: edit_json(folder / "config.json", hidden_dropout_prob=0.25)),
        ("tokenizer", lambda folder: edit_json(folder / "tokenizer_config.json", do_lower_case=False)),
    ],
)
def test_another_student_at_the_same_path_is_refused(data, tiny_bert, tmp_path, part, change):
    model = copy_tree(tiny_bert, tmp_path / "model")
    values = options(data, model, max_steps=4, eval_steps=2, save_steps=2)
    stopped = TrainingOptions(output_dir=tmp_path / "run", **values)
    train(stopped)
    (tmp_path / "run/training_summary.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")  # as if it was killed before the first checkpoint
    change(model)
    resumed = TrainingOptions(output_dir=tmp_path / "run", resume=True, **values)
    with pytest.raises(ValueError, match=f"the {part} at `model` have changed"):
        train(resumed)


def other_weights(folder):
    state = load_file(folder / "model.safetensors")
    return {name: value + 1 if name == "embeddings.word_embeddings.weight" else value for name, value in state.items()}


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_two_trainings_in_one_folder_are_refused(killed, whole, run_options, tmp_path, data, tiny_bert):
    raw = MaskingOptions(str(tiny_bert), data / "text.txt", tmp_path / "raw", max_steps=2, batch_size=8)
    with locked(killed), locked(tmp_path / "raw"):
        for work, given in ((train, run_options(killed, resume=True)), (make_raw_student, raw)):
            with pytest.raises(ValueError, match="another process is writing to"):
                work(given)
    train(run_options(killed, resume=True))  # the lock that stays is no obstacle
    make_raw_student(raw)
    assert_same_end(killed, whole)


@contextmanager
def largest_file(limit):
    """As on a disk without room: no file grows beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("of_model", [1.5, 0.5])  # the optimizer does not fit, or no weights do
def test_a_full_disk_costs_nothing_but_the_checkpoint_that_did_not_fit(killed, whole, run_options, of_model):
    shutil.rmtree(killed / "checkpoints" / "checkpoint-6")
    size = (killed / "checkpoints/checkpoint-4/model.safetensors").stat().st_size
    with (
        largest_file(int(of_model * size)),
        pytest.raises(OSError, match=r"could not be written; [\d,.]+ MiB are free"),
    ):
        train(run_options(killed, resume=True))
    left = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert [name for name in left if "checkpoint" in name or name.endswith(".tmp")] == ["checkpoint-4"]
    train(run_options(killed, resume=True))
    assert_same_end(killed, whole)


def test_a_model_that_does_not_fit_at_the_end_leaves_no_part(killed, whole, run_options):
    size = (killed / "checkpoints/checkpoint-6/model.safetensors").stat().st_size
    with largest_file(size // 2), pytest.raises(OSError, match="could not be written"):
        train(run_options(killed, resume=True))
    assert not (killed / "model.safetensors").exists()
    assert not list(killed.glob(".*.tmp"))
    train(run_options(killed, resume=True))
    assert_same_end(killed, whole)


def test_a_raw_student_goes_on_from_a_whole_checkpoint(data, tiny_bert, tmp_path, caplog, monkeypatch):
    values = {"max_steps": 6, "batch_size": 8, "save_steps": 2, "lr": 1e-3}

    def run(name, **changes):
        return MaskingOptions(str(tiny_bert), data / "text.txt", tmp_path / name, **{**values, **changes})

    make_raw_student(run("whole"))
    with monkeypatch.context() as patch:  # keep the checkpoints, as a kill before the end does
        patch.setattr("st_kdmcse.training.mlm.save_into", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_raw_student(run("killed"))
    newest = tmp_path / "killed/checkpoints/checkpoint-6"
    DAMAGES["deleted"](newest / "rng_state.pth")
    make_raw_student(run("killed", resume=True))
    assert str(newest / "rng_state.pth") in caplog.text
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())


def test_processes_states_of_random_generators_are_part_of_the_record(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    for number in range(2):
        (folder / f"rng_state_{number}.pth").write_bytes(bytes([number]))
    record_files(folder)
    check_files(folder)
    (folder / "rng_state_1.pth").unlink()
    with pytest.raises(FileNotFoundError, match="rng_state_1.pth is missing"):
        check_files(folder)
