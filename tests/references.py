"""What only tests need: the authors' rules in full, and our tensors put back into other programs' layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lexiseg.label_ids import IGNORE_INDEX
from lexiseg.label_ids import ignore_index as ignored_among
from lexiseg.losses.masks import fill_unseen
from lexiseg.weights.filling import SourceOf


def pseudo_label(
    scores: Tensor,
    label: Tensor,
    seen: Sequence[int],
    *,
    reject: float = 0.0,
    prior: bool = True,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Labels for self-training, by the rule of ZSSeg's released code (which MAFT's and DeOP's authors inherit).

    Pixels labelled with a seen class keep that label. All others, the ignored ones included, get the class of the
    largest probability: the softmax over the classes of the pixel's scores, with those of the seen classes set to 0 if
    there is a ``prior``. A probability below ``reject`` gives ``ignore_index``.

    This is the rule in full, for analysis. Training needs only its default, the best unseen class, which no softmax
    changes: `lexiseg.models.region_base.RegionModel.pseudo_labels` finds it without building all scores, and both end
    in `lexiseg.losses.masks.fill_unseen`.

    ``scores``: (C, H, W) scores of all classes. ``label``: (H, W), ids into the C classes; of pixels of unseen classes
    it may say anything but a seen class. ``seen``: ids of the classes that had masks in training. ``reject``: see
    above, 0..1. Returns (H, W) int64.
    """
    seen_ids = torch.as_tensor(list(seen), device=scores.device, dtype=torch.long)
    probabilities = scores.float().softmax(dim=0)
    if prior:
        probabilities[seen_ids] = 0.0
    best, found = probabilities.max(dim=0)
    found = found.masked_fill(best < reject, ignore_index)
    trained = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    trained[seen_ids] = True
    return fill_unseen(label.long().where(label != 255, -1), found, trained)


def put_tensors(ours: Mapping[str, Tensor], source_of: SourceOf) -> dict[str, Tensor]:
    """The way back: another program's tensors by its keys, from ours; what its files do not have is left out."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, tensor in ours.items():
        if (source := source_of(name)) is None:
            continue
        tensor = tensor.T if source.transposed else tensor
        parts = tensor.chunk(len(source.keys)) if len(source.keys) > 1 else (tensor,)
        for key, part in zip(source.keys, parts, strict=True):
            found.setdefault(key, {})[source.block or 0] = part
    return {
        key: torch.cat([parts[index] for index in sorted(parts)]) if len(parts) > 1 else parts[0]
        for key, parts in found.items()
    }


def pixel_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Percentage of labelled pixels (B, H, W) whose class has the largest logit (B, C, H, W), or 0."""
    counted = labels != ignored_among(logits.shape[1])
    right = (logits.argmax(dim=1) == labels) & counted
    return 100.0 * right.sum() / counted.sum().clamp(min=1)


def reduce_zero_label(label: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Turn labels that count from 1 with 0 = background into ids from 0 with 255 = ignored.

    0 becomes 255, ``v`` becomes ``v - 1``, 255 stays. Apply it once only.

    ``label``: values 0..255 of any shape.
    """
    values = np.asarray(label)
    return np.where((values == 0) | (values == 255), 255, values - 1).astype(np.uint8)
