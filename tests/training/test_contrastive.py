"""The contrastive training of the tiny CLIP, and what the shipped models are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import lexiseg
from lexiseg.clip.load import load_clip
from lexiseg.clip.model import save_clip
from lexiseg.data.picture_world import SECOND, STUFF, find_world, render_scene
from lexiseg.errors import LexisegError
from lexiseg.recipes import ContrastiveRecipe, TrainSettings, is_recipe, load_recipe
from lexiseg.recipes.schema import ContrastiveSettings, SceneSettings
from lexiseg.training.contrastive import (
    ContrastiveTask,
    build_towers,
    crop_scene,
    incomplete_caption,
    patch_loss,
    zero_shot_accuracy,
)
from lexiseg.training.dry_run import dry_run
from lexiseg.training.run import build_task, identity, train
from lexiseg.training.trainer import Trainer
from lexiseg.weights import load_model

TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 24, "head_width": 12, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def settings(**changes: object) -> ContrastiveSettings:
    scenes = SceneSettings(size=32, num_things=(1, 2), seed=150, lag=2)
    return ContrastiveSettings(model_cfg=TOWERS, scenes=scenes).model_copy(update=changes)


def test_the_patch_loss_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    positives = torch.tensor([[True, False]])
    # Every patch gives the phrase half of its probability; half of the patches is more than a quarter.
    assert patch_loss(logits, positives, 0.25).item() == pytest.approx(math.log(2))
    # With the whole picture asked for, half of it is missing as well.
    assert patch_loss(logits, positives, 1.0).item() == pytest.approx(2 * math.log(2))
    sure = torch.tensor([[[50.0, 0.0], [50.0, 0.0]]])
    assert patch_loss(sure, positives, 1.0).item() == pytest.approx(0.0, abs=1e-5)


@torch.no_grad()
def test_the_other_losses_by_hand() -> None:
    task = ContrastiveTask(settings(), TrainSettings(steps=10, batch_size=4, lr=1e-2))
    task.model.eval()
    batch, things = task.batch(0), len(task.world.things)
    images, patches = task.encode_images(batch["images"])
    text = torch.nn.functional.normalize(task.clip.encode_text(batch["tokens"]), dim=-1)
    names, captions, scale = text[:-4], text[-4:], task.clip.model.logit_scale.exp()

    def unlikely(scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        rows = [-row.softmax(0)[own].log().mean() for row, own in zip(scores, positives, strict=True) if own.any()]
        return torch.stack(rows).mean()

    present, scores, pairs = batch["present"], scale * images @ names.T, scale * images @ captions.T
    alike = torch.tensor([[bool((one == other).all()) for other in present] for one in present])
    expected = {
        "loss_names": unlikely(scores[:, :things], present[:, :things])
        + 0.5 * unlikely(scores[:, things:], present[:, things:]),
        "loss_captions": 0.5 * (unlikely(pairs, alike) + unlikely(pairs.T, alike)),
        "loss_patches": patch_loss(scale * patches @ names.T, present, task.settings.coverage),
    }
    expected["loss"] = expected["loss_names"] + 0.5 * expected["loss_captions"] + expected["loss_patches"]
    losses = task.losses(batch)
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value.item(), rel=1e-4), key


@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_training_lowers_the_loss(patch_dropout: float) -> None:
    task = ContrastiveTask(settings(patch_dropout=patch_dropout), TrainSettings(steps=10, batch_size=4, lr=1e-2))
    task.model.train()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-2)
    batch, values = task.batch(0), []
    for _ in range(12):
        losses = task.losses(batch)
        assert set(losses) == {"loss", "loss_names", "loss_captions", "loss_patches"}
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        values.append(losses["loss"].item())
    assert values[-1] < 0.8 * values[0]


def test_a_scene_comes_again_after_the_lag_and_batches_are_pure() -> None:
    train_settings = TrainSettings(steps=10, batch_size=4, lr=1e-3)
    task, other = (ContrastiveTask(settings(), train_settings) for _ in range(2))
    first, later = task.batch(0), task.batch(2)
    assert torch.equal(first["present"][:2], later["present"][2:]), "the two new ones of step 0 are shown again"
    assert not torch.equal(first["images"][:2], later["images"][2:]), "shifted or mirrored afresh"
    assert torch.equal(later["images"], other.batch(2)["images"])


def test_a_crop_says_what_is_in_it() -> None:
    scene, rng = render_scene([5, 1], 64, world=SECOND, things=("taxi", "apple")), np.random.default_rng(0)
    image, areas = crop_scene(scene, SECOND, rng, (1.0, 1.0))
    assert (image == scene.image).mean() > 0.3 and areas.sum() == pytest.approx(1)
    assert set(np.flatnonzero(areas)) <= set(np.unique(scene.label))
    shares = [crop_scene(scene, SECOND, rng, (0.05, 0.1))[1] for _ in range(40)]
    assert max(share[SECOND.class_ids["apple"]] for share in shares) > areas[SECOND.class_ids["apple"]]


def test_a_caption_names_one_or_two_of_the_things() -> None:
    areas = np.zeros(len(SECOND.classes))
    areas[[SECOND.class_ids[name] for name in ("taxi", "apple", "bus", "sand", "sky")]] = 0.3, 0.1, 0.01, 0.4, 0.19
    rng, mentioned, sentences = np.random.default_rng(0), [], []
    for _ in range(200):
        text, named = incomplete_caption(rng, SECOND, areas, (1, 2), 0.3)
        names = [SECOND.classes[index] for index in named]
        assert all(name in text for name in names) and 1 <= len(set(names) - set(STUFF)) <= 2
        mentioned += names
        sentences.append(text)
    assert "bus" not in mentioned, "too small to be spoken of"
    assert mentioned.count("taxi") > mentioned.count("apple") > 20 and mentioned.count("sky") > 5
    assert len({text for text in sentences if "taxi" not in text}) > 1
    areas[: len(SECOND.things)] = 0
    assert incomplete_caption(rng, SECOND, areas, (1, 2), 0.0)[1][0] >= len(SECOND.things), "stuff, for want of things"


def test_without_names_and_patches_only_the_captions_are_compared() -> None:
    scenes = SceneSettings(world="picture-world-2", size=32, num_things=(1, 2), crops=(0.3, 1.0), seed=150, lag=2)
    alone = settings(scenes=scenes, names_weight=0.0, patch_weight=0.0, caption_weight=1.0)
    task = ContrastiveTask(alone, TrainSettings(steps=10, batch_size=4, lr=1e-2))
    batch = task.batch(0)
    assert batch["tokens"].shape[0] == 4, "no list of words beside the batch's sentences"
    losses = task.losses(batch)
    assert set(losses) == {"loss", "loss_captions"} and losses["loss"] == losses["loss_captions"]


def test_a_scene_is_drawn_once_however_often_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = SceneSettings(size=32, num_things=(1, 1), seed=150, repeats=3, lag=2)
    task, drawn = ContrastiveTask(settings(scenes=scenes), TrainSettings(steps=10, batch_size=3, lr=1e-2)), []

    def spy(seed: list[int], *arguments: object, **options: object) -> object:
        drawn.append(tuple(seed))
        return render_scene(seed, *arguments, **options)

    monkeypatch.setattr("lexiseg.training.contrastive.render_scene", spy)
    for index in range(12):
        task.batch(index)
    assert len(drawn) == len(set(drawn)) == 12 + 2 * 2, "one new scene a step, and those shown before step 0"


def test_a_late_class_token_reads_patches_that_never_saw_it() -> None:
    torch.manual_seed(0)
    task = ContrastiveTask(settings(late_class_token=1.0), TrainSettings(steps=10, batch_size=2, lr=1e-2))
    images, tower = task.batch(0)["images"], task.clip.image_tower
    task.model.train()
    image = task.encode_images(images)[0]
    tokens, grid = tower.embed(images)
    alone = tower.run(tokens[:, 1:], grid, stop=1).tokens
    last = tower.project(tower.run(torch.cat([tokens[:, :1], alone], 1), grid, first=1).tokens)
    assert torch.allclose(image, torch.nn.functional.normalize(last[:, 0], dim=-1), atol=1e-6)
    task.model.eval()
    usual = tower.project(tower.run(tokens, grid).tokens)
    assert torch.allclose(task.encode_images(images)[1], torch.nn.functional.normalize(usual[:, 1:], dim=-1), atol=1e-6)
    assert not torch.allclose(task.encode_images(images)[0], image, atol=1e-4)


def test_a_run_exports_a_clip_that_a_larger_one_starts_from(tmp_path: Path) -> None:
    numbers = TrainSettings(steps=2, batch_size=2, lr=1e-3, workers=0)
    small = train(
        ContrastiveRecipe(kind="contrastive", model=settings(), train=numbers), tmp_path / "small", progress=False
    )
    assert load_clip(small).image_size == 32
    with pytest.raises(LexisegError, match="It is a CLIP: write 'naclip/' before it"):
        load_model(tmp_path / "small")
    towers = {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], "image_size": 48}}
    task = ContrastiveTask(settings(model_cfg=towers, initial=str(small)), numbers)
    assert task.clip.visual.positional_embedding.shape[0] == 1 + 6 * 6
    same = load_clip(small).model.state_dict()["visual.conv1.weight"]
    assert torch.equal(task.clip.model.state_dict()["visual.conv1.weight"], same)


def test_a_moved_initial_clip_is_the_same_and_a_changed_one_is_not(tmp_path: Path) -> None:
    numbers = TrainSettings(steps=2, batch_size=2, lr=1e-3, workers=0)
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(seed)
        save_clip(build_towers(settings()), tmp_path / name)
        recipe = ContrastiveRecipe(kind="contrastive", model=settings(initial=str(tmp_path / name)), train=numbers)
        found.append(identity(recipe, build_task(recipe)))
    assert found[0] == found[1] != found[2]


def test_a_clip_of_other_towers_cannot_be_started_from() -> None:
    with pytest.raises(LexisegError, match=r"The initial CLIP 'clip-emoji' does not fit.*instead of"):
        ContrastiveTask(settings(initial="clip-emoji"), TrainSettings(steps=2, batch_size=2, lr=1e-3))


def test_a_text_tower_has_room_for_the_tokenizer() -> None:
    recipe = load_recipe("clip-emoji-small", ["model.model_cfg.text_cfg.vocab_size=1000"])
    with pytest.raises(LexisegError, match="is 1000, but its tokenizer has 49408 tokens"):
        dry_run(recipe)
    with pytest.raises(LexisegError, match="is 1000, but its tokenizer has 49408 tokens"):
        build_task(recipe)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.scenes.num_things=[3,1]"], "the smallest, 3, is above the largest, 1"),
        (["model.scenes.num_things=[90,100]"], "less than or equal to 84"),
        (["model.scenes.extents=[0.9,0.1]"], "the smallest, 0.9, is above"),
        (["model.scenes.extents=[0,0]"], "greater than 0"),
        (["model.scenes.crops=[0.9,0.1]"], "the smallest, 0.9, is above"),
        (["model.scenes.mentions=[3,1]"], "the smallest, 3, is above"),
        ([f"model.{term}_weight=0" for term in ("names", "caption", "patch")], "the loss has no term"),
    ],
)
def test_scenes_and_losses_that_cannot_be(changes: list[str], words: str) -> None:
    """They were tracebacks in the middle of a training, or were taken."""
    with pytest.raises(LexisegError, match=words):
        load_recipe("clip-emoji-small", changes)


@pytest.mark.parametrize(("name", "wanted"), [("clip-emoji", (0.75, 0.90)), ("clip-world2", (0.40, 0.70))])
def test_the_shipped_clip_names_what_it_sees(name: str, wanted: tuple[float, float]) -> None:
    recipe = load_recipe(name)
    clip = load_clip(name)
    assert isinstance(recipe, ContrastiveRecipe)
    assert clip.image_tower.num_blocks == 12
    assert clip.architecture["model_cfg"] == recipe.model.model_cfg, "the recipe is what made the weights"
    top1, top5 = zero_shot_accuracy(clip, world=find_world(recipe.model.scenes.world), num_rounds=1)
    assert top1 >= wanted[0] and top5 >= wanted[1]


def test_a_clip_that_diverged_is_not_written(tmp_path: Path) -> None:
    """Its last step is not followed by another, whose loss would have said so."""
    how = TrainSettings(steps=1, batch_size=2, lr=3e38, optimizer="sgd", workers=0, snapshot_every=1)
    trainer = Trainer(ContrastiveTask(settings(), how), how, tmp_path, device="cpu", tensorboard=False, progress=False)
    with pytest.raises(LexisegError, match=r"after step 1 hold NaN .* lower the learning rate"):
        trainer.run()
    assert not (tmp_path / "model").exists()


SHIPPED = {
    "zegclip-emoji": ("zegclip-picture-world", {}),
    "cascade-clip-emoji": ("cascade-clip-picture-world", {}),
    "second-look-emoji": ("second-look-picture-world", {}),
    "deop-emoji": ("deop-picture-world", {"leftover": {"count": 8}}),
    "cat-seg-world2": ("cat-seg-picture-world-2", {}),
}


def test_every_shipped_model_is_known_here() -> None:
    assert {entry.name for entry in lexiseg.list_models() if "/" not in entry.name} == set(SHIPPED)
    assert not [name for name in SHIPPED if is_recipe(name)], "`--initial NAME` would train the recipe"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_what_its_recipe_builds(name: str) -> None:
    recipe_name, changes = SHIPPED[name]
    model = load_model(name)
    recipe = load_recipe(recipe_name)
    assert recipe.kind == "segmentation"
    assert model.seen_names == find_world(recipe.data.source).seen, "no unseen class had masks"
    assert model.system == recipe.model.system
    assert model.options == type(model.options).model_validate({**recipe.model.options, **changes})
