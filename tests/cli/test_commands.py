"""Options from a file."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from helpers import copy_tree, load_command
from safetensors.numpy import load_file
from small_runs import flags, write_data

from st_kdmcse.cli.commands import Group, command
from st_kdmcse.cli.common import ListType
from st_kdmcse.cli.main import COMMANDS, EVALUATIONS, main


@pytest.fixture
def run(tmp_path):
    """Call a command with a file of options; the values that it got, or the error."""

    @command()
    @click.argument("places", nargs=-1)
    @click.option("--model", required=True)
    @click.option("--lr", "learning_rate", type=float, default=1.0)
    @click.option("--batch-size", type=click.IntRange(1))
    @click.option("--bf16/--no-bf16", default=None)
    @click.option("--deduplicate", is_flag=True)
    @click.option("--column", multiple=True)
    @click.option("--arms", type=ListType())
    def called(**values):
        click.echo(json.dumps(values))

    def call(content, *arguments, name="run.yaml"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        result = CliRunner().invoke(called, [*arguments, "--config", str(tmp_path / name)])
        return json.loads(result.output) if result.exit_code == 0 else result.output.replace("\n", " ")

    return call


def test_a_file_gives_what_the_command_line_does_not(run):
    given = run(
        "model: minilm\nlr: 3e-5\nbatch-size: 8\nbf16: false\ndeduplicate: true\ncolumn: [a, b]\narms: [x, y]\n"
    )
    assert given == {
        "places": [],
        "model": "minilm",
        "learning_rate": 3e-5,
        "batch_size": 8,
        "bf16": False,
        "deduplicate": True,
        "column": ["a", "b"],
        "arms": ["x", "y"],
    }
    given = run("model: minilm\nlearning_rate: 0.5\nbatch_size: 8\n", "--lr", "2", "--model", "other", "--bf16")
    assert (given["learning_rate"], given["model"], given["batch_size"], given["bf16"]) == (2.0, "other", 8, True)


def test_other_ways_to_write_it(run):
    assert run('{"model": "m", "lr": 3e-05}', name="run.json")["learning_rate"] == 3e-5
    assert run("model: 7\ncolumn: one\nplaces: [x]\nlr: null\narms: a,b")["places"] == ["x"]
    assert run("--model: m\n")["model"] == "m"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: m\nbatch-sise: 8", "no option 'batch-sise': did you mean 'batch-size'?"),
        ("model: m\nconfig: other.yaml", "there is no option 'config'"),
        ("model: m\nhelp: true", "there is no option 'help'"),
        ("model: m\nlr: 1\nlearning_rate: 2", "'learning_rate' is there twice"),
        ("model: no", "'model' is false, expected a text or number"),
        ("model: m\ndeduplicate: 1", "'deduplicate' is 1, expected true or false"),
        ("model: [a, b]", "'model' takes one value"),
        ("model: {a: b}", "'model' takes one value"),
        ("model: m\nbatch-size: many", "Invalid value for '--batch-size'"),
        ("model: m\nbatch-size: 0", "Invalid value for '--batch-size'"),
        ("lr: 1", "Missing option '--model'"),
        ("- model", "expected options by name"),
        ("", "expected options by name"),
        ("model: [", "cannot be read"),
        (b"model: \xff\xfe", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(run, content, message):
    assert message in run(content)


def test_a_file_that_is_not_there(tmp_path):
    result = CliRunner().invoke(main, ["merge", "--config", str(tmp_path / "no.yaml"), "store"])
    assert (result.exit_code, "no.yaml does not exist" in result.output) == (2, True)


def leaves(group, context=None):
    context = click.Context(group, parent=context)
    for name in group.list_commands(context):
        each = group.get_command(context, name)
        yield from leaves(each, context) if isinstance(each, click.Group) else [each]


def test_every_command_takes_a_file():
    commands = list(leaves(main))
    assert len(commands) >= len(COMMANDS) + len(EVALUATIONS)
    scripts = [*Path("training").glob("train_[!d]*.py"), *Path("evaluation").glob("*.py")]
    scripts = [load_command(str(script)) for script in scripts]
    commands += [each for each in scripts if not isinstance(each, Group)]
    assert len(commands) > 25
    assert [each.name for each in commands if "--config" not in {opt for one in each.params for opt in one.opts}] == []


def test_a_run_is_repeated_from_its_record(tmp_path, tiny_bert, sentences, store):
    data = write_data(tmp_path, sentences, store)
    options = {
        "output_dir": tmp_path / "out",
        "threshold": "none",
        "same_image": "positive",
        "pair_every": 3,
        "seed": 5,
    }
    arguments = [*flags(data, tiny_bert, **options), "--no-bf16"]
    first = CliRunner().invoke(main, ["train", "--preset", "coco", *arguments])
    assert first.exit_code == 0, first.output
    config, again = str(tmp_path / "out" / "run.json"), str(tmp_path / "again")
    second = CliRunner().invoke(main, ["train", "--config", config, "--output-dir", again])
    assert second.exit_code == 0, second.output
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("out", "again")]
    assert {**records[0]["options"], "output_dir": again, "bf16": False} == records[1]["options"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    (data / "text.txt").write_text((data / "text.txt").read_text() + "one more dog\n")
    repeat = ["train", "--config", config, "--output-dir", f"{again}-2", "--seed", "6"]
    result = CliRunner().invoke(main, repeat)
    assert result.exit_code == 2
    assert "this would not repeat the run: what it was made of has changed (SHA-256: text was " in result.output
    assert "Restore it, or name --text on the command line too" in result.output
    assert not Path(f"{again}-2").exists()
    encoder = copy_tree(tiny_bert, tmp_path / "encoder")
    settings = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**settings, "hidden_dropout_prob": 0.2}))
    record = json.loads(Path(config).read_text())
    record["options"]["model"] = str(encoder)
    (tmp_path / "moved.json").write_text(json.dumps(record))
    text = ["--text", str(data / "text.txt")]
    result = CliRunner().invoke(main, ["train", "--config", str(tmp_path / "moved.json"), *repeat[3:], *text])
    assert result.exit_code == 2
    assert "(SHA-256: configuration was " in result.output
    assert "name --model on the command line too" in result.output
    other = CliRunner().invoke(main, [*repeat, *text])
    assert other.exit_code == 0, other.output
    third = load_file(tmp_path / "again-2" / "model.safetensors")
    assert any((weights[0][name] != third[name]).any() for name in third)
