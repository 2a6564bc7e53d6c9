"""Runs that are pushed to a hub: a server of this machine, with the hub's HTTP interface."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import load_command
from hub_server import ORGANIZATION, USER, hub_server
from huggingface_hub import constants
from sentence_transformers import SentenceTransformer
from small_runs import flags, write_data

FILES = {
    *("README.md", "config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json"),
    *("sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json"),
    *("heads/heads.safetensors", "heads/heads_config.json"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences, store):
    return write_data(tmp_path_factory.mktemp("hub"), sentences, store)


@pytest.fixture
def hub(monkeypatch):
    """A server that the library takes for the hub, with a token that may write."""
    with hub_server() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield served


@pytest.fixture
def run(data, tiny_bert, tmp_path):
    def call(*more, **changes):
        arguments = [*flags(data, tiny_bert, output_dir=tmp_path / "out", **changes), *more]
        return CliRunner().invoke(load_command("training/train_flickr.py"), arguments)

    return call


def content(folder, files):
    return {name: (folder / name).read_bytes() for name in files}


def test_model_card_and_heads_are_pushed_and_nothing_else(hub, run, tmp_path):
    result = run("--private", push_to_hub="kdmcse-bert")
    assert result.exit_code == 0, result.output
    repo = hub.repos[f"{USER}/kdmcse-bert"]
    assert repo["private"]
    assert set(repo["files"]) - {"special_tokens_map.json", "vocab.txt"} == FILES
    assert repo["files"] == content(tmp_path / "out", repo["files"])
    assert f'SentenceTransformer("{USER}/kdmcse-bert")' in repo["files"]["README.md"].decode()
    assert str(tmp_path) not in repo["files"]["README.md"].decode()
    for name, each in repo["files"].items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(each)
    before, after = (
        SentenceTransformer(str(tmp_path / name), device="cpu").encode(["a dog"]) for name in ("out", "copy")
    )
    assert (before == after).all()


def test_a_push_that_fails_costs_nothing_and_the_command_that_is_named_does_it(hub, run, tmp_path):
    hub.refuses = "/commit/"
    result = run(push_to_hub=f"{ORGANIZATION}/model")
    assert result.exit_code == 2
    assert "4 steps in" in result.output
    assert "STS-B test of the best" in result.output
    assert f"it could not be pushed to {ORGANIZATION}/model" in result.output
    assert "storage quota exceeded" in result.output
    assert json.loads((tmp_path / "out/training_summary.json").read_text())["steps"] == 4
    command = shlex.split(result.output.splitlines()[-1])
    assert command[:2] == ["hf", "upload"]
    assert "--private" not in command
    hub.refuses = None
    (tmp_path / "out/evaluation").mkdir()
    (tmp_path / "out/evaluation/sts-best.json").write_text("{}")
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_write"}
    command[0] = str(Path(sys.executable).with_name("hf"))
    subprocess.run(command, env={**os.environ, **settings}, check=True, capture_output=True)
    files = hub.repos[f"{ORGANIZATION}/model"]["files"]
    assert set(files) - {"special_tokens_map.json", "vocab.txt"} == FILES
    assert files == content(tmp_path / "out", files)


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("hf_write", "a/b/c", "--push-to-hub a/b/c: Repo id must be in the form"),
        ("hf_write", "two words", "--push-to-hub two words: Repo id must use alphanumeric chars"),
        ("", "model", "--push-to-hub model needs a token that may write: log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", "model", "--push-to-hub model: the hub refuses, or cannot be reached: Invalid user token."),
        ("hf_read", "model", f"--push-to-hub model: the token of {USER} may read only"),
        ("hf_write", "other/model", "other is neither the user nor an organization of the token, which are user, lab"),
        ("hf_write", "public", f"--push-to-hub {USER}/public is there already and public"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_read(
    hub, run, tmp_path, monkeypatch, token, name, message
):
    hub.repos[f"{USER}/public"] = {"private": False, "files": {}}
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("st_kdmcse.training.run.TrainingInputs", None)
    result = run("--private", push_to_hub=name)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert list(hub.repos) == [f"{USER}/public"]
    assert not (tmp_path / "out").exists()


def test_a_token_that_may_not_write_there_is_found_before_training(hub, run, tmp_path):
    hub.refuses = "/repos/create"
    result = run(push_to_hub="model")
    assert result.exit_code == 2
    assert f"--push-to-hub {USER}/model: the hub refuses" in result.output
    assert not (tmp_path / "out/run.json").exists()


def test_private_needs_a_repository_and_no_hub_is_an_error(run, tmp_path):
    assert "--private is said of the repository of --push-to-hub" in run("--private").output
    result = run(push_to_hub="model")  # offline, as all tests
    assert result.exit_code == 2
    assert "--push-to-hub" in result.output
    assert not (tmp_path / "out").exists()
