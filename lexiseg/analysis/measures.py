"""Measures of a tower's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.errors import LexisegError

_MAX_SAMPLES = 2048


def patch_similarity(patches: Tensor, index: int) -> Tensor:
    """Cosine similarity of one patch with every patch (Cascade-CLIP, Fig. 1 and 6).

    ``index``: of the patch, 0..N-1. Returns (..., N) in -1..1; 1 at the patch itself.
    """
    units = F.normalize(patches.float(), dim=-1)
    return (units @ units[..., index, :, None])[..., 0]


def linear_cka(features: Sequence[Tensor], *, max_samples: int = _MAX_SAMPLES) -> Tensor:
    """Linear centred kernel alignment between every two of several representations of the same samples.

    CKA(X, Y) = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) with centred columns (Kornblith et al., "Similarity of Neural
    Network Representations Revisited", ICML 2019, Sec. 3), computed from the samples' products with each other, which
    gives the same. It does not change when a representation is rotated or scaled.

    ``features``: L tensors (n, width); widths may differ. ``max_samples``: of more samples, this many are taken, evenly
    spread. Returns (L, L), symmetric, in 0..1, float32. Raises LexisegError if there are fewer than two samples, or a
    representation is the same for all of them.
    """
    count = len(features[0])
    if count < 2:
        raise LexisegError("CKA compares at least two patches; take a larger picture or several.")
    chosen = torch.linspace(0, count - 1, min(count, max_samples)).round().long()
    grams = []
    for block in features:
        rows = block[chosen.to(block.device)].double()
        rows = rows - rows.mean(dim=0)
        # Scaled first: activations of a deep block can be thousands, and their fourth power is taken here.
        rows = rows / rows.norm().clamp_min(torch.finfo(rows.dtype).tiny)
        gram = rows @ rows.T
        length = gram.norm()
        if not length > 0:
            raise LexisegError("CKA cannot compare a block whose patches are all alike; take a picture with content.")
        grams.append((gram / length).flatten().float())
    stacked = torch.stack(grams)
    return (stacked @ stacked.T).clamp(0, 1)
