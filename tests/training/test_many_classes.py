"""Training with more classes than 8-bit labels hold, on the miniature of ADE20K 847: 65535 is the label of no class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lexiseg.clip.model import save_clip
from lexiseg.data.base import remap_to_seen
from lexiseg.data.transforms import is_varied, random_crop
from lexiseg.errors import LexisegError
from lexiseg.label_ids import ignore_index
from lexiseg.losses.mask_aware import mask_ious
from lexiseg.losses.masks import count_masks, mask_losses, pseudo_labels
from lexiseg.losses.regions import region_map_losses
from lexiseg.losses.ssim import ssim_loss
from lexiseg.models import SYSTEMS as KINDS
from lexiseg.recipes import parse_recipe
from lexiseg.training.run import build_task, train
from lexiseg.training.segmentation import PADDING, UNLABELLED, SegmentationTask, self_training_labels
from lexiseg.weights import save_model
from tests.miniatures import ade847
from tests.models.test_deop import OPTIONS as DEOP
from tests.models.test_region_models import MASKFORMER
from tests.references import pixel_accuracy
from tests.towers import small_clip

WIDE = 65535
ATTENTION = {"proposals": MASKFORMER, "attention": {"image_size": 32}}
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "zegclip": ("zegclip", {"num_prompts": 1, "decoder_layers": 1, "decoder_heads": 2}),
    "spt-seg": ("spt-seg", {"num_prompts": 1, "decoder_layers": 1}),
    "proposals": ("zsseg", ATTENTION),
    "maft": ("zsseg", {**ATTENTION, "maft": {}}),
    "deop": ("deop", DEOP),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, of which the last 275 classes are unseen, and a CLIP."""
    root = tmp_path_factory.mktemp("ade")
    ade847(root)
    folder = root / "ADE20K_2021_17_01"
    listed = json.loads((folder / "classes.json").read_text())
    (folder / "ADE20K_572_pure_class.json").write_text(json.dumps(listed[:572]))
    save_clip(small_clip(), root / "clip")
    for name in ("maft", "deop"):  # they build on proposals that are there already
        kind, options = SYSTEMS[name]
        save_model(KINDS[kind].build(small_clip(), options), root / name)
    return root


def recipe_of(home: Path, system: str, **changes: Any) -> Any:
    name, options = SYSTEMS[system]
    values = {
        "kind": "segmentation",
        "model": {"system": name, "clip": str(home / "clip"), "options": options},
        "data": {"source": "ade20k-847", "root": str(home), "augment": "paper", "crop": 32, "label_stride": 2},
        "train": {"steps": 1, "batch_size": 1, "lr": 1e-3, "workers": 0},
        **({"initial": str(home / system)} if system in ("maft", "deop") else {}),
        **changes,
    }
    return parse_recipe(yaml.safe_dump(json.loads(json.dumps(values))), "test.yaml")


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_on_the_seen_classes(home: Path, tmp_path: Path, system: str) -> None:
    task = build_task(recipe_of(home, system))
    assert isinstance(task, SegmentationTask) and len(task.model.seen_names) == 572
    batch = task.batch(0)
    assert set(batch.labels[batch.labels >= 572].tolist()) == {WIDE}
    assert bool(((batch.labels >= 255) & (batch.labels < 572)).any())  # 255 and more are classes like all others
    losses = task.losses(batch)
    assert torch.isfinite(losses["loss"])
    losses["loss"].backward()


def test_supervised_and_self_training(home: Path, tmp_path: Path) -> None:
    every = build_task(recipe_of(home, "zegclip", setting="supervised"))
    assert isinstance(every, SegmentationTask) and len(every.model.seen_names) == 847
    batch = every.batch(0)
    assert int(batch.labels[batch.labels != WIDE].max()) > 572 and torch.isfinite(every.losses(batch)["loss"])
    for system in ("zegclip", "proposals"):
        task = build_task(recipe_of(home, system, setting="transductive"))
        batch = task.batch(0)
        assert UNLABELLED in batch.labels and set(batch.labels[batch.labels >= 572].tolist()) <= {WIDE}
        assert torch.isfinite(task.losses(batch)["loss"])
    folder = train(recipe_of(home, "zegclip"), tmp_path, device="cpu", tensorboard=False, progress=False)
    assert (folder / "model.safetensors").is_file()


def test_few_seen_classes_of_many_have_narrow_labels() -> None:
    label = torch.tensor([0, 255, 300, 846, WIDE])
    assert ignore_index(255) == 255 and ignore_index(256) == WIDE
    assert remap_to_seen(label, [300, 0], void=WIDE).tolist() == [1, 255, 0, 255, 255]
    assert remap_to_seen(label, range(400), void=WIDE).tolist() == [0, 255, 300, WIDE, WIDE]
    padded = torch.tensor([0, 255, 300, WIDE, PADDING])
    assert self_training_labels(padded, [0, 255], void=WIDE).tolist() == [0, 255, UNLABELLED, WIDE, WIDE]
    ignored = self_training_labels(padded, [0], unlabelled="ignored", void=WIDE)
    assert ignored.tolist() == [0, UNLABELLED, UNLABELLED, UNLABELLED, WIDE]


def test_losses_know_255_as_a_class_where_it_is_one() -> None:
    classes, logits = 300, torch.randn(1, 300, 4, 4, requires_grad=True)
    labels = torch.full((1, 4, 4), WIDE)
    labels[0, 0] = 255
    assert count_masks(labels, classes) == 1
    one = mask_losses(logits, labels)
    assert float(one.dice) > 0  # the class is there
    with pytest.raises(LexisegError, match="65535 = no class"):
        mask_losses(logits, labels.masked_fill(labels == WIDE, 400))
    assert torch.isfinite(ssim_loss(logits, labels))
    best = logits.detach().clone()
    best[:, 255] = 99.0
    assert float(pixel_accuracy(best, labels)) == 100.0
    seen = torch.ones(classes, dtype=torch.bool)
    seen[7] = False
    labels[0, 1] = UNLABELLED
    filled = pseudo_labels(logits, labels, seen)
    assert filled[0, 0].eq(255).all() and filled[0, 1].eq(7).all() and filled[0, 2:].eq(WIDE).all()
    ious, present = mask_ious(torch.rand(2, 4, 4), filled[0], classes)
    assert present.tolist() == [7, 255] and ious.shape == (2, 2)
    probabilities = torch.rand(1, 2, classes + 1).softmax(-1)
    assert torch.isfinite(region_map_losses(probabilities, torch.randn(1, 2, 4, 4), filled).total)


def test_a_crop_counts_255_where_it_is_a_class() -> None:
    image, label = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((8, 8), 255)
    label[:, 4:] = 3
    assert is_varied(label, ignored=WIDE) and not is_varied(label)
    assert random_crop(image, label, np.random.default_rng(0), size=8, ignored=WIDE)[1].shape == (8, 8)
