"""`lexiseg.models.similarity_init` for SPT-SEG's decoder: an initial state of our own, which no paper has."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lexiseg.errors import LexisegError
from lexiseg.models.one_stage import MaskDecoder
from lexiseg.models.similarity_init import GAIN, IMAGE_WEIGHT, OFFSET, pass_text, zero_updates

if TYPE_CHECKING:
    from lexiseg.models.spt_seg import SpectralGuide, SpectralLayer

# How sharply patches attend to patches like them, and the constant part.
_SHARPNESS = 100.0
_CONSTANT = 2.0


@torch.no_grad()
def init_spectral_decoder(decoder: MaskDecoder, query_proj: nn.Linear, basis: Tensor, *, zero: bool = False) -> None:
    """Set the weights so that the mask logits are those of queries and patches compared directly.

    See `lexiseg.models.similarity_init.init_matching_decoder`; the last but one layer's norm, which must be there,
    gives the gain, and a bias of the queries against the constant part of z the offset.
    """
    *inner, last = cast("list[SpectralLayer]", list(decoder.layers))
    if not inner:
        raise LexisegError(
            "init 'clip-similarity' needs a spectral guided decoder of two layers at least; choose more layers or "
            "another init."
        )
    for layer in inner:
        _init_as_identity(layer.guide, basis)
        zero_updates(layer)
    _init_as_identity(last.guide, basis)
    # Queries are the text without its part along the constant of z, which would differ from class to class, and as
    # long as after a norm: the layers' first updates, alike for all classes, must not drown them.
    dim = len(basis)
    pass_text(query_proj, basis[-1], IMAGE_WEIGHT / _CONSTANT)
    text = query_proj.weight[:, -dim:]
    text.sub_(torch.outer(basis[-1], basis[-1])).mul_(dim**0.5)
    norm = inner[-1].norm_ffn
    nn.init.constant_(norm.weight, GAIN / dim**0.5)  # a norm leaves vectors of the length sqrt(D)
    norm.bias.copy_(-OFFSET / _CONSTANT * basis[-1])
    if zero:
        nn.init.zeros_(norm.bias)
        nn.init.zeros_(last.guide.transform)


def _init_as_identity(guide: SpectralGuide, basis: Tensor) -> None:
    """Set the weights so that z is about the patches, smoothed where they are alike, plus a constant.

    The directions along which patches differ most (the first of ``basis``, see `patch_directions`) are the high
    frequencies and tell which patches are alike; the constant lies along the last, where the prompt looks, so that
    the gate is open.
    """
    size = guide.head_dim
    scale = (_SHARPNESS * size**0.5) ** 0.5
    top, low = basis[:size], basis[size:]
    guide.high.weight.copy_(torch.cat([scale * top, scale * top, top]))
    guide.low_query.weight.copy_(scale * top.repeat(len(guide.low_query.weight) // size, 1))
    guide.low_key_value.weight.copy_(torch.cat([scale * top.repeat(len(guide.low_query.weight) // size, 1), low]))
    nn.init.eye_(guide.low_out.weight)
    nn.init.zeros_(guide.low_out.bias)
    guide.low_out.bias[-1] = _CONSTANT
    nn.init.zeros_(guide.prompt)
    guide.prompt[-1] = 1.0
    guide.transform.copy_(basis)
