"""An initial state of our own, from no paper: decoders that start as CLIP's own comparison of patches and words.

From random weights a decoder needs thousands of steps to learn that comparison; trainings on the picture world are
shorter. The mask logits of unit queries and patches are then about ``GAIN * cosine - OFFSET``, so that most classes
start as absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lexiseg.errors import LexisegError
from lexiseg.models.one_stage import DecoderLayer, MaskDecoder

if TYPE_CHECKING:
    from lexiseg.models.spt_seg import SpectralGuide, SpectralLayer

GAIN = 20.0
OFFSET = 9.0
"""A cosine of 0.45 has a mask logit of 0."""
IMAGE_WEIGHT = 0.25
"""Weight of a word's cosine with the whole image beside that with a patch."""
_KEY_BIAS = 4.0
# How sharply patches attend to patches like them, and the constant part.
_SHARPNESS = 100.0
_CONSTANT = 2.0


def patch_directions(projection: Tensor) -> Tensor:
    """Orthonormal rows (D, D), the directions along which patches differ most first, of CLIP's projection (W, D).

    Patches vary least along the direction that the projection amplifies least.
    """
    return torch.linalg.svd(projection.float(), full_matrices=True).Vh


@torch.no_grad()
def init_matching_decoder(decoder: MaskDecoder, query_proj: nn.Linear, basis: Tensor, *, silent: bool = False) -> None:
    """Set the weights so that the mask logits are those of queries and patches compared directly.

    Queries are the text embeddings, the layers' updates start at zero, and the last layer's query and key maps are
    multiples of the identity. The biases of queries and keys are opposite along the last direction of ``basis``
    (`patch_directions`), and their product is the offset. A relationship descriptor adds the words' comparison with the
    whole image. ``silent`` starts with logits of zero instead, from which gradients reach the last layer's keys.
    """
    direction = basis[-1]
    *inner, last = cast("list[DecoderLayer]", list(decoder.layers))
    for layer in inner:
        silence_updates(layer)
    dim = last.query.in_features
    scale = (dim // last.num_heads) ** -0.5 / last.num_heads
    length = dim**0.5 if inner else 1.0  # a norm leaves vectors of this length
    factor = (GAIN / (scale * length)) ** 0.5
    for linear in (last.query, last.key):
        nn.init.eye_(linear.weight)
        linear.weight.mul_(factor)
    # A short bias on the keys, because its product with the queries differs from class to class.
    last.key.bias.copy_(_KEY_BIAS * direction)
    pass_text(query_proj, direction, IMAGE_WEIGHT * GAIN / (scale * factor * length * _KEY_BIAS))
    last.query.bias.copy_(-OFFSET / (scale * _KEY_BIAS) * direction)
    if silent:
        for parameter in (last.key.weight, last.key.bias, last.query.bias):
            nn.init.zeros_(parameter)


@torch.no_grad()
def silence_updates(layer: DecoderLayer) -> None:
    """Make a layer's attention and feed-forward part add nothing until they are trained."""
    for linear in (layer.out, layer.ffn_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


@torch.no_grad()
def pass_text(query_proj: nn.Linear, direction: Tensor, image_weight: float) -> None:
    """Make the queries the text embeddings t, which come last in the input of ``query_proj``.

    With a relationship descriptor they are shifted along ``direction`` by ``image_weight`` times the cosine of word and
    image, the sum of t * cls.
    """
    dim = query_proj.out_features
    nn.init.zeros_(query_proj.weight)
    nn.init.zeros_(query_proj.bias)
    nn.init.eye_(query_proj.weight[:, -dim:])
    if query_proj.in_features == 2 * dim:
        query_proj.weight[:, :dim] = image_weight * direction[:, None]


@torch.no_grad()
def init_spectral_decoder(decoder: MaskDecoder, query_proj: nn.Linear, basis: Tensor, *, silent: bool = False) -> None:
    """Set the weights so that the mask logits are those of queries and patches compared directly.

    See `init_matching_decoder`, of which this is SPT-SEG's form; the last but one layer's norm, which must be there,
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
        silence_updates(layer)
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
    if silent:
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
