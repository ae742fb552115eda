"""The patches of every block of an image tower, as a system runs it and as CLIP alone does, and measures of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.tower import ImageTokens, ImageTower
from lexiseg.errors import LexisegError
from lexiseg.models import SegmentationModel
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.region_base import RegionModel
from lexiseg.models.zegclip import ZegCLIP
from lexiseg.normalisation import normalise, pixels_of

_MAX_SAMPLES = 2048


@dataclass(frozen=True)
class Blocks:
    """What each block made of one picture's patches."""

    patches: Tensor  # (L, N, W), block by block, before any final norm
    grid: tuple[int, int]  # (h, w), the patches per side; N = h * w in rows


def plain_blocks(model: SegmentationModel, images: Tensor, tower: ImageTower | None = None) -> Blocks:
    """Run the model's CLIP without anything that was learned beside it: no prompts, no severance.

    ``model``: any system with a vision transformer. ``images``: (1, 3, H, W) normalised. ``tower``: runs in place of
    the CLIP's. Raises LexisegError if the image tower is no vision transformer.
    """
    tower = tower or model.clip.image_tower
    if isinstance(model, DecoupledModel):
        pixels = pixels_of(images, model.mean, model.std)
        images = normalise(pixels, model.clip.mean, model.clip.std)  # they come as the generator wants them
    tokens, grid = tower.embed(model.fit_to_patches(images))
    return _blocks(tower.run(tokens, grid, levels=range(tower.num_blocks)), tower)


def system_blocks(model: SegmentationModel, images: Tensor) -> Blocks:
    """Run the tower as the system does: with its prompts, or the tuned copy of MAFT; else as `plain_blocks`.

    ``model``: any system with a vision transformer. ``images``: (1, 3, H, W) normalised. Raises LexisegError if the
    image tower is no vision transformer.
    """
    if isinstance(model, ZegCLIP):
        tower = model.clip.image_tower
        return _blocks(model.run_tower(model.fit_to_patches(images), levels=range(tower.num_blocks)), tower)
    student = _student(model)
    return plain_blocks(model, images, None if student is None else ImageTower(student))


def learnt_in_tower(model: SegmentationModel) -> bool:
    """Whether the system learns something that acts inside the image tower, so that its blocks differ from CLIP's."""
    prompted = isinstance(model, ZegCLIP) and model.options.backbone != "fixed"
    return prompted or _student(model) is not None


def has_own_clip(model: SegmentationModel) -> bool:
    """Whether training changed CLIP's image tower itself, so that the CLIP it started from is not inside the model."""
    return any(name.startswith("clip.model.visual.") for name in model.trainable_names())


def _student(model: SegmentationModel) -> nn.Module | None:
    return model.student if isinstance(model, RegionModel) else None


def _blocks(result: ImageTokens, tower: ImageTower) -> Blocks:
    rows = [result.levels[index][0, -result.num_patches :] for index in range(tower.num_blocks)]
    return Blocks(torch.stack(rows).detach().float(), result.grid)


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
        rows = block[chosen.to(block.device)].double()  # their fourth power is taken here
        rows = rows - rows.mean(dim=0)
        gram = rows @ rows.T
        length = gram.norm()
        if not length > 0:
            raise LexisegError("CKA cannot compare a block whose patches are all alike; take a picture with content.")
        grams.append((gram / length).flatten().float())
    stacked = torch.stack(grams)
    return (stacked @ stacked.T).clamp(0, 1)
