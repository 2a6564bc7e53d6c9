import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_kdmcse.demo.scenes import (
    COLOURS,
    COUNTS,
    RELATIONS,
    SHAPES,
    SIZES,
    Group,
    Scene,
    captions,
    edit_scene,
    make_pairs,
    make_scene_pairs,
    make_scenes,
    render,
    similarity,
)

GROUPS = st.builds(
    Group,
    shape=st.sampled_from(list(SHAPES)),
    colour=st.sampled_from(list(COLOURS)),
    size=st.sampled_from(list(SIZES)),
    count=st.sampled_from(list(COUNTS)),
)
DOUBLES = st.tuples(GROUPS, GROUPS).filter(
    lambda pair: (pair[0].shape, pair[0].colour) != (pair[1].shape, pair[1].colour)
)
SCENES = st.one_of(
    st.builds(lambda group: Scene((group,)), GROUPS),
    st.builds(Scene, DOUBLES, st.sampled_from(["left of", "above"])),
)
STAR = Group("star", "red", "small", 2)
RING = Group("ring", "blue", "large", 1)
SCENE = Scene((STAR, RING), "left of")


def words_for(key, names, text):
    return any(name in text for name in names[key])


def test_a_seed_fixes_everything():
    assert make_scenes(50, seed=3) == make_scenes(50, seed=3) != make_scenes(50, seed=4)
    assert make_pairs(50, seed=3) == make_pairs(50, seed=3) != make_pairs(50, seed=4)
    assert captions(SCENE, 5, np.random.default_rng(0)) == captions(SCENE, 5, np.random.default_rng(0))
    assert render(SCENE).tobytes() == render(SCENE).tobytes()


def test_the_split_does_not_depend_on_the_process():
    scenes = [Scene((Group(shape, "red", "small", 1),)) for shape in SHAPES]
    assert [scene.split for scene in scenes] == [*6 * ["train"], "heldout", "train"]


def test_scenes_are_distinct_and_of_their_split():
    train, heldout = make_scenes(2000, seed=0), make_scenes(500, seed=0, split="heldout")
    assert len(set(train)) == 2000
    assert len(set(heldout)) == 500
    assert {scene.split for scene in train} == {"train"}
    assert {scene.split for scene in heldout} == {"heldout"}
    assert not set(train) & set(heldout)


def test_pairs_are_held_out():
    assert {scene.split for pair in make_scene_pairs(300, seed=0) for scene in pair} == {"heldout"}


def test_pairs_cover_the_range_of_gold_scores():
    rows = make_pairs(1000, seed=0)
    gold = [row[2] for row in rows]
    assert gold == [similarity(a, b) for a, b in make_scene_pairs(1000, seed=0)]
    assert np.histogram(gold, bins=5, range=(0, 5))[0].min() >= 30
    assert all(caption_a != caption_b for caption_a, caption_b, _ in rows)


@given(SCENES, SCENES)
def test_similarity_is_symmetric_and_bounded(a, b):
    assert similarity(a, b) == similarity(b, a)
    assert 0 <= similarity(a, b) <= 5
    assert (similarity(a, b) == 5) == (a == b)


@given(SCENES)
def test_a_scene_is_fully_similar_to_itself(scene):
    assert similarity(scene, scene) == 5


def test_similarity_of_worked_examples():
    assert similarity(Scene((STAR,)), Scene((Group("heart", "red", "small", 2),))) == pytest.approx(5 * 0.65)
    assert similarity(Scene((STAR,)), Scene((Group("star", "red", "small", 3),))) == pytest.approx(5 * 0.925)
    assert similarity(SCENE, Scene((RING, STAR), "left of")) == pytest.approx(5 * 0.85)
    assert similarity(SCENE, Scene((STAR, RING), "above")) == pytest.approx(5 * 0.85)
    assert similarity(SCENE, Scene((STAR,))) == pytest.approx(5 * 0.85 / 2)


@given(SCENES, st.integers(0, 2**32 - 1))
def test_every_caption_names_every_attribute(scene, seed):
    texts = captions(scene, 4, np.random.default_rng(seed))
    assert len(set(texts)) == 4
    for text in texts:
        for group in scene.groups:
            assert words_for(group.shape, SHAPES, text)
            assert words_for(group.colour, COLOURS, text)
            assert words_for(group.size, SIZES, text)


def test_captions_give_the_relation_in_both_orders():
    texts = captions(SCENE, 200, np.random.default_rng(0))
    for relation in ("left of", "right of"):
        assert any(words_for(relation, RELATIONS, text) for text in texts)
    assert not any(words_for(relation, RELATIONS, text) for text in texts for relation in ("above", "below"))


@given(SCENES, st.integers(0, 2**32 - 1))
def test_one_edit_keeps_scenes_close(scene, seed):
    edited = edit_scene(scene, 1, np.random.default_rng(seed))
    assert edited != scene
    assert similarity(scene, edited) >= 5 * 0.65


@given(SCENES, st.integers(16, 100))
def test_render_draws_within_the_size(scene, size):
    image = render(scene, size)
    assert image.size == (size, size)
    assert image.mode == "RGB"
    assert len(image.getcolors(maxcolors=size * size)) > 1


def test_render_shows_the_groups_where_the_relation_says():
    pixels = np.asarray(render(SCENE)).astype(int)
    red = (pixels[..., 0] - pixels[..., 2]) > 100
    blue = (pixels[..., 2] - pixels[..., 0]) > 100
    assert np.nonzero(red)[1].max() < 32 <= np.nonzero(blue)[1].min()


@pytest.mark.parametrize(
    ("groups", "relation", "message"),
    [
        ((), None, "1 or 2 groups"),
        ((STAR,), "above", "relation"),
        ((STAR, RING), None, "relation"),
        ((STAR, RING), "right of", "relation"),
        ((STAR, Group("star", "red", "large", 1)), "above", "differ"),
    ],
)
def test_an_impossible_scene_is_refused(groups, relation, message):
    with pytest.raises(ValueError, match=message):
        Scene(groups, relation)


def test_an_unknown_attribute_is_refused():
    with pytest.raises(ValueError, match="colour 'mauve' is not one of"):
        Group("star", "mauve", "small", 1)
