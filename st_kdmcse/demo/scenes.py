"""Captioned scenes of coloured shapes: images, paraphrased captions and a gold similarity, all from a seed.

A scene holds one or two groups of equal shapes; two groups are laid out side by side or one above the other. Scenes
fall into a ``train`` and a ``heldout`` split by a hash of their content, so no held-out scene can occur in training.

One module, because images, captions and similarity are three views of one description of a scene.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "heldout"]
Point = tuple[float, float]
T = TypeVar("T")

SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "dot"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge"),
    "star": ("star", "asterisk"),
    "heart": ("heart", "valentine"),
    "cross": ("cross", "plus"),
    "diamond": ("diamond", "rhombus", "lozenge"),
    "ring": ("ring", "hoop", "loop"),
}
"""Names of each shape; the first one is the shape's key."""

COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald"),
    "blue": ("blue", "navy"),
    "yellow": ("yellow", "golden"),
    "orange": ("orange", "tangerine"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "black": ("black", "ebony"),
}
"""Names of each colour; the first one is the colour's key."""

SIZES: dict[str, tuple[str, ...]] = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
"""Names of each size; the first one is the size's key."""

COUNTS: dict[int, tuple[str, ...]] = {
    1: ("a", "one", "a single"),
    2: ("two", "a pair of", "a couple of"),
    3: ("three", "a trio of", "a group of three"),
}
"""Determiners of each number of objects in a group."""

RELATIONS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}
"""Names of the place of one group relative to another. Scenes store the first of each pair of opposites."""

_OPPOSITE = {"left of": "right of", "above": "below"}
_PLACES = {
    "left of": ("on the left", "at the left side"),
    "right of": ("on the right", "at the right side"),
    "above": ("at the top", "in the upper half"),
    "below": ("at the bottom", "in the lower half"),
}
_HELDOUT_FRACTION = 0.2
_MAX_SIMILARITY = 5.0
_GROUP_WEIGHTS = {"shape": 0.35, "colour": 0.35, "size": 0.15, "count": 0.15}
_RELATION_WEIGHT = 0.15
_PAIR_EDITS = (0, 1, 2, 3, 4, 6, None, None)  # None: an unrelated scene


@dataclass(frozen=True)
class Group:
    """Equal objects that stand together.

    Args:
        shape: A key of ``SHAPES``.
        colour: A key of ``COLOURS``.
        size: ``small`` or ``large``.
        count: Number of objects, 1 to 3.

    Raises:
        ValueError: If an attribute has no such value.
    """

    shape: str
    colour: str
    size: str
    count: int

    def __post_init__(self) -> None:
        for name, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("count", COUNTS)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {list(values)}.")


@dataclass(frozen=True)
class Scene:
    """One group of objects, or two groups and where the first stands relative to the second.

    Args:
        groups: One or two groups; two groups differ in shape or colour.
        relation: ``left of`` or ``above`` with two groups, None with one.

    Raises:
        ValueError: If the groups and the relation do not fit together.
    """

    groups: tuple[Group, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.groups) not in (1, 2):
            raise ValueError(f"A scene has 1 or 2 groups, not {len(self.groups)}.")
        relations: tuple[str | None, ...] = (None,) if len(self.groups) == 1 else tuple(_OPPOSITE)
        if self.relation not in relations:
            raise ValueError(
                f"A scene of {len(self.groups)} group(s) has a relation in {relations}: {self.relation!r}."
            )
        if len({(group.shape, group.colour) for group in self.groups}) < len(self.groups):
            raise ValueError(f"The groups of a scene differ in shape or colour: {self.groups}.")

    @property
    def split(self) -> Split:
        """The split that this scene belongs to; the same on every machine."""
        return "heldout" if _hash(self) % 1000 < 1000 * _HELDOUT_FRACTION else "train"


def make_scenes(n: int, seed: int, split: Split = "train") -> list[Scene]:
    """Draws scenes of one split.

    Args:
        n: Number of scenes, far below the 58 000 scenes of the smaller split.
        seed: Seed of the draw; the same seed gives the same scenes.
        split: Split to draw from.

    Returns:
        ``n`` distinct scenes.
    """
    rng = np.random.default_rng(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < n:
        scene = _draw_scene(rng)
        if scene.split == split:
            scenes[scene] = None
    return list(scenes)


def make_scene_pairs(n: int, seed: int) -> list[tuple[Scene, Scene]]:
    """Draws pairs of held-out scenes from identical, through some edits apart, to unrelated.

    Args:
        n: Number of pairs.
        seed: Seed of the draw; the same seed gives the same pairs.

    Returns:
        ``n`` pairs, in random order of closeness.
    """
    rng = np.random.default_rng(seed)
    return [_draw_heldout_pair(_pick(_PAIR_EDITS, rng), rng) for _ in range(n)]


def make_pairs(n: int, seed: int) -> list[tuple[str, str, float]]:
    """Draws sentence pairs with gold scores, as in the STS benchmark.

    Args:
        n: Number of pairs.
        seed: Seed of the draw; the same seed gives the same pairs.

    Returns:
        ``n`` triples (caption, caption, gold similarity in [0, 5]) of held-out scenes.
    """
    rng = np.random.default_rng((seed, 1))
    rows = []
    for first, second in make_scene_pairs(n, seed):
        if first == second:
            caption_a, caption_b = captions(first, 2, rng)
        else:
            caption_a, caption_b = captions(first, 1, rng)[0], captions(second, 1, rng)[0]
        rows.append((caption_a, caption_b, similarity(first, second)))
    return rows


def edit_scene(scene: Scene, n_edits: int, rng: np.random.Generator) -> Scene:
    """Changes a scene in a number of attributes.

    Args:
        scene: Scene to start from.
        n_edits: Number of single changes (shape, colour, size or count of a group, or the places of the groups); a
            later change can touch the same attribute again.
        rng: Source of the choices.

    Returns:
        The changed scene, which may lie in the other split.
    """
    for _ in range(n_edits):
        changed = scene
        while changed == scene:
            changed = _edit_once(scene, rng)
        scene = changed
    return scene


def similarity(scene_a: Scene, scene_b: Scene) -> float:
    """Gold similarity of two scenes: how many weighted attributes agree under the best matching of their groups.

    Shape and colour of a group weigh 0.35 each, size and count 0.15 each; counts agree by degrees. Unmatched groups
    agree in nothing. Where a scene has two groups, their relation makes up 15 percent of the score.

    Args:
        scene_a: One scene.
        scene_b: The other scene.

    Returns:
        A number in [0, 5]; 5 for the same scene. Symmetric.
    """
    larger, smaller = sorted((scene_a, scene_b), key=lambda scene: -len(scene.groups))
    best = 0.0
    for order in permutations(range(len(larger.groups))):
        matched = zip((larger.groups[i] for i in order), smaller.groups, strict=False)
        score = sum(_group_similarity(a, b) for a, b in matched) / len(larger.groups)
        if larger.relation:
            same_relation = order == (0, 1) and larger.relation == smaller.relation
            score = (1 - _RELATION_WEIGHT) * score + _RELATION_WEIGHT * same_relation
        best = max(best, score)
    return min(_MAX_SIMILARITY, _MAX_SIMILARITY * round(best, 6))


def captions(scene: Scene, n: int, rng: np.random.Generator) -> list[str]:
    """Describes a scene in several ways that share few words.

    Args:
        scene: Scene to describe.
        n: Number of captions.
        rng: Source of the choices of words, order and sentence.

    Returns:
        ``n`` distinct lower-case captions of the same meaning, each naming every attribute.
    """
    chosen: list[str] = []
    while len(chosen) < n:
        candidates = [_caption(scene, rng) for _ in range(4 if chosen else 1)]
        candidate = min(candidates, key=lambda text: max((_word_overlap(text, other) for other in chosen), default=0))
        if candidate not in chosen:
            chosen.append(candidate)
    return chosen


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Draws a scene, anti-aliased; small shifts of the objects depend on the scene alone.

    Args:
        scene: Scene to draw.
        size: Width and height of the image in pixels.

    Returns:
        An RGB image of ``size`` x ``size`` pixels.
    """
    scale = 4
    canvas = Image.new("RGB", (size * scale, size * scale), (245, 245, 245))
    draw = ImageDraw.Draw(canvas)
    rng = np.random.default_rng(_hash(scene))
    for index, group in enumerate(scene.groups):
        radius = _RADIUS[group.size] * size * scale
        for x, y in _positions(scene, index, rng):
            _DRAW[group.shape](draw, x * size * scale, y * size * scale, radius, _RGB[group.colour])
    return canvas.reduce(scale)


def _hash(scene: Scene) -> int:
    key = f"{scene.relation}|" + "|".join(f"{g.shape},{g.colour},{g.size},{g.count}" for g in scene.groups)
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _draw_scene(rng: np.random.Generator) -> Scene:
    first = _draw_group(rng)
    if rng.random() < 0.2:
        return Scene((first,))
    second = _draw_group(rng)
    while (second.shape, second.colour) == (first.shape, first.colour):
        second = _draw_group(rng)
    return Scene((first, second), _pick(list(_OPPOSITE), rng))


def _draw_heldout_pair(n_edits: int | None, rng: np.random.Generator) -> tuple[Scene, Scene]:
    while True:
        scene = _draw_scene(rng)
        other = _draw_scene(rng) if n_edits is None else edit_scene(scene, n_edits, rng)
        if scene.split == other.split == "heldout":
            return scene, other


def _draw_group(rng: np.random.Generator) -> Group:
    return Group(_pick(list(SHAPES), rng), _pick(list(COLOURS), rng), _pick(list(SIZES), rng), int(rng.integers(1, 4)))


def _edit_once(scene: Scene, rng: np.random.Generator) -> Scene:
    attribute = _pick(["shape", "colour", "size", "count", "relation"], rng)
    if attribute == "relation":
        if scene.relation is None:
            return scene
        return Scene(_shuffled(scene.groups, rng), _pick(list(_OPPOSITE), rng))
    groups = list(scene.groups)
    index = int(rng.integers(len(groups)))
    groups[index] = replace(groups[index], **{attribute: getattr(_draw_group(rng), attribute)})
    if len({(group.shape, group.colour) for group in groups}) < len(groups):
        return scene
    return replace(scene, groups=tuple(groups))


def _group_similarity(a: Group, b: Group) -> float:
    count_agreement = 1 - abs(a.count - b.count) / (max(COUNTS) - 1)
    equal = sum(
        weight for name, weight in _GROUP_WEIGHTS.items() if name != "count" and getattr(a, name) == getattr(b, name)
    )
    return equal + _GROUP_WEIGHTS["count"] * count_agreement


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    if scene.relation is None:
        return _single_caption(scene.groups[0], rng)
    first, second = scene.groups
    relation, opposite = scene.relation, _OPPOSITE[scene.relation]
    if rng.random() < 0.5:
        first, second, relation, opposite = second, first, opposite, relation
    a, b = _noun_phrase(first, rng), _noun_phrase(second, rng)
    be, verb = _be(first), _pick(["sit", "lie", "appear"], rng) + ("s" if first.count == 1 else "")
    where = _pick(RELATIONS[relation], rng)
    style = int(rng.integers(len(_PLACES[relation])))
    place, other_place = _PLACES[relation][style], _PLACES[opposite][style]
    return _pick(
        [
            f"{a} {be} {where} {b}",
            f"{a} {verb} {where} {b}",
            f"there {be} {a} {where} {b}",
            f"{where} {b} {be} {a}",
            f"{_pick(_PICTURES, rng)} {a} {where} {b}",
            f"{place} {verb} {a}, {other_place} {b}",
            f"{a} {place} and {b} {other_place}",
            f"we see {a} {place} with {b} {other_place}",
        ],
        rng,
    )


def _single_caption(group: Group, rng: np.random.Generator) -> str:
    phrase = _noun_phrase(group, rng)
    return _pick(
        [
            phrase,
            f"there {_be(group)} {phrase}",
            f"{_pick(_PICTURES, rng)} {phrase}",
            f"nothing but {phrase}",
            f"we see {phrase}",
            f"{phrase} can be seen",
        ],
        rng,
    )


_PICTURES = ("a picture of", "an image showing", "a drawing with", "this picture shows")


def _noun_phrase(group: Group, rng: np.random.Generator) -> str:
    noun, colour, size = (
        _pick(names[key], rng) for names, key in ((SHAPES, group.shape), (COLOURS, group.colour), (SIZES, group.size))
    )
    if group.count > 1:
        noun += "es" if noun.endswith(("s", "x")) else "s"
    phrase = _pick(
        [
            f"{size} {colour} {noun}",
            f"{size} {colour} {noun}",
            f"{colour} {noun} of {size} size",
            f"{size} {noun} in {colour}",
            f"{noun} that {_be(group)} {size} and {colour}",
        ],
        rng,
    )
    determiner = _pick(COUNTS[group.count], rng)
    if determiner == "a" and phrase[0] in "aeiou":
        determiner = "an"
    return f"{determiner} {phrase}"


def _be(group: Group) -> str:
    return "is" if group.count == 1 else "are"


def _word_overlap(a: str, b: str) -> float:
    words_a, words_b = set(a.split()), set(b.split())
    return len(words_a & words_b) / len(words_a | words_b)


def _pick(values: Sequence[T], rng: np.random.Generator) -> T:
    return values[int(rng.integers(len(values)))]


def _shuffled(groups: tuple[Group, ...], rng: np.random.Generator) -> tuple[Group, ...]:
    return groups[::-1] if rng.random() < 0.5 else groups


# Drawing. Lengths are fractions of the image's width.

_RADIUS = {"small": 5.5 / 64, "large": 9 / 64}
_MAX_SHIFT = 4 / 64
_RGB = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (240, 215, 40),
    "orange": (245, 140, 30),
    "purple": (140, 50, 170),
    "cyan": (60, 205, 215),
    "black": (25, 25, 25),
}


def _positions(scene: Scene, index: int, rng: np.random.Generator) -> list[Point]:
    """Centres of a group's objects: a row, or a column where the groups stand side by side."""
    group = scene.groups[index]
    across = 0.5 if scene.relation is None else (0.25, 0.75)[index]
    shift = min(_MAX_SHIFT, 0.5 / max(COUNTS) - _RADIUS[group.size])
    positions = []
    for i in range(group.count):
        along_shift, across_shift = rng.uniform(-shift, shift, size=2)
        point = ((i + 0.5) / group.count + along_shift, across + across_shift)
        positions.append(point[::-1] if scene.relation == "left of" else point)
    return positions


def _polygon(
    points: Sequence[Point],
) -> Callable[[ImageDraw.ImageDraw, float, float, float, tuple[int, int, int]], None]:
    """Drawer of a polygon whose points lie around (0, 0) at unit radius, y downwards."""

    def draw_polygon(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, rgb: tuple[int, int, int]) -> None:
        draw.polygon([(x + radius * u, y + radius * v) for u, v in points], fill=rgb)

    return draw_polygon


def _circle(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, rgb: tuple[int, int, int]) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=rgb)


def _ring(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, rgb: tuple[int, int, int]) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=rgb, width=round(0.35 * radius))


def _star_points() -> list[Point]:
    radii = (1.1, 0.45)
    return [(radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)]


def _heart_points() -> list[Point]:
    turns = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]


_CROSS_POINTS = [(-1, -0.3), (-0.3, -0.3), (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3)]
_DRAW = {
    "circle": _circle,
    "square": _polygon([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]),
    "triangle": _polygon([(0, -1), (1, 0.85), (-1, 0.85)]),
    "star": _polygon(_star_points()),
    "heart": _polygon(_heart_points()),
    "cross": _polygon([*_CROSS_POINTS, *((-x, -y) for x, y in _CROSS_POINTS)]),
    "diamond": _polygon([(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)]),
    "ring": _ring,
}
