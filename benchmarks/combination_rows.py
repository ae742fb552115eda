"""The rows of `benchmarks.combination`: what the trained parts say of one picture, put together in different ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.data.picture_world import PictureWorld
from lexiseg.models import CascadeCLIP, DenseCLIP, SecondLook, ZegCLIP
from lexiseg.models.base import ImageFeatures
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.maft import region_embeddings
from lexiseg.scores import GridScores, Scores
from lexiseg.segmenter import Segmenter
from lexiseg.weights import load_model

WORKING = 128
CELLS = 4
COMBINATION = "second look and smoothing"


def second_look_of(model: ZegCLIP, **options: Any) -> SecondLook:
    """The second look of a trained ZegCLIP, with its weights."""
    given = {**model.options.model_dump(), **options}
    result = SecondLook(model.clip, cast(Any, SecondLook.parse_options(given)), model.seen_names)
    result.load_state_dict(model.state_dict())
    return result.eval()


@dataclass
class Parts:
    """The trained parts that rows are made of."""

    zegclip: ZegCLIP
    second: SecondLook
    frozen: DenseCLIP
    text: Tensor
    cascade: CascadeCLIP | None = None
    proposals: DecoupledModel | None = None
    segmenters: dict[int, Segmenter] = field(default_factory=dict)

    @classmethod
    def load(cls, runs: Path, seed: int, dataset: PictureWorld) -> Parts:
        """Read the runs of one seed."""
        zegclip = cast(ZegCLIP, load_model(runs / f"zegclip-{seed}" / "model"))
        frozen = cast(DenseCLIP, DenseCLIP.build(zegclip.clip, {"method": "clip", "short_side": WORKING}).eval())
        segmenter = Segmenter(zegclip, disk_cache=False)
        text = zegclip.embed_text(segmenter.embedder, segmenter.vocabulary(dataset.vocabulary))
        parts = cls(zegclip, second_look_of(zegclip), frozen, text)
        for side in (WORKING, 144, 160):
            model = ZegCLIP(zegclip.clip, zegclip.options.model_copy(update={"short_side": side})).eval()
            parts.segmenters[side] = Segmenter(model, disk_cache=False)
        for name, folder in (("cascade", f"cascade-clip-{seed}"), ("proposals", "proposals-alone-0")):
            if (runs / folder / "model" / "config.json").is_file():
                setattr(parts, name, load_model(runs / folder / "model"))
        return parts


class Scene:
    """One picture, as each part sees it."""

    def __init__(self, parts: Parts, image: Tensor) -> None:
        self.parts, self.image = parts, image
        self.pixels = parts.segmenters[WORKING].pixels(image)
        half = parts.zegclip.patch_size // 2
        self.cut = self.pixels[..., half:-half, half:-half]
        self.features = parts.second.encode_images(self.pixels)

    def looks(self, *keys: str) -> ImageFeatures:
        """The features without those whose names begin with one of ``keys``."""
        kept = {name: value for name, value in self.features.values.items() if not name.startswith(keys)}
        return ImageFeatures(self.features.size, kept)

    def second(self, *without: str) -> Scores:
        """`SecondLook`, without what begins with these names."""
        features = self.looks(*without) if without else self.features
        return self.parts.second.score(features, self.parts.text)

    def first(self) -> Tensor:
        """The mask logits of ZegCLIP."""
        return self.parts.zegclip.grid_logits(self.looks("second", "colours"), self.parts.text)

    def logits(self, model: ZegCLIP | CascadeCLIP, images: Tensor) -> Tensor:
        """The mask logits of a one-stage model."""
        return model.grid_logits(model.encode_images(images), self.parts.text)

    def cosines(self, images: Tensor) -> Tensor:
        """The cosines of the frozen CLIP's patches and the words (1, C, h, w)."""
        return self.parts.frozen.score(self.parts.frozen.encode_images(images), self.parts.text).logits

    def presence(self) -> Tensor:
        """The cosines of the frozen CLIP's class token and the words (1, C, 1, 1)."""
        tower = self.parts.zegclip.clip.image_tower
        tokens, grid = tower.embed(self.pixels)
        token = F.normalize(tower.project(tower.run(tokens, grid).tokens[:, :1]), dim=-1)
        return (token @ self.parts.text.T).transpose(1, 2)[..., None]


def as_scores(logits: Tensor) -> GridScores:
    """Mask logits as ZegCLIP decodes them."""
    return GridScores(logits, resize_to=(WORKING, WORKING), sigmoid=True)


def fine(logits: Tensor) -> Tensor:
    """A grid on quarters of patches."""
    return F.interpolate(logits, scale_factor=CELLS, mode="bilinear", align_corners=False)


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Two looks as `SecondLook` joins them."""
    first, second, edge = fine(first), fine(second), CELLS // 2
    first[..., edge:-edge, edge:-edge] = (first[..., edge:-edge, edge:-edge] + second) / 2
    return first


def resized(scene: Scene, side: int) -> Scores:
    """ZegCLIP at another working size."""
    segmenter = scene.parts.segmenters[side]
    model = cast(ZegCLIP, segmenter.model)
    model.load_state_dict(scene.parts.zegclip.state_dict())
    return model(segmenter.pixels(scene.image), scene.parts.text)


def mirrored(scene: Scene) -> Scores:
    """The second look at the mirror image."""
    second = scene.logits(scene.parts.zegclip, scene.cut.flip(-1)).flip(-1)
    return as_scores(joined(scene.first(), second))


def mirror_only(scene: Scene) -> Scores:
    """The mean with the mirror image, at the same place."""
    return as_scores((scene.first() + scene.logits(scene.parts.zegclip, scene.pixels.flip(-1)).flip(-1)) / 2)


def frozen_second(scene: Scene) -> Scores:
    """The second look by the frozen CLIP, without prompts and decoder."""
    cosines = F.pad(fine(scene.cosines(scene.cut)), (CELLS // 2,) * 4, mode="replicate")
    return as_scores(fine(scene.first()) + 10.0 * cosines)


def cascade_twice(scene: Scene) -> Scores:
    """The second look with Cascade-CLIP's three decoders."""
    cascade = cast(CascadeCLIP, scene.parts.cascade)
    return as_scores(joined(scene.logits(cascade, scene.pixels), scene.logits(cascade, scene.cut)))


def pooled(scene: Scene) -> Scores:
    """The frozen CLIP's patches pooled in the model's own soft masks, one a class."""
    first, cosines = scene.first(), scene.cosines(scene.pixels)
    masks = (3.0 * first).softmax(dim=1)
    means = torch.einsum("bnhw,bchw->bnc", masks, cosines) / masks.sum((2, 3)).clamp_min(0.1)[..., None]
    return as_scores(first + 5.0 * torch.einsum("bnhw,bnc->bchw", masks, means))


def attended(scene: Scene) -> Scores:
    """Mask attention of the frozen CLIP from block 6 in the masks of the classes that are found, a vote for each."""
    first, text = scene.first(), scene.parts.text
    best = first.argmax(dim=1)
    found = best.unique()
    masks = (best[:, None] == found[:, None, None]).float()
    regions = region_embeddings(scene.parts.zegclip.clip.visual, scene.pixels, masks, start_block=6)
    return as_scores(first + 3.0 * torch.einsum("bnhw,bnc->bchw", masks, F.normalize(regions, dim=-1) @ text.T))


def voted(scene: Scene) -> Scores:
    """Each proposal votes, as far as its pixels agree, for what ZegCLIP says of it on the mean."""
    model = cast(DecoupledModel, scene.parts.proposals)
    images = (scene.pixels * scene.pixels.new_tensor(scene.parts.zegclip.std)[:, None, None]) + scene.pixels.new_tensor(
        scene.parts.zegclip.mean
    )[:, None, None]
    mean, std = (images.new_tensor(values)[:, None, None] for values in (model.mean, model.std))
    proposals = model.propose(model.pad((images - mean) / std))
    said = fine(scene.first()).softmax(dim=1)
    size = (int(said.shape[-2]), int(said.shape[-1]))
    masks = F.interpolate(proposals.mask_logits, size=size, mode="bilinear").sigmoid()
    if proposals.embeddings is not None:
        objects = model.proposal_logits(proposals.embeddings, scene.parts.text).softmax(-1)[..., :-1].sum(-1)
        masks = masks * objects[..., None, None]
    means = torch.einsum("bnhw,bchw->bnc", masks, said) / masks.sum((2, 3)).clamp_min(1e-3)[..., None]
    votes = torch.einsum("bnhw,bnc->bchw", masks * means.amax(2).pow(4)[..., None, None], means)
    return GridScores(said + 0.3 * votes)


Row = Callable[[Scene], Scores]
MAIN: dict[str, Row] = {
    "zegclip": lambda scene: as_scores(scene.first()),
    "second look alone": lambda scene: scene.second("colours"),
    "smoothing alone": lambda scene: scene.second("second"),
    COMBINATION: lambda scene: scene.second(),
}
OTHERS: dict[str, Row] = {
    "zegclip at 144 pixels": lambda scene: resized(scene, 144),
    "zegclip at 160 pixels": lambda scene: resized(scene, 160),
    "zegclip and its mirror image": mirror_only,
    "second look at the mirror image": mirrored,
    "second look by the frozen CLIP": frozen_second,
    "second look with cascade-clip": cascade_twice,
    "zegclip and the frozen CLIP's patches": lambda scene: as_scores(scene.first() + 6.0 * scene.cosines(scene.pixels)),
    "zegclip and the frozen CLIP's class token": lambda scene: as_scores(scene.first() + 3.0 * scene.presence()),
    "frozen CLIP pooled in zegclip's masks": pooled,
    "mask attention in zegclip's masks": attended,
    "votes of the proposals": voted,
}
NEEDS = {"second look with cascade-clip": "cascade", "votes of the proposals": "proposals"}
