"""The folder of a run: what is where in it, who may write to it, and which checkpoint to go on from."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from st_kdmcse.files import LOCK, read_json, write_folder
from st_kdmcse.losses.heads import HEADS_DIR
from st_kdmcse.precision import bfloat16_is_faster, no_bfloat16
from st_kdmcse.processes import device_type
from st_kdmcse.provenance import differences
from st_kdmcse.training.checkpoints import RECORD_NAME, checkpoints_in, writing
from st_kdmcse.training.lora import LORA_NAME

logger = logging.getLogger(__name__)

SUMMARY_NAME = "training_summary.json"
RUN_NAME = "run.json"
CHECKPOINTS_NAME = "checkpoints"
FEATURES_NAME = "features"
LAST_NAME = "last"
EVENTS_NAME = "runs"
SCORES_NAME = "evaluation"

_STATE_FILES = (
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "training_args.bin",
    RECORD_NAME,
    LORA_NAME,
)

# Options that may differ between a run and its resumption: they do not change what is computed, or their content is
# compared.
_FREE_TO_CHANGE = frozenset(
    {"resume", "report_to", "run_name", "push_to_hub", "private", "output_dir", "workers", "save_steps"}
    | {"text", "features", "extraction", "eval_data", "nanobeir_data", "exclude_images", "exclude_overlap"}
    | {"gradient_checkpointing", "export", "export_teacher", "export_images"}
)
_DAMAGED = "remove its folder and train again"


def check_output_dir(output_dir: Path, resume: bool, extracts: bool) -> None:
    """Refuse a folder that a run must not write to.

    Args:
        output_dir: the folder; it may be absent.
        resume: whether a run in it is resumed.
        extracts: whether features are extracted first, into this folder.

    Raises:
        ValueError: if it is a file or holds something else, or there is nothing to resume; says what to do.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` {output_dir} is a file")
    found = {path.name for path in output_dir.iterdir()} if output_dir.is_dir() else set()
    found = {name for name in found if not name.endswith(".tmp") and name != LOCK}  # .tmp: being written at a kill
    if extracts and found and all(name.startswith(FEATURES_NAME) for name in found):
        return  # an extraction that was interrupted or finished, and no training yet
    if resume:
        if found and not (output_dir / RUN_NAME).is_file():
            raise ValueError(f"`output_dir` {output_dir} holds no run to resume: there is no {RUN_NAME} in it")
        if (output_dir / SUMMARY_NAME).is_file():
            raise ValueError(f"the run in {output_dir} is finished: its results are in {output_dir / SUMMARY_NAME}")
    elif found:
        remedy = "choose another directory"
        if (output_dir / RUN_NAME).is_file():
            remedy = f"add `resume` to go on with it, or {remedy}"
        elif found == {FEATURES_NAME}:
            remedy = f"move the converted features out of it and give them as `features`, or {remedy}"
        raise ValueError(f"`output_dir` {output_dir} is not empty: {remedy}")


def export_folder(output_dir: Path, export: Path) -> Path:
    """Where a run exports its model of sentences and images to.

    Args:
        output_dir: the folder of the run.
        export: from there on.

    Raises:
        ValueError: if the run needs that folder for something else.
    """
    path = output_dir / export
    own = [
        output_dir,
        *(output_dir / name for name in (CHECKPOINTS_NAME, EVENTS_NAME, FEATURES_NAME, LAST_NAME, HEADS_DIR)),
    ]
    if path.resolve() in [each.resolve() for each in own]:
        raise ValueError(f"`export` {path} is a folder of the run itself: choose another")
    return path


def precision_to_resume(output_dir: Path, bf16: bool | None) -> bool | None:
    """Whether a run goes on in bfloat16: as it was begun, unless float32 is asked for.

    Args:
        output_dir: the folder of the run.
        bf16: what is asked for; None is nothing.

    Raises:
        ValueError: if it was begun in bfloat16 and this machine is slower at that.
    """
    path = output_dir / RUN_NAME
    if bf16 is not None or not path.is_file():
        return bf16
    recorded = bool(read_json(path, _DAMAGED).get("bf16"))
    if recorded and not bfloat16_is_faster(device_type()):
        raise ValueError(
            f"the run in {output_dir} was begun in bfloat16, and {no_bfloat16(device_type())}: go on where it was "
            "begun, or set `bf16=False` to go on in float32"
        )
    return recorded


def run_to_go_on(output_dir: Path, record: Mapping[str, Any], step: int = 0) -> dict[str, Any]:
    """The record of a new run, or of the one that is resumed; :data:`RUN_NAME` is to hold it.

    Args:
        output_dir: the folder, locked.
        record: "options", "processes", "bf16" and "data_sha256" of the run, for JSON.
        step: that a run is resumed from. If it goes from bfloat16 to float32 there, its record says so from now on
            ("bf16_until_step").

    Returns:
        The record that the run was started with.

    Raises:
        ValueError: if a run with other options or data was started here; names each difference. Also if an earlier
            version started it, whose checkpoints have no record of their files.
    """
    path = output_dir / RUN_NAME
    for left in output_dir.glob(".*.tmp"):  # what was being written at a kill
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()
    if not path.is_file():
        return dict(record)
    if not record["options"]["resume"]:
        raise ValueError(f"another process has trained in {output_dir} in the meantime: choose another directory")
    earlier = read_json(path, _DAMAGED)
    if "student_sha256" not in earlier and checkpoints_in(output_dir / CHECKPOINTS_NAME):
        raise ValueError(
            f"the run in {output_dir} was started by an earlier version of st-kdmcse, whose checkpoints cannot be "
            "checked: go on with that version, or choose another directory and train again"
        )
    in_float32 = bool(earlier.get("bf16")) and not record["bf16"]
    if in_float32:
        earlier |= {"bf16": False, "bf16_until_step": step}
    changes = changes_of_run(path, earlier, record)
    if changes:
        raise ValueError(
            f"the run in {output_dir} was started with other options or data: {'; '.join(changes)}. Give those again, "
            "or choose another directory"
        )
    if in_float32:
        logger.warning("the run was begun in bfloat16 and goes on in float32 from step %d", step)
    return earlier


def claim_student(output_dir: Path, run: dict[str, Any], student: Mapping[str, str]) -> None:
    """Enter the untrained student into the record of a run, or compare it with the one that the run was started with.

    Args:
        output_dir: the folder of the run.
        run: its record.
        student: SHA-256 of the parts of the student by name.

    Raises:
        ValueError: if it is another student; names the parts.
    """
    earlier = run.setdefault("student_sha256", dict(student))
    changed = [name for name, checksum in student.items() if earlier.get(name) != checksum]
    if changed:
        raise ValueError(
            f"the {' and the '.join(changed)} at `model` have changed since the run in {output_dir} was started: "
            "restore them, or choose another directory"
        )


class ChangedError(ValueError):
    """Data or the student are not those of the run that is to be repeated.

    Attributes:
        names: of what has changed, such as "text".
    """

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = names


def check_unchanged(recorded: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to take for a repetition what reads other data, or begins with another student.

    Args:
        recorded: SHA-256 by name, of the run that is to be repeated. What ``now`` lacks is not compared.
        now: the same as it is now.

    Raises:
        ChangedError: if one has changed; names each.
    """
    changed = [name for name in recorded if name in now and recorded[name] != now[name]]
    if changed:
        sums = ", ".join(f"{name} was {recorded[name][:12]}, is {now[name][:12]}" for name in changed)
        raise ChangedError(f"this would not repeat the run: what it was made of has changed (SHA-256: {sums})", changed)


def changes_of_run(path: Path, earlier: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """What differs between two records of a run, in words.

    Args:
        path: the file of the earlier record, for the error.
        earlier: the record of before.
        record: the record of now.

    Raises:
        ValueError: if the earlier record is damaged.
    """
    try:
        before, now = (
            {**each["options"], "processes": each["processes"], "bf16": each["bf16"]} for each in (earlier, record)
        )
        checksums, now_checksums = earlier["data_sha256"], record["data_sha256"]
        changes = differences(before, now, _FREE_TO_CHANGE)
        names = sorted({*checksums, *now_checksums})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {_DAMAGED}") from error
    return changes + [
        f"the {name} data have changed" for name in names if checksums.get(name) != now_checksums.get(name)
    ]


def save_into(output_dir: Path, save: Callable[[Path], object]) -> None:
    """Save a model into the folder of a run, beside what is there; of one that cannot be saved, nothing stays.

    Args:
        output_dir: the folder.
        save: writes the model into a folder that it gets.
    """
    with writing(output_dir), TemporaryDirectory(dir=output_dir, prefix=".model.", suffix=".tmp") as folder:
        save(Path(folder))
        for path in Path(folder).iterdir():
            target = output_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)


def copy_model(checkpoint: Path, target: Path) -> None:
    """Copy the model of a checkpoint, without the state of the trainer."""
    ignored = shutil.ignore_patterns(*_STATE_FILES)
    with writing(target):
        write_folder(target, lambda folder: shutil.copytree(checkpoint, folder, ignore=ignored, dirs_exist_ok=True))
