"""What is in a feature store, at a glance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from st_kdmcse.data.layout import IMAGES, MANIFEST, ROWS_PER_CHUNK, TEXTS, Array, RowNumbers
from st_kdmcse.data.scores import draw_captions, sampled_cosines
from st_kdmcse.data.store import FeatureStore
from st_kdmcse.files import ByteProgress, byte_progress

Measures: TypeAlias = "dict[str, float]"
"""Numbers by name: "min", "mean", "max", or the quantiles "5%", "25%", "50%", "75%", "95%"."""

_QUANTILES = (5, 25, 50, 75, 95)
_EXAMPLES = 5
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class Example:
    """A row of a store.

    Attributes:
        row: its number.
        image_id: the id of its image.
        caption: its caption.
    """

    row: int
    image_id: str
    caption: str


@dataclass(frozen=True)
class StoreReport:
    """What :func:`inspect_store` found; ``str(report)`` is a text for the terminal.

    Whatever cannot be measured is None: cosines of two captions of one image where no image has two, cosines of
    different images where there is one, those of captions with images where the two share no space, and what depends on
    row numbers or features where those are damaged. The cosine with a vector of zeros is 0.

    Attributes:
        path: the store's folder.
        teacher: the model that the features come from.
        dim: T, the width of the features.
        dtype: "float16" or "float32", as stored.
        normalized: whether all features have norm 1, as the store says.
        shared_space: whether image and text features can be compared with each other, as the store says.
        images: number of image rows.
        rows: number of captions.
        captions_per_image: min, mean and max.
        bytes_on_disk: of the store's files.
        checksums: "ok"; "no checksums" where there is no manifest and nothing else is wrong; or what is wrong.
        image_norms: min, mean and max of the norms of all image features.
        text_norms: the same of all caption features.
        sampled_images: how many images were drawn for the cosines, with one or two captions of each.
        cosine_own_image: quantiles of the cosine of a caption with its image.
        cosine_other_image: of a caption with another image.
        cosine_same_image_captions: of two captions of one image.
        cosine_other_captions: of two captions of different images.
        own_image_first: share, from 0 to 1, of the captions that are closer to their image than to any other drawn.
        examples: a few rows drawn at random.
    """

    path: str
    teacher: str
    dim: int
    dtype: str
    normalized: bool
    shared_space: bool
    images: int
    rows: int
    captions_per_image: Measures | None
    bytes_on_disk: int
    checksums: str
    image_norms: Measures | None
    text_norms: Measures | None
    sampled_images: int
    cosine_own_image: Measures | None
    cosine_other_image: Measures | None
    cosine_same_image_captions: Measures | None
    cosine_other_captions: Measures | None
    own_image_first: float | None
    examples: tuple[Example, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has; no number is NaN or infinite."""
        return asdict(self) | {"examples": [asdict(example) for example in self.examples]}

    def __str__(self) -> str:
        per_image = self.captions_per_image
        counts = ""
        if per_image:
            counts = f" ({per_image['min']:g} to {per_image['max']:g} an image, mean {per_image['mean']:.2f})"
        first = self.own_image_first
        lines = [
            self.path,
            f"  teacher    {_printable(self.teacher)}",
            f"  features   {self.dim} x {self.dtype}, {'' if self.normalized else 'not '}normalised"
            + ("" if self.shared_space else "; captions and images share no space"),
            f"  images     {self.images:,}",
            f"  captions   {self.rows:,}{counts}",
            f"  on disk    {self.bytes_on_disk / 1e6:,.1f} MB",
            f"  checksums  {self.checksums}",
            "",
            _row("Norms of all features", ["min", "mean", "max"]),
            _row("  images", _numbers(self.image_norms, 3)),
            _row("  captions", _numbers(self.text_norms, 3)),
            "",
            _row(f"Cosines ({self.sampled_images:,} images drawn)", [f"{percent} %" for percent in _QUANTILES]),
            _row("  caption and its image", _numbers(self.cosine_own_image, 5)),
            _row("  caption and another image", _numbers(self.cosine_other_image, 5)),
            _row("  two captions of one image", _numbers(self.cosine_same_image_captions, 5)),
            _row("  captions of two images", _numbers(self.cosine_other_captions, 5)),
            f"Captions closest to their own image: {'n/a' if first is None else f'{first:.1%}'}",
            "",
            "Some captions",
            *(f"  {one.row}  {_printable(one.image_id)}  {_printable(one.caption)}" for one in self.examples),
        ]
        return "\n".join(lines)


def inspect_store(
    store: FeatureStore, seed: int = 0, sample: int = 1000, show_progress_bar: bool | None = None
) -> StoreReport:
    """Look at a store: what it holds, whether it is whole, and how well its features tell true pairs from others.

    Every byte is read, for checksums and norms. A store that opens is reported on even if it is damaged.

    Args:
        store: the store.
        seed: of the draws.
        sample: how many images to draw for the cosines, without replacement; all of them where there are fewer. Memory
            grows with its square (some 40 MB for 1,000).
        show_progress_bar: None shows one in a terminal if it takes more than two seconds.

    Raises:
        ValueError: if ``sample`` is less than 1.
    """
    if sample < 1:
        raise ValueError(f"sample is {sample}, expected the number of images to draw")
    generator = np.random.default_rng(seed)
    files = store.manifest.get("files", {})
    total = store.image_features.nbytes + store.text_features.nbytes
    checksums = _verdict(store, bool(files), show_progress_bar)
    with byte_progress(total, f"Measuring {store.path.name}", show_progress_bar) as progress:
        image_norms = _spread(_norms(store.image_features, progress))
        text_norms = _spread(_norms(store.text_features, progress))
    image_rows = _image_rows(store)
    names = [*files, MANIFEST] if files else [IMAGES, TEXTS, store.table_name]
    return StoreReport(
        path=str(store.path),
        teacher=store.teacher,
        dim=store.dim,
        dtype=str(store.dtype),
        normalized=store.normalized,
        shared_space=store.shared_space,
        images=store.num_images,
        rows=len(store),
        captions_per_image=_spread(np.bincount(image_rows, minlength=store.num_images)) if image_rows.size else None,
        bytes_on_disk=sum((store.path / name).stat().st_size for name in names),
        checksums=checksums,
        image_norms=image_norms,
        text_norms=text_norms,
        **_cosines(store, *draw_captions(image_rows, sample, generator)),
        examples=_examples(store, generator),
    )


def _verdict(store: FeatureStore, has_checksums: bool, show_progress_bar: bool | None) -> str:
    try:
        store.verify(show_progress_bar)
    except (ValueError, OSError) as error:
        return str(error)
    return "ok" if has_checksums else "no checksums"


def _norms(features: Array, progress: ByteProgress) -> npt.NDArray[np.float64]:
    norms = np.empty(len(features))
    for start in range(0, len(features), ROWS_PER_CHUNK):
        chunk = features[start : start + ROWS_PER_CHUNK]
        norms[start : start + len(chunk)] = np.sqrt(np.einsum("ij,ij->i", chunk, chunk, dtype=np.float64))
        progress.update(chunk.nbytes)
    return norms


def _image_rows(store: FeatureStore) -> RowNumbers:
    """The store's; empty if its row numbers are damaged."""
    try:
        return store.image_rows
    except ValueError:
        return np.empty(0, dtype=np.int64)


def _cosines(store: FeatureStore, first: RowNumbers, second: RowNumbers) -> dict[str, Any]:
    """The part of a report that compares features: of one row an image, and of second rows of some of the images."""
    found = sampled_cosines(store, first, second)
    shared, first_share = store.shared_space, found.own_image_first
    return {
        "sampled_images": found.images,
        "cosine_own_image": _quantiles(found.own_image) if shared else None,
        "cosine_other_image": _quantiles(found.other_image) if shared else None,
        "cosine_same_image_captions": _quantiles(found.same_image_captions),
        "cosine_other_captions": _quantiles(found.other_captions),
        "own_image_first": round(first_share, 6) if shared and first_share is not None else None,
    }


def _examples(store: FeatureStore, generator: np.random.Generator) -> tuple[Example, ...]:
    examples = []
    for row in sorted(generator.choice(len(store), min(_EXAMPLES, len(store)), replace=False).tolist()):
        try:
            examples.append(Example(row, store.image_id(row), store.caption(row)))
        except UnicodeDecodeError:  # a damaged table, which the checksums tell
            continue
    return tuple(examples)


def _spread(values: Array) -> Measures | None:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    return _measures(("min", "mean", "max"), (finite.min(), finite.mean(), finite.max()))


def _quantiles(values: Array) -> Measures | None:
    if not values.size:
        return None
    return _measures([f"{percent}%" for percent in _QUANTILES], np.percentile(values, _QUANTILES))


def _measures(names: Iterable[str], values: Iterable[float]) -> Measures:
    return {name: round(float(value), 6) for name, value in zip(names, values, strict=True)}


def _numbers(measures: Measures | None, count: int) -> list[str]:
    return [f"{value:.3f}" for value in measures.values()] if measures else ["n/a"] * count


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<30}" + "".join(f"{cell:>9}" for cell in cells)


def _printable(text: str) -> str:
    """On one line, cut to its first 100 characters, without control characters."""
    text = "".join(character if character.isprintable() else " " for character in text)
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
