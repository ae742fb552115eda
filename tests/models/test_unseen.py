"""The unseen classes get captions and never a mask, in any stage of any shipped recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lexiseg.data.picture_world import FIRST, find_world, render_scene
from lexiseg.data.picture_world.dataset import SPLIT_SEEDS
from lexiseg.data.picture_world.scene import Scene
from lexiseg.errors import LexisegError
from lexiseg.losses.proposals import mask_targets
from lexiseg.recipes import ContrastiveRecipe, SegmentationRecipe, list_recipes, load_recipe
from lexiseg.training.contrastive import HELD_OUT_SEED, ContrastiveTask
from lexiseg.training.run import build_task
from lexiseg.training.segmentation import UNLABELLED, SegmentationTask, masked_names, training_vocabulary
from tests.towers import small_clip

RECIPES = {name: load_recipe(name) for name in list_recipes()}
SEGMENTATION = [
    name
    for name, recipe in RECIPES.items()
    if isinstance(recipe, SegmentationRecipe) and recipe.data.source.startswith("picture-world")
]
CONTRASTIVE = [name for name, recipe in RECIPES.items() if isinstance(recipe, ContrastiveRecipe)]
UNSEEN_IDS = [FIRST.class_ids[name] for name in FIRST.unseen]


def test_both_kinds_of_recipe_are_shipped() -> None:
    assert SEGMENTATION and CONTRASTIVE


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_never_meets_an_unseen_class(name: str) -> None:
    recipe = RECIPES[name]
    assert isinstance(recipe, SegmentationRecipe)
    dataset = recipe.data.open("train")
    assert recipe.setting in ("inductive", "transductive"), "supervised training would need masks of unseen classes"
    vocabulary = training_vocabulary(dataset.vocabulary, setting=recipe.setting)
    world = find_world(recipe.data.source)
    unseen = [world.class_ids[name] for name in world.unseen]
    assert masked_names(vocabulary) == world.seen
    if recipe.setting == "inductive":
        assert vocabulary.names == world.seen, "no text of an unseen class reaches the loss"
    seeds = [[SPLIT_SEEDS["train"], index] for index in range(8)]
    strict = getattr(recipe.data, "unseen_pictures", "hide") == "drop"
    without = world.unseen if strict else ()
    truths = [render_scene(seed, recipe.data.size, world=world, without=without).label for seed in seeds]
    assert any(np.isin(truth, unseen).any() for truth in truths) != strict, "otherwise this shows nothing"
    for index, truth in enumerate(truths):
        if strict:
            assert np.array_equal(dataset[index].label, truth), "the same scenes, with nothing hidden"
        label = dataset[index].label.numpy()
        assert (label[np.isin(truth, unseen)] == 255).all()


def test_a_batch_of_labels_holds_ranks_of_seen_classes_only() -> None:
    from lexiseg.models import ZegCLIP

    recipe = RECIPES["zegclip-picture-world"]
    dataset = recipe.data.open("train")
    model = ZegCLIP.build(
        small_clip(), {"num_prompts": 1, "decoder_layers": 1, "decoder_heads": 1}, seen_names=FIRST.seen
    )
    task = SegmentationTask(
        model,
        dataset,
        recipe.data.pipeline(model.mean, model.std),
        batch_size=4,
        label_stride=recipe.data.label_stride,
    )
    assert task.text.shape[0] == len(FIRST.seen)
    labels = task.batch(0).labels
    assert labels[labels != 255].max() < len(FIRST.seen)


@pytest.mark.parametrize("unlabelled", ["marked", "ignored"])
def test_self_training_learns_the_place_of_unseen_classes_and_nothing_else(
    unlabelled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels hold seen ids and "no label"; with other unseen classes in the same places they are the same labels."""
    recipe = small_self_training(unlabelled)
    task = build_task(recipe)
    assert isinstance(task, SegmentationTask)
    assert task.vocabulary.names == FIRST.classes and task.model.seen_names == FIRST.seen
    labels = [task.batch(index).labels for index in range(3)]
    seen_ids = {FIRST.class_ids[name] for name in FIRST.seen}
    for batch in labels:
        assert set(batch.unique().tolist()) <= seen_ids | {UNLABELLED}
    assert any((batch == UNLABELLED).any() for batch in labels), "otherwise this shows nothing"

    turned = np.arange(256)
    turned[UNSEEN_IDS] = np.roll(UNSEEN_IDS, 1)
    changed = []

    def other_scene(*arguments: Any, **options: Any) -> Scene:
        scene = render_scene(*arguments, **options)
        changed.append(np.isin(scene.label, UNSEEN_IDS).any())
        return replace(scene, label=turned[scene.label].astype(scene.label.dtype))

    monkeypatch.setattr("lexiseg.data.picture_world.dataset.render_scene", other_scene)
    assert all(torch.equal(task.batch(index).labels, batch) for index, batch in enumerate(labels))
    assert any(changed)


def small_self_training(unlabelled: str) -> SegmentationRecipe:
    """A shipped recipe with the setting changed, and everything that takes time made small."""
    recipe = RECIPES["zegclip-picture-world"]
    assert isinstance(recipe, SegmentationRecipe)
    values = recipe.model_dump(mode="json") | {"setting": "transductive", "unlabelled": unlabelled}
    values["model"]["options"] |= {"num_prompts": 1, "decoder_layers": 1, "init": "random"}
    values["data"] |= {"size": 64, "length": 12}
    values["train"] |= {"batch_size": 4, "snapshot_every": 0}
    return SegmentationRecipe.model_validate(values)


SYSTEMS = ("zsseg", "zegformer", "freeseg", "deop")
FAMILY = [name for name in SEGMENTATION if name.startswith("decoupled-picture-world:")]
DECOUPLED = [name for name in SEGMENTATION if RECIPES[name].model.system in SYSTEMS and name not in FAMILY]


def test_every_stage_of_the_decoupled_systems_is_among_these_recipes() -> None:
    assert "proposals-picture-world" in DECOUPLED
    for name in DECOUPLED:
        recipe = RECIPES[name]
        assert isinstance(recipe, SegmentationRecipe)
        assert recipe.setting == "inductive" and recipe.initial in (None, *DECOUPLED)
    # The same systems on proposals that learned shapes outside the vocabulary.
    for name in FAMILY:
        recipe = RECIPES[name]
        assert isinstance(recipe, SegmentationRecipe)
        assert recipe.setting == ("transductive" if name.endswith("self-training") else "inductive")
        assert recipe.initial in (None, *FAMILY) and recipe.teacher in (None, *FAMILY)
        assert recipe.proposals_from in (None, "shapes:mask2former")


@pytest.mark.parametrize("name", DECOUPLED)
def test_no_stage_of_a_decoupled_system_is_given_an_unseen_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loss gets is the text of seen classes and their ranks, whichever unseen classes are in the picture."""
    recipe = RECIPES[name]
    assert isinstance(recipe, SegmentationRecipe)
    # Shipped proposals in the place of a first stage, which is trained otherwise.
    values = recipe.model_dump(mode="json") | {"initial": "deop-emoji" if recipe.initial else None}
    values["data"] |= {"size": 64, "length": 12}
    values["train"] |= {"batch_size": 4, "snapshot_every": 0}
    task = build_task(SegmentationRecipe.model_validate(values))
    assert isinstance(task, SegmentationTask)
    world = find_world(recipe.data.source)
    assert task.vocabulary.names == world.seen == task.model.seen_names and len(task.text) == len(world.seen)
    given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(images: torch.Tensor, labels: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
        given.append((labels, text))
        return {}

    monkeypatch.setattr(task.model, "losses", spy)
    for index in range(3):
        task.losses(task.batch(index))
    hidden, there = False, False
    for labels, text in given:
        ranks = labels[labels != 255]
        assert len(text) == len(world.seen) and ranks.min() >= 0 and ranks.max() < len(world.seen)
        # Matching makes a mask of each label there is, so what is hidden can be nobody's target.
        assert {int(rank) for target in mask_targets(labels) for rank in target.classes} <= set(range(len(world.seen)))
        hidden, there = hidden or bool((labels == 255).any()), there or bool(len(ranks))
    assert hidden and there, "otherwise this shows nothing"

    turned = np.arange(256)
    unseen = [world.class_ids[name] for name in world.unseen]
    turned[unseen] = np.roll(unseen, 1)

    def other_scene(*arguments: Any, **options: Any) -> Scene:
        scene = render_scene(*arguments, **options)
        return replace(scene, label=turned[scene.label].astype(scene.label.dtype))

    monkeypatch.setattr("lexiseg.data.picture_world.dataset.render_scene", other_scene)
    for index, (labels, _) in enumerate(given):
        assert torch.equal(task.batch(index).labels, labels)


@pytest.mark.parametrize("name", SEGMENTATION)
def test_no_recipe_can_be_turned_into_a_supervised_one(name: str) -> None:
    with pytest.raises(LexisegError, match="picture-world has no masks"):
        load_recipe(name, ["setting=supervised"])


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_the_clip_sees_captions_and_no_mask(name: str) -> None:
    recipe = RECIPES[name]
    assert isinstance(recipe, ContrastiveRecipe)
    scenes = recipe.model.scenes
    assert scenes.seed not in (*SPLIT_SEEDS.values(), HELD_OUT_SEED), "no val or held-out scene is trained on"
    train = recipe.train.model_copy(update={"batch_size": 2})
    small = {**recipe.model.model_cfg, "vision_cfg": {**recipe.model.model_cfg["vision_cfg"], "layers": 1}}
    task = ContrastiveTask(recipe.model.model_copy(update={"initial": None, "model_cfg": small}), train)
    batch = task.batch(0)
    assert set(batch) == {"images", "present", "tokens", "names"}
    assert batch["present"].shape == (2, len(find_world(scenes.world).classes)), "nothing says where"
    assert batch["images"].shape == (2, 3, scenes.size, scenes.size)
    assert torch.equal(batch["images"], task.batch(0)["images"]), "a pure function of the step"
