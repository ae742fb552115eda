"""Mask-aware fine-tuning: a copy of CLIP's image tower learns that a region's score should say how well it fits (MAFT).

Jiao et al., "Learning Mask-aware CLIP Representations for Zero-Shot Segmentation", NeurIPS 2023. It plugs into every
base model that asks CLIP about regions: the copy, run with mask attention, takes the place of the frozen tower and its
crops, and is trained for a few hundred steps on the masks of a frozen generator. The two losses are in
`lexiseg.losses.mask_aware`.

Mask attention (the IP-CLIP encoder) gives a class token to each region, in one run of the image tower. Up to a block L
the tower is CLIP itself. There its class token becomes N copies, one for each region mask, and from there on a class
token attends to itself and to the patches inside its mask, while the patches attend to each other only. So the patches
do not depend on the masks: they run once, and a region costs one query a block.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, get_args

import torch
from open_clip.modified_resnet import ModifiedResNet
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.embeddings import image_embeddings, whole_patches
from lexiseg.clip.model import CLIP
from lexiseg.clip.positions import Interpolation
from lexiseg.clip.resnet import attention_pool, resnet_features
from lexiseg.clip.tower import ImageTower, block_attention, run_block
from lexiseg.errors import LexisegError
from lexiseg.losses.mask_aware import (
    Distance,
    Normalisation,
    distillation_loss,
    iou_targets,
    mask_aware_loss,
    mask_ious,
)
from lexiseg.proposals.base import Proposals
from lexiseg.regions.pooling import Size, full_resolution, resize_masks
from lexiseg.strict import StrictModel

FrozenUnit = Literal["conv", "cls", "pos", "ln_pre", "mlp", "proj"]
Probabilities = Callable[[Tensor], Tensor]

# MAFT gives ViT-B/16 and ViT-L/14, trained at 224, pictures of 480, and starts masking after two thirds of the blocks.
_ATTENTION_SIDE = 480 / 224
_ATTENTION_START = 2 / 3

INSIDE = 0.5
"""A patch belongs to a region if the mask is at least this on the patch grid."""

FROZEN_UNITS: tuple[FrozenUnit, ...] = get_args(FrozenUnit)
"""What the authors' code keeps of CLIP, by the names of the paper's ablation (MAFT, Table 4d; ln_pre is not in it)."""


def attention_mask(inside: Tensor) -> Tensor:
    """What each region's class token may attend to: itself and the patches inside, of (B, N, gh, gw) boolean.

    Returns:
        (B, 1, N, N + gh * gw) boolean, True = may attend; equal for all heads. No row is empty.
    """
    count = inside.shape[1]
    own = torch.eye(count, dtype=torch.bool, device=inside.device).expand(len(inside), -1, -1)
    return torch.cat([own, inside.flatten(2)], dim=2)[:, None]


def attend_regions(
    tower: ImageTower,
    tokens: Tensor,
    grid: tuple[int, int],
    inside: Tensor,
    *,
    start_block: int,
    stop: int | None = None,
) -> Tensor:
    """Run the blocks from ``start_block`` on with a class token for each region (MAFT, Sec. 4.1).

    Args:
        tower: the image tower.
        tokens: (B, L, W), what enters block ``start_block``: class token first, the gh * gw patches last. Tokens
            between them (prompts) are dropped.
        grid: (gh, gw).
        inside: (B, N, gh, gw) boolean, the patches of each region; any N, and a region may be empty.
        start_block: index (0-based) of the first block with masks, L in the paper; none such is a `LexisegError`.
        stop: index of the first block that is not run; None runs all.

    Returns:
        (B, N, W), the regions' class tokens, before the final norm.
    """
    if not 0 <= start_block < tower.num_blocks:
        raise LexisegError(
            f"Mask attention cannot start at block {start_block} of a tower of {tower.num_blocks} blocks; "
            f"choose one from 0 to {tower.num_blocks - 1}, for example {tower.num_blocks * 2 // 3}."
        )
    regions, rows = tokens[:, :1].expand(-1, inside.shape[1], -1), tokens[:, -grid[0] * grid[1] :]
    inside_only = partial(block_attention, mask=attention_mask(inside))
    *blocks, last = list(tower.visual.transformer.resblocks)[start_block:stop] if inside.shape[1] else [None]
    for block in blocks:
        # The patches' keys and values are computed here and in their own run: a sixth of a block more, and worth one
        # function for every kind of block.
        regions, rows = run_block(block, regions, rows, attention=inside_only), run_block(block, rows)
    return regions if last is None else run_block(last, regions, rows, attention=inside_only)


def region_embeddings(
    visual: nn.Module,
    images: Tensor,
    masks: Tensor,
    *,
    start_block: int | None = None,
    position_interpolation: Interpolation = "bicubic-corners",
) -> Tensor:
    """CLIP embeddings (B, N, D) of regions, not normalised, in one run of the image tower for any number of them.

    Args:
        visual: ``model.visual`` of an open_clip model: a vision transformer or a CLIP ResNet.
        images: (B, 3, H, W) normalised, any aspect and any size from one patch on; what is left over of whole patches
            at the right and lower edge is cut off.
        masks: (B, N, h, w) in 0..1 over the same frame, any h and w; N may be 0.
        start_block: first block (0-based) with masks, L in the paper; None is two thirds of the way: 8 for ViT-B/16, 16
            for ViT-L/14. A ResNet has none: there the masks act in the attention pool.
        position_interpolation: "bicubic-corners" as MAFT and FreeSeg, "bicubic" as ZSSeg.

    Raises:
        LexisegError: the tower is of another kind, there is no block ``start_block``, or an image is too small.
    """
    if isinstance(visual, ModifiedResNet):
        features = resnet_features(visual, images)
        inside = resize_masks(masks, (features.shape[-2], features.shape[-1])) >= INSIDE
        return attention_pool(visual.attnpool, features, inside, position_interpolation=position_interpolation)
    tower = ImageTower(visual)
    start = round(tower.num_blocks * _ATTENTION_START) if start_block is None else start_block
    tokens, grid = tower.embed(whole_patches(images, tower.patch_size), interpolation=position_interpolation)
    tokens = tower.run(tokens, grid, stop=start).tokens
    inside = resize_masks(masks, grid) >= INSIDE
    return tower.project(attend_regions(tower, tokens, grid, inside, start_block=start))


def tuned_names(visual: nn.Module, frozen: Collection[FrozenUnit] = FROZEN_UNITS) -> tuple[str, ...]:
    """Names of the parameters that mask-aware fine-tuning changes, as in ``visual.named_parameters()``.

    By default those of the authors' code: attention and both norms of every block, those before the first masked block
    included, and the norm behind the last. The paper's default trains the projection as well: leave ``"proj"`` out of
    ``frozen`` for that. Of a CLIP ResNet the pool's four maps are trained (our choice: nobody says what the authors
    trained there).
    """

    def unit(name: str) -> str:
        if isinstance(visual, ModifiedResNet):
            return "conv" if not name.startswith("attnpool.") else "pos" if "positional" in name else "attention"
        first = name.partition(".")[0]
        units = {"conv1": "conv", "class_embedding": "cls", "positional_embedding": "pos"}
        return "mlp" if ".mlp." in name else units.get(first, first)

    return tuple(name for name, _ in visual.named_parameters() if unit(name) not in frozen)


def check_tuned(student: nn.Module, visual: nn.Module) -> None:
    """Refuse a training of 0 steps whose tower ``student`` is CLIP's own, ``visual``, as nothing tuned it before."""
    plain = visual.state_dict()
    if all(torch.equal(value, plain[name]) for name, value in student.state_dict().items()):
        raise LexisegError(
            "The recipe adds 'maft', but 'train.steps' is 0 and what it starts from has no tuned tower, so nothing "
            "would be tuned; set train.steps, as the packaged recipes with 'maft' in their names do."
        )


class AttentionOptions(StrictModel):
    """Options of mask attention, MAFT's IP-CLIP encoder (Sec. 4.1).

    Attributes:
        start_block: L, the number of blocks before the class token is copied, one copy a region; None is two thirds of
            them (8 of ViT-B/16's 12, 16 of ViT-L/14's 24). Without meaning for a ResNet.
        image_size: side of the square the padded frame is resized to, its aspect not kept; None is 480 for a tower
            trained at 224, and in proportion.
        positions: how the position table follows that size (released: "bicubic-corners").
    """

    start_block: Annotated[int, Field(ge=0)] | None = None
    image_size: Annotated[int, Field(ge=1)] | None = None
    positions: Interpolation = "bicubic-corners"


@dataclass(frozen=True)
class MaskAttention:
    """How CLIP encodes regions: the tower is run once for all of them, by mask attention over a square picture.

    Holds options only, no weights. The *frame* is the padded picture, normalised for CLIP, with the padding 0; mask
    logits cover it, and are interpolated to it by ``align_corners``. ``threshold`` is the mask probability above which
    a pixel is inside a region.
    """

    align_corners: bool
    threshold: float
    attention: AttentionOptions

    def encode(
        self, clip: CLIP, visual: nn.Module, frame: Tensor, size: Size, mask_logits: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `lexiseg.regions.crops.CropEncoder.encode`; all regions are embedded, whichever are valid."""
        image = self.square(clip, frame)
        masks, found = self.square_masks(visual, image, frame, mask_logits, size)
        return self.attend(visual, image, masks), found if valid is None else found & valid

    def square(self, clip: CLIP, frame: Tensor) -> Tensor:
        """The frame as the square picture that mask attention sees."""
        side = self.attention.image_size or max(round(clip.image_size * _ATTENTION_SIDE), clip.patch_size)
        return F.interpolate(frame, size=(side, side), mode="bilinear", align_corners=False)

    def square_masks(
        self, visual: nn.Module, image: Tensor, frame: Tensor, mask_logits: Tensor, size: Size
    ) -> tuple[Tensor, Tensor]:
        """Masks (B, N, g, g) in [0, 1] on the tower's grid of the square picture, by way of every pixel of the frame.

        And whether each has a pixel above the threshold in the picture of ``size``, (B, N) bool.
        """
        side = int(image.shape[-1])
        # A ResNet halves five times: its first convolution rounds up, everything after it down.
        places = (side + 1) // 2 // 16 if isinstance(visual, ModifiedResNet) else side // ImageTower(visual).patch_size
        masks, found = [], []
        for part in full_resolution(mask_logits, frame, self.align_corners):
            large = part.sigmoid()
            masks.append(resize_masks(large, (places, places)).to(frame.dtype))
            found.append(large[..., : size[0], : size[1]].amax(dim=(2, 3)) > self.threshold)
        return torch.cat(masks, dim=1), torch.cat(found, dim=1)

    def attend(self, visual: nn.Module, image: Tensor, masks: Tensor) -> Tensor:
        """Mask attention over the square picture: (B, N, D), not normalised."""
        start, positions = self.attention.start_block, self.attention.positions
        return region_embeddings(visual, image, masks, start_block=start, position_interpolation=positions)

    def whole(self, visual: nn.Module, image: Tensor) -> Tensor:
        """The tower as it is, on the square picture: (B, D), not normalised."""
        return image_embeddings(visual, image, position_interpolation=self.attention.positions)


class MaftOptions(StrictModel):
    """Options of mask-aware fine-tuning; the defaults are those of the released code.

    Attributes:
        distance: between score and target, see `mask_aware_loss`: "smooth-l1" (Eq. 7), or the others of Table 4b.
        normalise: min-max of the target over the proposals of one class ("row", as released) or over all classes of a
            picture together ("matrix", as Eq. 5 is written).
        binary: take the IoU of masks cut at 0.5 instead of soft ones.
        distillation: weight of the self-distillation (released: 0.1; paper: 1; 0 leaves it out).
        frozen: units of the image tower that keep CLIP's weights (Table 4d): "conv" the patch embedding (of a ResNet
            everything before its attention pool), "cls" the class embedding, "pos" the position table, "ln_pre" the
            norm before the blocks, "mlp" their feed-forward parts, "proj" the final projection. Attention and the other
            norms are trained always, in all blocks. The paper's default leaves "proj" and "ln_pre" out.
    """

    distance: Distance = "smooth-l1"
    normalise: Normalisation = "row"
    binary: bool = False
    distillation: Annotated[float, Field(ge=0)] = 0.1
    frozen: tuple[FrozenUnit, ...] = FROZEN_UNITS


def maft_losses(
    encoder: MaskAttention,
    clip: CLIP,
    student: nn.Module,
    frame: Tensor,
    size: Size,
    proposals: Proposals,
    labels: Tensor,
    options: MaftOptions,
    probabilities: Probabilities,
) -> dict[str, Tensor]:
    """MAFT's losses of a batch (Sec. 4.2), on the masks of a frozen generator.

    Args:
        encoder: how regions are encoded.
        clip: whose own image tower, frozen, is the teacher.
        student: the tower that is tuned.
        frame: (B, 3, H', W'), see `MaskAttention`.
        size: (H, W) of the pictures in it.
        proposals: regions; one that is not valid adds 0 to the loss and takes no part in the targets.
        labels: (B, h, w) long in 0..C-1, or 255; another value is a `LexisegError`.
        options: see `MaftOptions`.
        probabilities: from features (B, N, D) of regions to A^c (B, N, C), or (B, D) of whole images to (B, C).

    Returns:
        "loss" and its parts, weighted: "loss_mask_aware", and "loss_distillation" unless its weight is 0.
    """
    label_size = (int(labels.shape[-2]), int(labels.shape[-1]))
    with torch.no_grad():
        image = encoder.square(clip, frame)
        grid_masks, _ = encoder.square_masks(student, image, frame, proposals.mask_logits, size)
    inside = ..., slice(size[0]), slice(size[1])
    masks = (
        torch.cat([resize_masks(part[inside].sigmoid(), label_size)[0] for part in parts])
        for parts in (full_resolution(one[None], frame, encoder.align_corners) for one in proposals.mask_logits)
    )
    scores = probabilities(encoder.attend(student, image, grid_masks))
    loss = batch_loss(scores, masks, labels, proposals.valid, options)
    losses = {"loss": loss, "loss_mask_aware": loss.detach()}
    if options.distillation:
        with torch.no_grad():
            target = probabilities(encoder.whole(clip.visual, image))
        own = probabilities(encoder.whole(student, image))
        distillation = options.distillation * distillation_loss(own, target)
        losses |= {"loss": loss + distillation, "loss_distillation": distillation.detach()}
    return losses


def batch_loss(
    probabilities: Tensor, masks: Iterable[Tensor], labels: Tensor, valid: Tensor | None, options: MaftOptions
) -> Tensor:
    """The mask-aware loss of a batch, of A^c (B, N, C) and each picture's masks (N, h, w) at the size of its labels."""
    scores, targets = [], []
    for index, mask in enumerate(masks):
        there = torch.ones_like(mask[:, 0, 0], dtype=torch.bool) if valid is None else valid[index]
        with torch.no_grad():
            soft = (mask > 0.5).float() if options.binary else mask
            ious, present = mask_ious(soft[there], labels[index], probabilities.shape[2])
            target = ious.new_zeros(len(present), len(mask))
            target[:, there] = iou_targets(ious, options.normalise)
        targets.append(target)
        scores.append((probabilities[index] * there[:, None])[:, present].T)
    return mask_aware_loss(torch.cat(scores), torch.cat(targets), options.distance)
