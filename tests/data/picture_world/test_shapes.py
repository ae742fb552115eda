"""Pictures of shapes: regions without words, the same for the same seed, and proposals that start from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lexiseg.data.picture_world.classes import STUFF
from lexiseg.data.picture_world.shapes import MOST, Shapes, render_shapes
from lexiseg.data.picture_world.textures import NUM_VARIANTS, texture
from lexiseg.errors import LexisegError
from lexiseg.recipes import SegmentationRecipe, load_recipe
from lexiseg.training.dry_run import dry_run
from lexiseg.training.run import build_task, train
from lexiseg.training.segmentation import SegmentationTask
from lexiseg.weights import load_model
from tests.recipes.texts import recipe_text

TINY = ["train.steps=2", "train.batch_size=2", "train.workers=0", "data.size=64", "data.length=4"]
NARROW = {"num_queries": 4, "hidden_dim": 32, "pixel_dim": 32, "mask_dim": 32, "decoder_layers": 1, "ffn_dim": 16}
SMALL = [f"model.options.proposals.{name}={value}" for name, value in NARROW.items()]


def test_a_seed_gives_one_picture_and_every_pixel_a_region() -> None:
    pictures = [render_shapes([7, index], 64) for index in range(12)]
    for index, (image, label) in enumerate(pictures):
        again = render_shapes([7, index], 64)
        assert np.array_equal(image, again[0]) and np.array_equal(label, again[1])
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and label.max() < MOST
    # Proposals that were trained on shapes were measured with these.
    for index, brightness in ((0, 127.1), (3, 75.2)):
        assert float(Shapes("val", size=64)[index].image.float().mean()) == pytest.approx(brightness, abs=0.5)
    numbers = [len(np.unique(label)) for _, label in pictures]
    assert min(numbers) >= 2 and len(set(numbers)) > 3
    # A number says nothing of what a region is: the one at the top left has many.
    assert len({int(label[0, 0]) for _, label in pictures}) > 3


def test_splits() -> None:
    train_, val = Shapes("train", size=32), Shapes("val", size=32, length=3)
    assert len(train_) == 20_000 and len(val) == len(list(val)) == 3
    assert not torch.equal(train_[0].image, val[0].image)
    assert val[0].label.dtype == torch.int64 and len(val.vocabulary) == MOST
    with pytest.raises(IndexError):
        val[3]
    with pytest.raises(LexisegError, match="no split 'test'"):
        Shapes("test")


def test_no_texture_of_a_stuff_class_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {texture(name, variant).tobytes() for name in STUFF for variant in range(NUM_VARIANTS)}
    from lexiseg.data.picture_world import shapes

    assert not ours & {shapes.texture(number).tobytes() for number in range(8)}
    assert not hasattr(shapes, "load_atlas")


@pytest.mark.parametrize("kind", ["mask2former", "maskformer"])
def test_other_systems_start_from_proposals_trained_on_shapes(kind: str, tmp_path: Path) -> None:
    recipe = load_recipe(f"shapes:{kind}", [*TINY, *SMALL])
    folder = train(recipe, tmp_path / "run", tensorboard=False, progress=False)
    trained = load_model(folder)
    assert trained.generator.class_embed is None
    head = ["class_head=cosine-mlp", "class_hidden=8", "embed_dim=64"]
    world = [*SMALL, "data.source=picture-world", "model.options.regions=none"]
    changes = [
        *TINY,
        *world,
        *(f"model.options.proposals.{text}" for text in head),
        f"proposals_from={tmp_path / 'run'}",
    ]
    task = build_task(load_recipe(f"shapes:{kind}", changes))
    assert isinstance(task, SegmentationTask)
    ours, theirs = task.model.generator.state_dict(), trained.generator.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert {name for name in ours if name not in theirs} == {
        name for name in ours if name.startswith("class_embed.")
    }, "only the class head is new"
    with pytest.raises(LexisegError, match=r"weight is \(4, 32\) instead of \(5, 32\).*; give both the same options"):
        build_task(load_recipe(f"shapes:{kind}", [*changes, "model.options.proposals.num_queries=5"]))
    other = {"mask2former": "maskformer", "maskformer": "mask2former"}[kind]
    with pytest.raises(LexisegError, match=f"have kind {kind} and this generator {other}"):
        build_task(load_recipe(f"shapes:{other}", [*SMALL, f"proposals_from={folder}"]))


def test_a_recipe_of_proposals_is_trained_first(tmp_path: Path) -> None:
    path = tmp_path / "shapes.yaml"
    path.write_text(
        recipe_text("shapes:maskformer").replace("steps: 2400", "steps: 1").replace("size: 128", "size: 32")
    )
    recipe = load_recipe("shapes:maskformer", [*TINY, "train.steps=0", f"proposals_from={path}:maskformer"])
    assert str(path) in str(dry_run(recipe).proposals_from)
    train(recipe, tmp_path / "run", tensorboard=False, progress=False)
    first = load_model(tmp_path / "run" / "proposals").generator.state_dict()
    second = load_model(tmp_path / "run").generator.state_dict()
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_proposals_that_saw_masks_of_an_unseen_class_are_refused(tmp_path: Path) -> None:
    import json

    folder = train(load_recipe("shapes:maskformer", [*TINY, *SMALL]), tmp_path, tensorboard=False, progress=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "seen_names": ["dog", "giraffe"]}))
    recipe = load_recipe(
        "shapes:maskformer", [*TINY, *SMALL, "data.source=picture-world", f"proposals_from={tmp_path}"]
    )
    assert isinstance(recipe, SegmentationRecipe)
    with pytest.raises(LexisegError, match="trained on masks of 'giraffe'"):
        build_task(recipe)
