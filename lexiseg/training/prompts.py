"""Learning text prompts offline: a CLIP classifies masked crops of the seen classes, and only the prompts change.

This is the stage before the proposals in ZSSeg, FreeSeg and DeOP. Each example is one class of one picture: the box of
its mask, a random crop of that box, everything outside the mask hidden. The released code makes crops of 244 x 224,
which its settings write as 224 x 244 and which no tower was trained at; ours are squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.embeddings import image_embeddings
from lexiseg.clip.load import read_safetensors
from lexiseg.clip.model import CLIP, write_tensors
from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.data.base import SegmentationDataset, read_label, seen_ids
from lexiseg.errors import LexisegError
from lexiseg.files import local, make_folder, read_json, write_json
from lexiseg.losses.reduction import reduction_weight
from lexiseg.normalisation import normalise
from lexiseg.training.engine import Task, part_of, shuffled

AREA = (0.08, 1.0)
"""Fraction of the box that a crop takes."""

ASPECT = (3 / 4, 4 / 3)
"""Width by height of a crop, before it becomes a square."""

_ATTEMPTS = 10
_PROMPTS, _CARD = "prompts.safetensors", "prompts.json"


def hide_background(images: Tensor, masks: Tensor, clip: CLIP) -> Tensor:
    """Prepare masked crops for learning prompts offline: only the object's pixels stay.

    Outside the masks (B, H, W), true or above 0 on the object, the normalised image takes the numbers of CLIP's mean,
    (0.48, 0.46, 0.41). The authors of ZSSeg, FreeSeg and DeOP fill after normalising, so this is not the mean colour,
    which would be 0 there; their published prompts were learned so. Images (B, 3, H, W) in 0..1 come back normalised.
    """
    inside = normalise(images, clip.mean, clip.std)
    return torch.where((masks > 0)[:, None], inside, images.new_tensor(clip.mean)[:, None, None])


def crop_logits(learner: PromptLearner, clip: CLIP, images: Tensor, names: Sequence[str]) -> Tensor:
    """100 times the cosines (B, C) of whole crops of `hide_background`; the image tower gets no gradient."""
    with torch.no_grad():
        embeddings = image_embeddings(clip.visual, images, position_interpolation="bicubic")
    return 100.0 * F.normalize(embeddings.float(), dim=-1) @ learner(clip, names).T


class Prompted(nn.Module):
    """A frozen CLIP, in evaluation mode, and the prompts that are learned for it."""

    def __init__(self, clip: CLIP, learner: PromptLearner) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False)
        self.learner = learner

    def train(self, mode: bool = True) -> Prompted:
        """Set the mode of the prompts; CLIP's batch norms, where it has any, must not follow the crops."""
        super().train(mode)
        self.clip.eval()
        return self


@dataclass(eq=False, repr=False)
class PromptTask(Task):
    """Cross entropy of 100 x cosine between masked crops and the seen classes.

    No picture with a seen class is a `LexisegError`.
    """

    model: Prompted = field(init=False)
    clip: InitVar[CLIP]  # the towers
    learner: InitVar[PromptLearner]  # the prompts
    # pictures with masks; unseen classes take no part, unless the ``setting`` is "supervised"
    dataset: SegmentationDataset
    _: KW_ONLY
    batch_size: int  # crops per step
    per_class: int = 32  # at most this many pictures of each class (the authors': 32 on COCO-Stuff, 128 on VOC)
    size: int | None = None  # side of a crop; None takes the side CLIP was trained at
    seed: int = 0  # decides which pictures, which crops and in which order
    setting: Literal["inductive", "supervised"] = "inductive"

    def __post_init__(self, clip: CLIP, learner: PromptLearner) -> None:
        self.model = Prompted(clip, learner)
        dataset = self.dataset
        everything = list(range(len(dataset.vocabulary)))
        self.classes = everything if self.setting == "supervised" else seen_ids(dataset.vocabulary) or everything
        self.names = [dataset.vocabulary.names[index] for index in self.classes]
        self.examples = _choose_examples(dataset, self.classes, self.per_class, self.seed)
        if not self.examples:
            raise LexisegError("No training picture shows a seen class; check the labels and the list of classes.")

    def batch(self, index: int, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
        """Crops (B, 3, S, S) in 0..1, masks (B, S, S) and ranks (B,) of classes; an epoch shows each example once."""
        first = index * self.batch_size
        places = [first + place for place in part_of(self.batch_size, rank, processes)]
        crops, masks, ranks = zip(*(self._example(place) for place in places), strict=True)
        return {"images": torch.stack(crops), "masks": torch.stack(masks), "labels": torch.tensor(ranks)}

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The cross entropy, and the percentage of crops that get their class."""
        clip = self.model.clip
        crops = hide_background(batch["images"], batch["masks"], clip)
        logits = crop_logits(self.model.learner, clip, crops, self.names)
        correct = (logits.detach().argmax(dim=1) == batch["labels"]).float().mean()
        weight = reduction_weight(len(logits), logits.device)
        return {"loss": F.cross_entropy(logits, batch["labels"]) * weight, "accuracy": 100.0 * correct * weight}

    def export(self, folder: Path) -> None:
        """Write the prompts, and how they were learned; `read_prompts` reads both."""
        clip, folder = self.model.clip, make_folder(folder)
        write_tensors(folder / _PROMPTS, self.model.learner.state_dict())
        card = {"clip": clip.name, "clip_fingerprint": clip.fingerprint(), "seen_names": self.names}
        write_json(folder / _CARD, card | {"pictures": len(self.examples), "seed": self.seed})

    def _example(self, place: int) -> tuple[Tensor, Tensor, int]:
        epoch, position = divmod(place, len(self.examples))
        sample_index, rank = self.examples[int(shuffled(len(self.examples), self.seed, 4, epoch)[position])]
        rng = np.random.default_rng([self.seed, 3, place])
        sample = self.dataset[sample_index]
        size = self.size or self.model.clip.image_size
        image, mask = crop_object(sample.image, sample.label == self.classes[rank], size, rng)
        return image, mask, rank


def read_prompts(name: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The vectors of prompts by name, and how they were learned, {} where nothing says so.

    ``name`` is the folder of a run or that of its prompts. A `LexisegError` if a file is not there or damaged.
    """
    place = local(name)
    places = () if place is None else (place / "model", place)
    folder = next((path for path in places if (path / _PROMPTS).is_file()), None)
    if folder is None:
        raise LexisegError(f"There is no {_PROMPTS} in '{name}'; give the folder of a run that learned prompts.")
    card = folder / _CARD
    said = read_json(card, "train the prompts again or remove the file") if card.is_file() else {}
    return read_safetensors(folder / _PROMPTS), said


def _choose_examples(
    dataset: SegmentationDataset, classes: Sequence[int], per_class: int, seed: int
) -> list[tuple[int, int]]:
    """Go through the pictures in a random order until every class has enough: (picture, rank of the class)."""
    wanted = dict.fromkeys(range(len(classes)), per_class)
    rank_of = {index: rank for rank, index in enumerate(classes)}
    found: list[tuple[int, int]] = []
    for index in np.random.default_rng([seed, 2]).permutation(len(dataset)).tolist():
        if not wanted:
            break
        # Rare classes make this go through the whole set, and reading pictures would be most of the work.
        for class_id in read_label(dataset, index).unique().tolist():
            rank = rank_of.get(class_id)
            if rank in wanted:
                found.append((index, rank))
                wanted[rank] -= 1
                if not wanted[rank]:
                    del wanted[rank]
    return found


def crop_object(image: Tensor, mask: Tensor, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Cut a random part of an object's box and make it a square.

    Args:
        image: (3, H, W) uint8.
        mask: (H, W) bool with at least one pixel.
        size: side S of the result.
        rng: draws the part and whether it is mirrored.

    Returns image (3, S, S) float in 0..1, mask (S, S) bool that is empty only if resizing lost the object.
    """
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    top, left = int(rows[0]), int(columns[0])
    height, width = int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left
    part = slice(top, top + height), slice(left, left + width)
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if not (0 < h <= height and 0 < w <= width):
            continue
        y, x = top + int(rng.integers(height - h + 1)), left + int(rng.integers(width - w + 1))
        if bool(mask[y : y + h, x : x + w].any()):
            part = slice(y, y + h), slice(x, x + w)
            break
    crop = F.interpolate(
        image[:, part[0], part[1]][None].float() / 255, size=(size, size), mode="bilinear", antialias=True
    )[0]
    inside = F.interpolate(mask[part][None, None].float(), size=(size, size), mode="nearest")[0, 0] > 0
    if rng.random() < 0.5:
        crop, inside = crop.flip(-1), inside.flip(-1)
    return crop, inside
