"""Train a sentence encoder on text and MS-COCO (wiki+coco)."""

from typing import Any

from st_kdmcse.cli.training import run_training, training_command
from st_kdmcse.training.presets import DatasetPreset


@training_command("coco")
def main(preset: DatasetPreset, arguments: dict[str, Any]) -> None:
    """Train."""
    run_training(arguments, preset)


if __name__ == "__main__":
    main()
