"""The README and the guides as a reader uses them: their commands and programs run, on small data of those names."""

import json
import os
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import WORDS, copy_tree, load_command
from PIL import Image
from small_runs import write_data
from teacher_models import make_tiny_clip

from st_kdmcse.cli.main import COMMANDS, LazyGroup, main

pytest.importorskip("faiss")
pytest.importorskip("optuna")

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ("data-and-teachers", "train", "evaluate", "text-and-images", "search", "methods", "reproduce", "quickstart")
PAGES = ("README.md", *(f"docs/{name}.md" for name in (*GUIDES, "troubleshooting", "performance")))
TEXT = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
CLIP = "openai/clip-vit-base-patch32"

# What is added to a command, by its beginning: so that it ends within seconds, or for a teacher that is not on the hub.
ADDED = {
    "st-kdmcse export": f"--teacher {CLIP}",
    "st-kdmcse tune": "--trials 2 --max-steps 4 --model bert-base-uncased",
    "st-kdmcse extract": f"--teacher transformers:{CLIP}",
    "st-kdmcse ablate": "--seeds 2 --methods mcse,simcse --max-steps 2 --bootstrap 20",
    "st-kdmcse compare": "--bootstrap 20",
    "st-kdmcse evaluate sts": "--tasks STS12,STS-B",
    "python training/make_raw_student.py": "--model bert-base-uncased --max-steps 2",
}
# What is parsed with the options of its command and not run, and why.
PARSED = {
    "python evaluation/grounding_evidence.py": "56 runs; tests/experiments/test_evidence.py runs it",
    "st-kdmcse serve": "it serves until it is stopped; tests/cli/test_serve.py runs it",
    "st-kdmcse index copy": "it needs a Milvus server; make milvus runs it",
    "torchrun": "it needs several devices; tests/training/test_distributed.py runs it",
}
# What is neither, and what is looked at instead.
OTHERS = {
    "make": "it makes environments: there is such a target",
    "pip": "it installs: there is such an extra",
    "tensorboard": "it serves until it is stopped",
    "uv ": "it makes an environment",
    "st-kdmcse demo": "tests/cli/test_demo.py runs it",
    "python benchmarks": "options are left out in it: there is such a script",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def command_lines():
    """The lines of all bash blocks, in their order, joined where they go on in the next."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return list(dict.fromkeys(filter(None, map(str.strip, text.splitlines()))))


def inline_commands():
    """Commands in the text that are whole, with their options."""
    spans = re.findall(r"`((?:st-kdmcse|python|torchrun|tensorboard|make|pip) [^`]*)`", TEXT.replace("\n  ", " "))
    return [span.replace("\n", " ") for span in spans if "..." not in span]


def beginning(line, table):
    return next((entry for entry in table if line.startswith(entry)), None)


def found_command(line):
    """The command of a line, and its arguments."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "torchrun":
        arguments = arguments[arguments.index("st_kdmcse") + 1 :]
    if program == "python":
        return load_command(str(ROOT / arguments[0])), arguments[1:]
    command = main
    while isinstance(command, LazyGroup | click.Group):
        with click.Context(command) as context:
            command = command.get_command(context, arguments[0])
        assert command is not None, f"{line}: there is no command {arguments[0]}"
        arguments = arguments[1:]
    return command, arguments


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_bert, sentences, store):
    """A folder with small data under the names that the README has."""
    place = tmp_path_factory.mktemp("readme")
    copy_tree(tiny_bert, place / "bert-base-uncased")
    (place / "data").mkdir()
    write_data(place / "data", sentences, store)
    copy_tree(place / "data" / "STS", place / "SentEval/data/downstream/STS")
    copy_tree(place / "data" / "STS", place / "sentence-transformers/stsb/STS")
    for name in ("wiki1m_for_simcse.txt", "wiki_sentences.txt", "sentences.txt"):
        (place / name).write_text("\n".join(sentences) + "\n")
    (place / "more.txt").write_text("a small ball in the snow\nthe man runs on red grass\n")
    make_tiny_clip(place / CLIP)
    generator = np.random.default_rng(0)
    (place / "flickr30k-images").mkdir()
    names = [f"{number}.jpg" for number in range(24)]
    for name in names:
        pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "flickr30k-images" / name)
    Image.fromarray(pixels).save(place / "photo.jpg")
    captions = [f"{name}#{k}\t{' '.join(generator.choice(WORDS, 6))}" for name in names for k in range(2)]
    (place / "results_20130124.token").write_text("\n".join(captions) + "\n")
    for split in ("train", "test"):
        (place / f"{split}.txt").write_text("\n".join(names) + "\n")
    annotations = [{"id": key, "image_id": key, "caption": text} for key, text in enumerate(sentences[:40])]
    (place / "captions_val2017.json").write_text(json.dumps({"images": [], "annotations": annotations}))
    pairs = [f"x:sentid:{n},x:sentid:{39 - n},{generator.uniform(0, 5):.2f},c2c_isim" for n in range(20)]
    (place / "sts_val.csv").write_text("\n".join(["caption1,caption2,agg_score,sampling_method", *pairs]) + "\n")
    released = {
        f"{number}.jpg": {
            "image_feat": [float(number), 1.0],
            "captions": ["a dog"],
            "lang_feat": [[1.0, float(number)]],
        }
        for number in range(4)
    }
    (place / "flickr30k_ViT_L14.json").write_text(json.dumps(released))
    (place / "tune.yaml").write_text(next(block for block in blocks("yaml") if "search-space" in block))
    return place


@pytest.fixture(scope="module")
def ran(place):
    """The folder after all command lines were run, one after the other."""
    before = Path.cwd()
    os.chdir(place)
    try:
        (extract,) = (line for line in command_lines() if line.startswith("st-kdmcse extract"))
        run(extract)
        copy_tree(place / "flickr30k-features", place / "flickr30k-test-features")
        for line in command_lines():
            if line != extract and beginning(line, {**PARSED, **OTHERS}) is None:
                run(line)
    finally:
        os.chdir(before)
    return place


def run(line):
    command, arguments = found_command(line)
    result = CliRunner().invoke(command, [*arguments, *shlex.split(ADDED.get(beginning(line, ADDED), ""))])
    assert result.exit_code == 0, f"{line}\n{result.output}"


def test_each_command_line_runs(ran):
    made = ("kdmcse-bert", "raw-minilm", "results.json", "ablation/report/report.html", "kdmcse-bert-image")
    assert [name for name in (*made, "my-index", "my-images", "pairs.csv") if not (ran / name).exists()] == []
    assert len(list((ran / "tuning").glob("winner-*"))) == 1


@pytest.mark.parametrize("line", [*command_lines(), *inline_commands()])
def test_each_command_line_has_options_that_there_are(line):
    if line.startswith("make "):
        assert f"\n{line.split()[1]}:" in (ROOT / "Makefile").read_text()
    elif line.startswith("pip "):
        extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        asked = re.search(r"\[([\w,-]+)\]", line)
        assert asked is None or set(asked[1].split(",")) <= set(extras)
    elif line.startswith("python benchmarks"):
        assert (ROOT / line.split()[1]).is_file()
    elif beginning(line, OTHERS) is None:
        command, arguments = found_command(line)
        context = click.Context(command)
        command.make_parser(context).parse_args(list(arguments))


def test_each_flag_of_the_text_is_one_of_a_command():
    flags = set(re.findall(r"`[^`]*?(--[a-z][a-z0-9-]+)", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)))
    known = {"--help", "--nproc-per-node", "--logdir", "--force-reinstall"}  # the last ones of other programs

    def collect(command):
        if isinstance(command, click.Group):
            with click.Context(command) as context:
                for name in command.list_commands(context):
                    collect(command.get_command(context, name))
        known.update(flag for each in command.params for flag in (*each.opts, *each.secondary_opts))

    collect(main)
    collect(load_command(str(ROOT / "evaluation/grounding_evidence.py")))
    assert len(flags) > 50
    assert flags <= known


def test_it_is_read_in_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 900


def test_each_command_is_in_it():
    for name in COMMANDS:
        assert re.search(rf"(st-kdmcse {name}|`{name}`|make {name}|^\| `{name})", TEXT, re.MULTILINE), name


def test_each_program_runs(ran, monkeypatch, sentences):
    """The Python blocks, in their order, in one session; what a reader is to have is put in place."""
    from sentence_transformers import SentenceTransformer

    from st_kdmcse import FeatureStore
    from st_kdmcse.training.student import build_student

    monkeypatch.chdir(ran)
    features = np.eye(4, dtype=np.float32)
    session = {
        "SentenceTransformer": SentenceTransformer,
        "Image": Image,
        "sentences": sentences[:80],
        "image_features": features,
        "text_features": features,
        "captions": ["a dog", "a man", "a ball", "the snow"],
        "image_rows": np.arange(4),
        "image_ids": ["1", "2", "3", "4"],
    }
    programs = blocks("python")
    assert len(programs) == 9
    copy_tree(ran / "kdmcse-bert", ran / "kdmcse-bert-kept")
    for program in programs:
        if "fit_objectives" in program:  # of the first block, with as many examples as batches of 64 need
            from st_kdmcse import KDMCSELoss

            session["model"] = build_student("bert-base-uncased")
            session["store"] = FeatureStore.open("flickr30k-features")
            session["loss"] = KDMCSELoss(session["model"], features=session["store"])
            program = program.replace("batch_size=64", "batch_size=16")
        if "OpenCLIPTeacher" in program:  # its weights are fetched: another teacher, in a folder of its own
            program = program.replace("OpenCLIPTeacher", "CLIPTeacher").replace('"ViT-B-32", "openai"', repr(CLIP))
            program = program.replace('"flickr30k-features"', '"flickr30k-features-again"')
        if "SemanticIndex" in program:  # the model that the command lines have made an index with
            program = program.replace('SentenceTransformer("kdmcse-bert")', 'SentenceTransformer("kdmcse-bert-kept")')
            session["model"] = SentenceTransformer("kdmcse-bert-kept", device="cpu")
        exec(compile(program, "README.md", "exec"), session)
