"""Data for small training runs, and records of runs that were never trained."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from helpers import WORDS, copy_tree

GERMAN = [
    ("Ein Flugzeug hebt gerade ab.", "Ein Flugzeug startet.", 5.0),
    ("Ein Mann spielt eine große Flöte.", "Ein Mann spielt Flöte.", 3.8),
    ("Eine Frau schält Kartoffeln.", "Zwei Hunde toben im Schnee.", 0.2),
]
CHINESE = [("一架飞机正在起飞。", "飞机要起飞了。", 4.9), ("一个男人在吹笛子。", "两只狗在雪地里玩。", 0.4)]


def write_data(folder: Path, sentences, store) -> Path:
    """Text, features, and STS-B and STS12 in SentEval's layout: the more words two sentences share, the higher."""
    (folder / "text.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    copy_tree(store.path, folder / "features")
    generator = np.random.default_rng(5)
    for split in ("train", "dev", "test"):
        rows = (f"main\tfile\t2012\t0\t{gold}\t{one}\t{other}\n" for gold, one, other in _pairs(30, generator))
        write(folder / "STS/STSBenchmark" / f"sts-{split}.csv", "".join(rows))
    for name in ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"):
        pairs = list(_pairs(10, generator))
        write(folder / f"STS/STS12-en-test/STS.input.{name}.txt", "".join(f"{a}\t{b}\n" for _, a, b in pairs))
        write(folder / f"STS/STS12-en-test/STS.gs.{name}.txt", "".join(f"{gold}\n" for gold, *_ in pairs))
    return folder


def write_multilingual(folder: Path, languages, ending="parquet") -> Path:
    """STS-B in several languages, a folder each, as stsb_multi_mt has it on the hub."""
    card = ["---", "configs:"]
    for language, pairs in languages.items():
        (folder / language).mkdir(parents=True)
        table = pd.DataFrame(pairs, columns=["sentence1", "sentence2", "similarity_score"])
        card += [f"- config_name: {language}", "  data_files:"]
        for split in ("train", "dev", "test"):
            file = folder / language / f"{split}-00000-of-00001.{ending}"
            table.to_parquet(file) if ending == "parquet" else table.to_csv(file, index=False)
            card += [f"  - split: {split}", f"    path: {language}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")
    return folder


def options(data: Path, model: Path, **changes):
    """Options of a training of some steps."""
    return {
        "model": str(model),
        "text": data / "text.txt",
        "features": data / "features",
        "eval_data": str(data),
        "max_steps": 4,
        "batch_size": 8,
        "eval_steps": 2,
        **changes,
    }


def flags(data: Path, model: Path, **changes) -> list[str]:
    """The same for a script."""
    values = options(data, model, **changes)
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def write_summary(
    folder: Path, method="kdmcse", seed=0, best=0.8, last=0.79, test=0.77, options=None, **changes
) -> Path:
    """A finished run without its model, as it is trained with evaluation at steps 5 and 10."""
    summary = {
        "method": method,
        "recipe": "paper",
        "options": {
            "model": "/somewhere/models/tiny",
            "recipe": "paper",
            "max_seq_length": 32,
            "deduplicate": False,
            "pair_every": None,
            "captions_per_image": None,
            "eval_steps": 5,
            "gather_across_devices": False,
            "bf16": None,
            "config": {},
            **(options or {}),
        },
        "batch_size": 8,
        "learning_rate": 3e-5,
        "bf16": False,
        "processes": 1,
        "steps": 10,
        "seed": seed,
        "data_sha256": {"text": "a" * 64, "features": "b" * 64},
        "sts_dev_before": 0.7,
        "sts_dev_curve": [{"step": 5, "spearman": best}, {"step": 10, "spearman": last}],
        "sts_dev_best": {"step": 5, "spearman": best},
        "sts_dev_last": {"step": 10, "spearman": last},
        "sts_test_of_best": test,
        "train_seconds": 2.5,
        "device": "cpu, 1 threads",
        "versions": {"torch": "2.5"},
        "date": "2026-01-01T00:00:00+00:00",
        **changes,
    }
    write(folder / "training_summary.json", json.dumps(summary))
    return folder


def write(path: Path, content: str) -> None:
    """A text file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def _pairs(count, generator):
    for _ in range(count):
        words = list(generator.choice(WORDS, size=6))
        changed = int(generator.integers(0, 6))
        other = [*words[: 6 - changed], *generator.choice(WORDS, size=changed)]
        yield f"{5 - 5 * changed / 6:.3f}", " ".join(words), " ".join(other)
