"""What every generator of mask proposals is to the rest of lexiseg: images in, regions out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# A mask that is exactly 0 or 1 is given as -/+ this logit: its sigmoid is 0 or 1 to 2e-9.
HARD_LOGIT = 20.0


@dataclass(frozen=True)
class Proposals:
    """N proposed regions for each of B images.

    Attributes:
        mask_logits: (B, N, h, w) logits of the masks over the padded image; h and w are its size over the generator's
            mask stride (4 for MaskFormer and Mask2Former). Binary masks are -/+ `HARD_LOGIT`.
        embeddings: (B, N, E) what the class head says of each region, to be compared with text; not normalised. None
            without a class head.
        valid: (B, N) bool, False where a slot holds no region (images of one batch may have different numbers of
            them); None: every slot holds one.
        aux: the same from earlier decoder layers, first to last, for deep supervision; () if there are none, and from
            MaskFormer where no gradient is recorded.
    """

    mask_logits: Tensor
    embeddings: Tensor | None = None
    valid: Tensor | None = None
    aux: tuple[Proposals, ...] = ()

    @property
    def levels(self) -> tuple[Proposals, ...]:
        """The proposals of every decoder layer, first to last; the last one is the result."""
        return (*self.aux, replace(self, aux=()))


def hard_proposals(masks: Sequence[Tensor]) -> Proposals:
    """Proposals of masks (N, h, w), bool or in 0..1, of each image, which may have different numbers of them."""
    slots = max(1, *(len(own) for own in masks))
    padded = torch.stack([F.pad(own.float(), (0, 0, 0, 0, 0, slots - len(own))) for own in masks])
    counts = torch.tensor([len(own) for own in masks], device=padded.device)
    return Proposals((padded * 2 - 1) * HARD_LOGIT, valid=torch.arange(slots, device=padded.device) < counts[:, None])


class ProposalGenerator(nn.Module, ABC):
    """Turns images into `Proposals`.

    Attributes:
        stride: the sides of the images must be multiples of it.
        needs_text: `forward` needs ``text``.
        embed_dim: E of the embeddings it gives; None if it gives none.
        frozen_dropout: see `lexiseg.proposals.options.QueryOptions`.
    """

    stride: ClassVar[int] = 32
    needs_text: bool = False
    embed_dim: int | None = None

    def __init__(self, *, frozen_dropout: bool = False) -> None:
        super().__init__()
        self.frozen_dropout = frozen_dropout

    @property
    def trainable(self) -> bool:
        """Whether training changes it."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> ProposalGenerator:
        """Set the training mode; a generator that is not trained stays in evaluation unless ``frozen_dropout``."""
        super().train(mode and (self.trainable or self.frozen_dropout))
        return self

    @abstractmethod
    def forward(self, images: Tensor, text: Tensor | None = None) -> Proposals:
        """Propose regions.

        Args:
            images: (B, 3, H, W) float, normalised with ImageNet's mean and standard deviation and padded at the right
                and the bottom with 0 so that H and W are multiples of `stride`.
            text: (K, T) or (B, K, T) unit vectors, the classes and then the no-object row; used by Mask2Former with
                context interaction, ignored by the others.

        Raises:
            ValueError: the images' sides are no multiples of `stride`.
            LexisegError: text is needed and is not given, or has another width.
        """


def check_images(images: Tensor, stride: int) -> None:
    """See that images (B, 3, H, W) can be given to a generator.

    Raises:
        ValueError: they cannot; the message says why.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), not {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % stride or width % stride or not height or not width:
        raise ValueError(f"the sides of the images must be multiples of {stride}, not {height} x {width}; pad them")
