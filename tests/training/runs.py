"""Trainings for tests: small models on small pictures, in silence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from lexiseg.clip.load import load_clip
from lexiseg.data.base import Sample
from lexiseg.data.transforms import light_pipeline
from lexiseg.models import SYSTEMS
from lexiseg.recipes import parse_recipe
from lexiseg.training.run import train
from lexiseg.training.segmentation import PADDING, SegmentationTask
from lexiseg.vocabulary import Vocabulary

OPTIONS: dict[str, dict[str, Any]] = {
    "zegclip": {"num_prompts": 1, "decoder_layers": 1, "decoder_heads": 2},
    "cascade-clip": {"num_prompts": 1, "decoder_layers": 1, "decoder_heads": 2, "groups": "{2-3},{4}"},
    "spt-seg": {"num_prompts": 1, "decoder_layers": 1},
}


def recipe_of(clip: Path | str, system: str = "zegclip", **changes: Any) -> Any:
    """A recipe of a few steps on the picture world, or on ``data``; of ``train`` the numbers that change are given."""
    numbers = {"steps": 4, "batch_size": 2, "lr": 1e-3, "workers": 0, "checkpoint_every": 2, **changes.pop("train", {})}
    values = {
        "kind": "segmentation",
        "model": {"system": system, "clip": str(clip), "options": OPTIONS[system]},
        "data": {"source": "picture-world", "size": 32, "length": 6, "val_size": 32, "val_length": 2},
        "train": numbers,
        **changes,
    }
    return parse_recipe(yaml.safe_dump(values), "test.yaml")


def quietly(recipe: Any, folder: Path, **options: Any) -> Path:
    """Train on the CPU."""
    return train(recipe, folder, device="cpu", tensorboard=False, progress=False, **options)


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Flat:
    """12 x 12 pictures: cat left, the unseen sky right, dog in the last row, void in the first."""

    vocabulary = Vocabulary.parse(["cat, kitten", "sky", "dog"]).with_seen(["cat", "dog"])

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Sample:
        label = torch.zeros(12, 12, dtype=torch.long)
        label[:, 6:] = 1
        label[-1] = 2
        label[0] = 255
        return Sample(torch.full((3, 12, 12), 40 * index, dtype=torch.uint8), label, f"flat-{index}")


def flat_task(clip_folder: Path, setting: Any = "inductive", **options: Any) -> SegmentationTask:
    """ZegCLIP on `Flat`, in batches of 2 pictures that are filled up to 16 x 16."""
    seen = ("cat", "sky", "dog") if setting == "supervised" else ("cat", "dog")
    model = SYSTEMS["zegclip"].build(load_clip(clip_folder), OPTIONS["zegclip"], seen_names=seen)
    pad = PADDING if setting == "transductive" else 255
    pipeline = light_pipeline((0.0,) * 3, (1.0,) * 3, crop=16, flip=0, pad_label=pad)
    return SegmentationTask(model, Flat(), pipeline, batch_size=2, setting=setting, **options)
