"""The picture world: same seed same pixels, exact masks, and no mask of an unseen class in anything trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from lexiseg.data.picture_world import (
    ABROAD,
    FIRST,
    SECOND,
    STUFF,
    WORLDS,
    PictureWorld,
    World,
    contact_sheet,
    find_world,
    render_scene,
    write_voc,
)
from lexiseg.data.picture_world.classes import CELL, load_atlas
from lexiseg.data.picture_world.dataset import SPLIT_SEEDS
from lexiseg.data.picture_world.scene import caption
from lexiseg.errors import LexisegError

UNSEEN_IDS = [FIRST.class_ids[name] for name in FIRST.unseen]
worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


def test_the_benchmark_has_the_promised_size() -> None:
    assert len(FIRST.things) >= 80 and len(STUFF) >= 12
    assert sum(name in FIRST.things for name in FIRST.unseen) >= 12 and sum(name in STUFF for name in FIRST.unseen) >= 3
    assert len(set(FIRST.classes)) == len(FIRST.classes) == len(FIRST.seen) + len(FIRST.unseen)
    assert FIRST.vocabulary.names == FIRST.classes
    assert [entry.name for entry in FIRST.vocabulary.classes if entry.seen is False] == [
        name for name in FIRST.classes if name in FIRST.unseen
    ]


def test_every_thing_has_a_glyph_of_its_own() -> None:
    glyphs = [np.asarray(glyph, np.float32) for glyph in load_atlas()]
    assert len(glyphs) == len(FIRST.things)
    for index, glyph in enumerate(glyphs):
        assert glyph.shape == (CELL, CELL, 4)
        assert (glyph[..., 3] > 127).mean() > 0.1, FIRST.things[index]
        assert (glyph[..., :3] <= glyph[..., 3:] + 1).all(), "premultiplied"
    small = np.stack([glyph.reshape(16, 8, 16, 8, 4).mean((1, 3)).ravel() for glyph in glyphs])
    distance = np.abs(small[:, None] - small[None]).mean(2) + 1000 * np.eye(len(small))
    first, second = np.unravel_index(distance.argmin(), distance.shape)
    assert distance.min() > 10, f"{FIRST.things[first]} looks like {FIRST.things[second]}"


def test_the_second_world_has_families_of_which_training_sees_a_part() -> None:
    assert len(SECOND.classes) == len(set(SECOND.classes)) >= 200 and len(SECOND.classes) < 255
    assert all(4 <= len(family) <= 7 for family in SECOND.families)
    for family in SECOND.families:
        assert 1 <= len(set(family) & set(SECOND.unseen)) <= 2 < len(family)
    assert set(SECOND.unseen) < set(SECOND.classes) and len(set(STUFF) & set(SECOND.unseen)) == 3
    assert ABROAD.classes == SECOND.classes and not set(ABROAD.styles) & set(SECOND.styles)
    with pytest.raises(LexisegError, match="no picture world 'x'; choose one of picture-world, "):
        find_world("x")


@pytest.mark.parametrize(
    ("world", "brightness"),
    [(FIRST, {0: 156.2, 1: 112.9, 4: 93.5}), (SECOND, {0: 142.3, 1: 117.8, 4: 63.4}), (ABROAD, {0: 169.7, 4: 80.2})],
    ids=WORLDS,
)
def test_scenes_are_those_the_weights_and_results_were_made_with(world: World, brightness: dict[int, float]) -> None:
    scenes = PictureWorld("val", world=world, size=64)
    for index, expected in brightness.items():
        assert float(scenes[index].image.float().mean()) == pytest.approx(expected, abs=0.5), index


@worlds
def test_every_drawing_of_every_style_is_there(world: World) -> None:
    for style in world.styles:
        glyphs = load_atlas(style)[: len(world.things)]
        assert len(glyphs) == len(world.things)
        for name, glyph in zip(world.things, glyphs, strict=True):
            assert (np.asarray(glyph)[..., 3] > 127).mean() > 0.06, (style, name)


def test_the_second_world_often_shows_things_with_their_like() -> None:
    family = {name: index for index, names in enumerate(SECOND.families) for name in names}
    pairs = [render_scene([5, seed], 32, world=SECOND, num_things=(2, 2)).things for seed in range(60)]
    alike = [family[pair[0]] == family[pair[1]] for pair in pairs if len(pair) == 2]
    assert 0.2 < np.mean(alike) < 0.65


def test_val_has_textures_that_training_has_not() -> None:
    for world in (SECOND, ABROAD):
        (first, number), (other, count) = world.train_textures, world.held_out_textures
        assert not set(range(first, first + number)) & set(range(other, other + count))
    trained, held_out = (render_scene([5, 1], 64, world=SECOND, held_out=flag).image for flag in (False, True))
    assert (trained != held_out).any()
    assert (PictureWorld("val", world=SECOND, size=64)[0].image.permute(1, 2, 0).numpy() == _val_scene()).all()


def _val_scene() -> np.ndarray:
    return render_scene([SPLIT_SEEDS["val"], 0], 64, world=SECOND, held_out=True).image


@worlds
@pytest.mark.parametrize("size", [64, 97])
def test_a_scene_is_a_pure_function_of_its_seed(size: int, world: World) -> None:
    one, two, other = (render_scene([5, seed], size, world=world) for seed in (1, 1, 2))
    assert one.image.shape == (size, size, 3) and one.label.shape == (size, size)
    assert (one.image == two.image).all() and (one.label == two.label).all() and one.caption == two.caption
    assert (one.image != other.image).any()


@worlds
def test_the_caption_names_what_is_visible_and_nothing_else(world: World) -> None:
    for seed in range(12):
        scene = render_scene([7, seed], 96, world=world)
        ids = set(np.unique(scene.label).tolist())
        for name in scene.things:
            assert world.class_ids[name] in ids and name in scene.caption
        large = {index for index in ids if (scene.label == index).mean() >= 0.01}
        assert large <= {world.class_ids[name] for name in scene.names}
        assert 1 <= len(scene.things) <= 6
        assert set(scene.stuff) <= set(STUFF)


def test_a_label_is_where_the_thing_is() -> None:
    with_thing = render_scene([11, 3], 128, things=("apple",))
    mask = with_thing.label == FIRST.class_ids["apple"]
    assert 0.02 < mask.mean() < 0.6
    inside = with_thing.image[mask].astype(float).mean(0)
    assert inside[0] > inside[1] + 40 and inside[0] > inside[2] + 40, "an apple is red where its mask says it is"


def test_captions_of_one_part_alone() -> None:
    rng = np.random.default_rng(0)
    assert "owl" in caption(rng, ("owl",), ())
    assert "brick" in caption(rng, (), ("brick",))
    assert "owl" in (text := caption(rng, ("owl",), ("brick",))) and "brick" in text


@worlds
def test_the_train_split_never_shows_a_mask_of_an_unseen_class(world: World) -> None:
    train = PictureWorld("train", world=world, size=64, length=40)
    ids = [world.class_ids[name] for name in world.unseen]
    hidden = 0
    for index, sample in enumerate(train):
        assert not np.isin(sample.label.numpy(), ids).any()
        truth = render_scene([SPLIT_SEEDS["train"], index], 64, world=world).label
        unseen = np.isin(truth, ids)
        hidden += int(unseen.sum())
        assert (sample.label.numpy()[unseen] == 255).all() and (sample.label.numpy()[~unseen] == truth[~unseen]).all()
    assert hidden > 0, "the scenes must contain unseen classes for this to mean anything"


@pytest.mark.parametrize("split", ["val", "test"])
def test_val_and_test_show_every_kind_of_class_exactly(split: Literal["val", "test"]) -> None:
    val = PictureWorld(split, size=64, length=60)
    ids = torch.cat([sample.label.flatten() for sample in val]).unique().tolist()
    assert set(ids) & set(UNSEEN_IDS) and max(ids) < len(FIRST.classes)
    assert len(val) == 60 and val[3].image.dtype == torch.uint8 and val[3].image.shape == (3, 64, 64)
    with pytest.raises(IndexError):
        val[60]


def test_an_unknown_split_is_one_sentence() -> None:
    with pytest.raises(LexisegError, match=r"no split 'dev'"):
        PictureWorld("dev")  # type: ignore[arg-type]


def test_written_to_disk_it_is_a_voc_folder(tmp_path, monkeypatch) -> None:
    drawn = []
    with monkeypatch.context() as patch:
        draw = lambda seed, *more, **how: drawn.append(seed) or render_scene(seed, *more, **how)  # noqa: E731
        patch.setattr("lexiseg.data.picture_world.dataset.render_scene", draw)
        root = write_voc(tmp_path / "world", num_train=6, num_val=4, size=64)
    assert len(drawn) == 10  # each scene once
    for split, count in (("train", 6), ("val", 4)):
        names = (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
        assert len(names) == count
        data = PictureWorld(split, size=64, length=count)
        for index, name in enumerate(names):
            mask = Image.open(root / "SegmentationClass" / f"{name}.png")
            assert mask.mode == "P"
            assert (np.asarray(mask) == data[index].label.numpy()).all()
            image = np.asarray(Image.open(root / "JPEGImages" / f"{name}.jpg").convert("RGB"), float)
            assert np.abs(image - data[index].image.permute(1, 2, 0).numpy()).mean() < 8
            if split == "train":
                assert not np.isin(np.asarray(mask), UNSEEN_IDS).any()
    assert (root / "classes.txt").read_text().splitlines() == list(FIRST.classes)
    assert (root / "unseen.txt").read_text().splitlines() == list(FIRST.unseen)
    assert len((root / "captions.txt").read_text().splitlines()) == 10
    write_voc(root, num_train=1, num_val=0, size=32)
    (root / "classes.txt").write_text("cat\n")
    for folder in (root, root / "JPEGImages"):  # somebody's own data
        with pytest.raises(LexisegError, match="holds files that are not part of"):
            write_voc(folder, num_train=1, num_val=0, size=32)
    assert (root / "classes.txt").read_text() == "cat\n"


def test_the_contact_sheet_is_one_picture() -> None:
    assert contact_sheet(rows=1, columns=2, size=32).size == (68, 32)


@worlds
def test_scenes_can_do_without_unseen_classes(world: World) -> None:
    unseen = {world.class_ids[name] for name in world.unseen}
    hidden, shown = (PictureWorld("train", world=world, size=32, unseen=unseen) for unseen in (True, False))
    assert any((hidden[index].label == 255).any() for index in range(20))
    for index in range(60):
        assert not unseen & set(shown[index].label.unique().tolist()) and (shown[index].label != 255).all()


def test_kept_scenes_are_those_that_would_be_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, kept = PictureWorld("train", size=32), PictureWorld("train", size=32, cache_dir=tmp_path)
    for _ in range(2):
        for index in (7, 2):
            assert torch.equal(kept[index].image, plain[index].image)
            assert torch.equal(kept[index].label, plain[index].label)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])  # as if stopped while it was written
    assert torch.equal(kept[7].image, plain[7].image)
    image, label = plain[2].image, plain[7].label
    monkeypatch.setattr("lexiseg.data.picture_world.dataset.render_scene", None)
    again = PictureWorld("train", size=32, cache_dir=tmp_path)
    assert torch.equal(again[2].image, image) and torch.equal(again[7].label, label)
    with pytest.raises(TypeError):
        again[3]  # between the two, and never rendered
    with pytest.raises(IndexError):
        again[len(again)]
