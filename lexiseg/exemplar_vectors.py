"""Vectors of exemplars, made from a tower's own dense features, in place of the vectors of words."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.text import TextEmbedder
from lexiseg.errors import LexisegError
from lexiseg.exemplars import Exemplar
from lexiseg.images import read_image
from lexiseg.models.base import SegmentationModel
from lexiseg.models.dense_clip import DenseCLIP, DenseCLIPOptions
from lexiseg.normalisation import normalise
from lexiseg.vocabulary import Vocabulary
from lexiseg.windows import working_size

_NEUTRAL = ("object", "thing", "background")


def with_exemplars(
    model: SegmentationModel, embedder: TextEmbedder, text: Tensor, vocabulary: Vocabulary, max_pixels: float
) -> Tensor:
    """Put the vectors of the exemplars in the place of their words.

    A tower's patches lie closer to other patches than to any text, so that an exemplar by itself would win everywhere.
    Its vector is therefore the difference between the thing and the rest of its picture, added to the mean of the
    words: other places score it like an average word, and similar things higher.

    ``model``: the system; its tower sees the exemplars as its dense features see pictures. ``embedder``: remembers the
    vectors like those of words. ``text``: (W, D) unit vectors of the words, or what else the system makes of them; what
    stands at the exemplars' places is replaced. Returns the text, of the same shape. Raises LexisegError if a picture
    or mask is wrong, or the system's text has several vectors per word and it takes no picture.
    """
    places = vocabulary.exemplars
    if text.dim() != 2:
        text = text.clone()
        for place, one in places:
            image = read_image(one.image, max_pixels=max_pixels)
            text[place] = model.embed_exemplar(image, read_mask(one, image, max_pixels))
        return text
    words = torch.ones(len(text), dtype=torch.bool).index_fill_(0, torch.tensor([place for place, _ in places]), False)
    if bool(words.any()):
        average = text[words.to(text.device)].mean(dim=0)
    else:
        average = embedder.embed(_NEUTRAL, vocabulary.templates).to(text.device).mean(dim=0)
    vectors = exemplar_vectors(model, embedder, [one for _, one in places], max_pixels).to(text)
    text = text.clone()
    for (place, _), (thing, rest) in zip(places, vectors, strict=True):
        text[place] = F.normalize(thing - rest + average, dim=0)
    return text


def exemplar_vectors(
    model: SegmentationModel, embedder: TextEmbedder, exemplars: Sequence[Exemplar], max_pixels: float
) -> Tensor:
    """The mean dense feature of each thing and of the rest of its picture: (N, 2, D), remembered like text."""
    dense = model if isinstance(model, DenseCLIP) else DenseCLIP(model.clip, DenseCLIPOptions(window_size=None))
    manner = ["exemplar", dense.options.model_dump_json(), model.clip.fingerprint()]
    images = [read_image(one.image, max_pixels=max_pixels) for one in exemplars]
    masks = [read_mask(one, image, max_pixels) for one, image in zip(exemplars, images, strict=True)]
    keys = []
    for image, mask in zip(images, masks, strict=True):
        digest = hashlib.sha256(image.numpy().tobytes() + mask.numpy().tobytes() + str(image.shape).encode())
        keys += [f"{digest.hexdigest()} {part}" for part in ("thing", "rest")]

    def encode(found: list[int]) -> Tensor:
        made = {number: _encode(dense, images[number], masks[number]) for number in {index // 2 for index in found}}
        return torch.stack([made[index // 2][index % 2] for index in found]).cpu()

    return embedder.remember(manner, keys, encode).unflatten(0, (-1, 2))


def read_mask(exemplar: Exemplar, image: Tensor, max_pixels: float) -> Tensor:
    """Where the thing is: bool (H, W) of the image.

    Raises LexisegError if the mask has another size, or the thing is nowhere or everywhere.
    """
    height, width = (int(side) for side in image.shape[-2:])
    if exemplar.box is not None:
        left, top, right, bottom = exemplar.box
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[top:bottom, left:right] = True
    else:
        given = exemplar.mask
        if hasattr(given, "dtype") and getattr(given, "ndim", 0) == 2:
            mask = torch.as_tensor(given != 0).cpu()  # what is compared lies in memory as torch wants it
        else:
            mask = (read_image(given, max_pixels=max_pixels) > 0).any(dim=0)
        if tuple(mask.shape) != (height, width):
            raise LexisegError(
                f"The mask of the exemplar '{exemplar.word}' is {mask.shape[1]} x {mask.shape[0]} and its picture "
                f"{width} x {height}; give a mask of the same size."
            )
    if not bool(mask.any()) or bool(mask.all()):
        where = "nowhere" if not bool(mask.any()) else "everywhere"
        raise LexisegError(
            f"The thing of the exemplar '{exemplar.word}' is {where} in its picture; mark it, and leave some of the "
            "picture around it."
        )
    return mask


@torch.no_grad()
def _encode(model: DenseCLIP, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (D,) of the thing and of the rest."""
    device, policy = model.device, model.window
    size = working_size(int(image.shape[1]), int(image.shape[2]), policy.short_side, policy.long_side)
    pixels = F.interpolate(image[None].to(device).float() / 255, size=size, mode="bilinear", antialias=True)
    patches = model.dense_features(normalise(pixels, model.mean, model.std))[0].float()
    weights = F.interpolate(mask[None, None].to(device).float(), size=patches.shape[:2], mode="area")[0, 0]
    thing, rest = (F.normalize((part[..., None] * patches).sum(dim=(0, 1)), dim=0) for part in (weights, 1 - weights))
    return thing, rest
