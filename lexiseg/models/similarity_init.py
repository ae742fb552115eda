"""An initial state of our own, from no paper: decoders that start as CLIP's own comparison of patches and words.

From random weights a decoder needs thousands of steps to learn that comparison; trainings on the picture world are
shorter.
"""

from typing import cast

import torch
from torch import Tensor, nn

from lexiseg.models.one_stage import DecoderLayer, MaskDecoder

GAIN = 20.0
OFFSET = 9.0
"""Mask logits start at ``GAIN * cosine - OFFSET``, which is zero at a cosine of 0.45: most classes start as absent."""
IMAGE_WEIGHT = 0.25
"""Weight of a word's cosine with the whole image, relative to its cosine with a patch."""
_KEY_BIAS = 4.0
"""Length of the keys' bias, whose product with the queries' bias is the offset. It is short because its product with
the rest of a query differs from class to class."""


def patch_directions(projection: Tensor) -> Tensor:
    """Orthonormal rows (D, D), the directions along which patches differ most first, of CLIP's projection (W, D).

    Patches vary least along the direction that the projection amplifies least.
    """
    return torch.linalg.svd(projection.float(), full_matrices=True).Vh


@torch.no_grad()
def init_matching_decoder(decoder: MaskDecoder, query_proj: nn.Linear, basis: Tensor, *, zero: bool = False) -> None:
    """Set the weights so that the mask logits are those of queries and patches compared directly.

    Queries are the text embeddings, the layers' updates start at zero, and the last layer's query and key maps are
    multiples of the identity. The biases of queries and keys are opposite along the last direction of ``basis``
    (`patch_directions`), along which patches vary least. A relationship descriptor adds the words' comparison with the
    whole image. ``zero`` starts with logits of zero instead, from which gradients reach the last layer's keys.
    """
    direction = basis[-1]
    *inner, last = cast("list[DecoderLayer]", list(decoder.layers))
    for layer in inner:
        zero_updates(layer)
    dim = last.query.in_features
    scale = (dim // last.num_heads) ** -0.5 / last.num_heads
    length = dim**0.5 if inner else 1.0  # a norm leaves vectors of this length
    factor = (GAIN / (scale * length)) ** 0.5
    for linear in (last.query, last.key):
        nn.init.eye_(linear.weight)
        linear.weight.mul_(factor)
    last.key.bias.copy_(_KEY_BIAS * direction)
    pass_text(query_proj, direction, IMAGE_WEIGHT * GAIN / (scale * factor * length * _KEY_BIAS))
    last.query.bias.copy_(-OFFSET / (scale * _KEY_BIAS) * direction)
    if zero:
        for parameter in (last.key.weight, last.key.bias, last.query.bias):
            nn.init.zeros_(parameter)


@torch.no_grad()
def zero_updates(layer: DecoderLayer) -> None:
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
