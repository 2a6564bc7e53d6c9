"""Options of the loss on the command line."""

import json
from dataclasses import fields

import click
import pytest
from click.testing import CliRunner
from helpers import load_command
from small_runs import flags, write_data

from st_kdmcse import KDMCSEConfig
from st_kdmcse.cli.training import config_options, given_config


def parsed(*arguments):
    found = {}
    command = click.command()(config_options(lambda **given: found.update(given)))
    result = CliRunner().invoke(command, list(arguments))
    if result.exit_code:
        raise ValueError(result.output)
    return given_config(found)


def test_every_option_has_a_flag_but_those_of_experiments():
    result = CliRunner().invoke(click.command()(config_options(lambda **given: None)), ["--help"])
    for option in fields(KDMCSEConfig):
        flag = "--" + option.name.replace("_", "-")
        assert (f"{flag} " in result.output or f"{flag} /" in result.output) == (option.name != "reverse_margin")
    assert parsed() == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--list-weight 1 --list-text-weight 0 --list-cross-weight .5 --list-image-weight 2", None),
        ("--list-loss listmle --list-length 8 --list-shuffle", None),
        ("--list-temperature .4 --list-student-temperature .1", None),
        ("--same-image positive --same-image-weight 0.5", None),
        ("--consistency-weight 0.1 --retention-weight 0.2", None),
        ("--soft-label-calibration none --filter-calibration standard", None),
        ("--filter-relative --filter-slack 0.1", None),
        ("--multimodal-weight auto", {"multimodal_weight": "auto"}),
        ("--multimodal-weight 0.3", {"multimodal_weight": 0.3}),
        ("--image-threshold none --text-threshold 0.4", {"image_threshold": None, "text_threshold": 0.4}),
    ],
)
def test_values_reach_the_config(arguments, expected):
    found = parsed(*arguments.split())
    assert expected is None or found == expected
    assert len(found) == arguments.count("--")
    config = KDMCSEConfig(**found)
    assert all(getattr(config, name) == value for name, value in found.items())
    assert found.get("soft_label_calibration", "none") == "none"


@pytest.mark.parametrize("arguments", ["--multimodal-weight none", "--same-image keep", "--list-length 2.5"])
def test_other_values_are_refused(arguments):
    with pytest.raises(ValueError, match=arguments.split()[0]):
        parsed(*arguments.split())


def test_a_run_with_all_of_it(tmp_path, tiny_bert, sentences, store):
    data = write_data(tmp_path, sentences, store)
    options = {
        "list_weight": 1,
        "soft_label_calibration": "quantile",
        "filter_calibration": "quantile",
        "threshold": 0.9,
        "same_image": "positive",
        "consistency_weight": 0.1,
        "retention_weight": 0.1,
        "multimodal_weight": "auto",
    }
    arguments = flags(data, tiny_bert, output_dir=tmp_path / "out", **options)
    result = CliRunner().invoke(load_command("training/train_flickr.py"), [*arguments, "--list-shuffle"])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    assert {name: summary["config"][name] for name in options if name != "threshold"} == {
        name: value for name, value in options.items() if name != "threshold"
    }
    assert set(summary["config"]["teacher_scores"]) == {"text-text", "cross", "image-image", "text-image"}
    assert all(branch["removed"] == pytest.approx(0.1, abs=0.05) for branch in summary["filters"])
    kept = json.loads((data / "features" / "statistics.json").read_text())
    assert kept["store"] == summary["data_sha256"]["features"]
