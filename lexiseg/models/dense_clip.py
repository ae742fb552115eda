"""Dense CLIP: training-free segmentation that compares an image tower's patches with the text tower's words.

Each patch is compared with each word. A tower was trained through its class token, and the attention of its last block
mixes the patches; the methods here differ in what they replace it with (`lexiseg.models.last_block`), and each has its
authors' settings (``training_free.yaml``).
"""

from collections.abc import Sequence
from functools import cache, reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.model import CLIP
from lexiseg.clip.patch_tower import Grid, PatchTower, QueriesKeys
from lexiseg.clip.positions import Interpolation
from lexiseg.errors import LexisegError
from lexiseg.models.base import ImageFeatures, SegmentationModel
from lexiseg.models.last_block import (
    Feedback,
    Mixing,
    label_agreement,
    majority,
    mix,
    mix_by_proxy,
    neighbourhood,
    proxy_attention,
    self_self,
)
from lexiseg.models.options import WindowOptions
from lexiseg.normalisation import pixels_of
from lexiseg.scores import GridScores
from lexiseg.scores.words import Postprocessing
from lexiseg.smoothing import pamr
from lexiseg.templates import IMAGENET_80
from lexiseg.windows import WindowPolicy

Method = Literal["maskclip", "clip", "sclip", "clearclip", "naclip", "resclip", "proxyclip", "gem"]
TauLambda = tuple[float, float]  # see `Feedback`

# ResCLIP's first pass refines words that are among the best somewhere, and of the others at most so many.
_FEEDBACK_WORDS = 32
_NOTHING = -1e4  # a logit of no weight, which interpolation can take
_SETTINGS = Path(__file__).with_name("training_free.yaml")


@cache
def methods() -> dict[str, dict[str, Any]]:
    """The settings of each method, as ``training_free.yaml`` has them."""
    return yaml.safe_load(_SETTINGS.read_text("utf-8"))["methods"]


class DenseCLIPOptions(WindowOptions):
    """Options of `DenseCLIP`, with those of `WindowOptions`. What is not given is set as by the method's authors.

    Attributes:
        method: whose options these are by default.
        mixing: what replaces the last block's token mixing, see `lexiseg.models.last_block.mix`; "proxy"
            is ProxyCLIP's, which needs a second encoder, and "self-self" GEM's, which spans several blocks.
        whole_block: keep the last block's residual connection and MLP; otherwise only its attention output is
            projected.
        last_blocks: sum the outputs of that many last blocks (ClearCLIP's ``last_n_layers``).
        positions: how position embeddings follow the resolution.
        positions_by_count: see `lexiseg.clip.resize_positions`; a quirk of the released code.
        fit: what happens to images whose sides are not multiples of the patch size: they are resized, the rest is cut
            off, or windows are padded with zeros on all sides.
        pad_to: with ``fit`` "pad", pad to a multiple of this instead of the patch size.
        resize_to_window: interpolate scores to the image's size first, and from there to the size asked for.
        neighbour_std: of NACLIP's Gaussian, in patches.
        beta: see `lexiseg.models.last_block.proxy_attention`.
        gamma: see there.
        proxy: ProxyCLIP's second encoder, by name; see `lexiseg.clip.load_proxy`.
        middle_blocks: blocks (0-based) whose mean attention ResCLIP mixes in; must exist in the tower.
        middle_weights: tau and lambda of that.
        feedback: run ResCLIP's second pass, with the labels of a first one.
        feedback_weights: tau and lambda of that.
        feedback_threshold: probability below which a pixel of the first pass counts as the first word.
        feedback_same_entity: see `lexiseg.models.last_block.label_agreement`.
        depth: GEM's: the last ``depth - 1`` blocks have a self-self path.
        iterations: GEM's, see `lexiseg.models.last_block.self_self`.
        temperature: GEM's, see there.
        logit_scale: of the cosines where they become probabilities: in ResCLIP's first pass, and where a protocol has
            a threshold.
        short_side: the length pictures' shorter side is resized to; None is twice the size the tower was trained at,
            and 0 keeps pictures as they are.
    """

    method: Method = "maskclip"
    mixing: Mixing | Literal["proxy", "self-self"] = "value"
    whole_block: bool = True
    last_blocks: Annotated[int, Field(ge=1)] = 1
    positions: Interpolation | None = None
    positions_by_count: bool = False
    fit: Literal["resize", "crop", "pad"] = "resize"
    pad_to: Annotated[int, Field(ge=1)] | None = None
    resize_to_window: bool = False
    neighbour_std: Annotated[float, Field(gt=0)] = 5.0
    beta: float = 1.2
    gamma: Annotated[float, Field(gt=0)] = 3.0
    proxy: str | None = None
    middle_blocks: tuple[Annotated[int, Field(ge=0)], ...] = ()
    middle_weights: TauLambda = (2.0, 0.4)
    feedback: bool = False
    feedback_weights: TauLambda = (1.8, 0.7)
    feedback_threshold: Annotated[float, Field(ge=0, le=1)] = 0.11
    feedback_same_entity: bool = True
    depth: Annotated[int, Field(ge=2)] = 7
    iterations: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(gt=0)] | None = None
    logit_scale: Annotated[float, Field(gt=0)] = 40.0
    short_side: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        settings = methods().get(str(given.get("method", "maskclip"))) if isinstance(given, dict) else None
        if settings is None:
            return given
        return {**{key: value for key, value in settings.items() if key != "protocols"}, **given}


class DenseCLIP(SegmentationModel):
    """Patches against text, by the methods of `DenseCLIPOptions`.

    The score of a word is the cosine of patch and text, -1..1. Except with ResCLIP, whose second pass depends on all
    words, it does not depend on which other words are asked for, so a threshold on it means the same in
    every vocabulary.

    Args:
        proxy: ProxyCLIP's second encoder; None loads the one that the options name.

    Raises:
        LexisegError: the tower cannot be run patch by patch, lacks a block that the method reads, or there is no proxy.
    """

    system = "dense-clip"
    options_class = DenseCLIPOptions
    options: DenseCLIPOptions

    def __init__(
        self,
        clip: CLIP,
        options: DenseCLIPOptions | None = None,
        seen_names: Sequence[str] = (),
        *,
        proxy: nn.Module | None = None,
    ) -> None:
        super().__init__(clip, options, seen_names)
        options = self.options
        count = len(clip.patch_tower.blocks)
        if options.middle_blocks and max(options.middle_blocks) >= count - 1:
            raise LexisegError(
                f"{options.method} reads the blocks {list(options.middle_blocks)}, but the tower of '{clip.name}' has "
                f"{count}; choose another method, or other middle_blocks before the last."
            )
        if options.mixing == "proxy" and proxy is None:
            from lexiseg.clip.proxy import load_proxy

            if options.proxy is None:
                raise LexisegError(
                    "proxyclip needs a second encoder; write for example "
                    "'proxyclip/ViT-B-16/openai+vit_base_patch8_224.dino'."
                )
            proxy = load_proxy(options.proxy)
        # The proxy is named, not saved: it is not ours, and a list hides it from the state of the model.
        self._proxy = [proxy] if proxy is not None else []
        self._released_resize = False
        if options.method != "maskclip" and not clip.packaged:
            self.default_templates = IMAGENET_80
        self.set_trainable()

    def follow(self, protocol: str) -> dict[str, Any]:
        """Run as the method's authors do on a benchmark, ``training_free.yaml``; the changed settings come back.

        Args:
            protocol: such as "voc21"; one that the method has no settings for changes the resize only.
        """
        changes = dict(methods()[self.options.method].get("protocols", {}).get(protocol, {}))
        threshold, area = changes.pop("threshold", 0.0), changes.pop("area", 0.0)
        self.options = DenseCLIPOptions(**{**self.options.model_dump(), **changes})
        self.postprocessing = Postprocessing(self.options.logit_scale, threshold, area) if threshold else None
        self._released_resize = True
        return {**changes, **({"threshold": threshold, "area": area} if threshold else {})}

    @property
    def tower(self) -> PatchTower:
        """The image tower, block by block."""
        return self.clip.patch_tower

    @property
    def window(self) -> WindowPolicy:
        options = self.options
        short_side = 2 * self.clip.image_size if options.short_side is None else options.short_side
        size = options.window_size
        stride = (options.window_stride or size) if size else 0
        if self._released_resize:  # mmsegmentation's
            return WindowPolicy(size, stride, short_side or None, 2048, antialias=False)
        return WindowPolicy(size, stride, short_side or None)

    @property
    def _pads(self) -> bool:
        """Whole pictures are not padded; what is left over of their sides is cut off."""
        return self.options.fit == "pad" and self.options.window_size is not None

    def _crops(self, size: tuple[int, int]) -> bool:
        return self.options.fit != "resize" and not self._pads and min(size) >= self.patch_size

    def fitted(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Bring images to sides that are multiples of the patch, as the option `fit` says.

        Returns:
            the images, and how many pixels of padding lie at the top and the left.
        """
        patch = self.patch_size
        height, width = images.shape[-2:]
        if self._pads:
            unit_size = self.options.pad_to or patch
            unit_size = patch if unit_size % patch else unit_size
            rest = [-side % unit_size for side in (height, width)]
            top, left = rest[0] // 2, rest[1] // 2
            return F.pad(images, (left, rest[1] - left, top, rest[0] - top)), (top, left)
        if self._crops((height, width)):
            return images[..., : height - height % patch, : width - width % patch], (0, 0)
        return self.fit_to_patches(images), (0, 0)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Run the image tower; see `SegmentationModel.encode_images`.

        Returns:
            features with ``patches`` (B, h, w, D) of unit length. With ResCLIP's second pass ``tokens`` that enter the
            last block, the queries and keys of the middle blocks and the ``images`` instead.
        """
        size = (images.shape[-2], images.shape[-1])
        options, tower = self.options, self.tower
        fitted, _ = self.fitted(images)
        tokens, grid = tower.embed(fitted, interpolation=options.positions, by_count=options.positions_by_count)
        if options.mixing == "self-self":
            return ImageFeatures(size, {"patches": self.unit_patches(self.run_self_self(tokens), grid)})
        first = max(len(tower.blocks) - options.last_blocks, 0)
        tokens, kept = tower.run(tokens, stop=first, attending=options.middle_blocks)
        if options.feedback:
            # The first pass labels the pixels of the whole image, those too that are cut off as they fill no patch.
            values = {"tokens": tokens, "images": images if self._crops(size) else fitted}
            for index, (query, key) in kept.items():
                values |= {f"query_{index}": query, f"key_{index}": key}
            return ImageFeatures(size, values)
        if options.mixing == "proxy":
            return ImageFeatures(size, {"patches": self._by_proxy(tokens, grid, fitted)})
        said = self.run_last_blocks(tokens, grid, list(kept.values()))
        return ImageFeatures(size, {"patches": self.unit_patches(said, grid)})

    def run_last_blocks(
        self, tokens: Tensor, grid: Grid, middle: Sequence[QueriesKeys] = (), labels: Tensor | None = None
    ) -> Tensor:
        """What the last blocks say of the tokens that enter the first of them, as the method has it.

        Args:
            tokens: (B, T, W).
            grid: the patches per side.
            middle: ResCLIP's, see `Feedback`.
            labels: see there.

        Returns:
            (B, T, D), not normalised.
        """
        options, tower = self.options, self.tower
        neighbours = None
        feedback = Feedback(middle, options.middle_weights, labels, options.feedback_weights)
        if "neighbours" in options.mixing:
            neighbours = neighbourhood(grid, options.neighbour_std, tower.num_prefix).to(tokens.device)
        said: list[Tensor] = []
        for block in tower.blocks[-options.last_blocks :]:
            qkv = block.qkv(tokens)
            mixed = mix(qkv, options.mixing, neighbours, feedback)  # type: ignore[arg-type]
            said.append(block.finish(tokens, mixed) if options.whole_block else block.output(mixed))
            if block is not tower.blocks[-1]:
                tokens = block.finish(tokens, F.scaled_dot_product_attention(*qkv))
        return tower.project(reduce(torch.add, said))

    @torch.no_grad()
    def dense_features(self, images: Tensor) -> Tensor:
        """The patches (B, h, w, D) of unit length that text is compared with; of ResCLIP those of its first pass."""
        features = self.encode_images(images)
        return features.values["patches"] if "patches" in features.values else self.one_pass(features)

    def one_pass(self, features: ImageFeatures, labels: Tensor | None = None) -> Tensor:
        """ResCLIP's patches (B, h, w, D) of unit length, in the first pass without ``labels``, see `Feedback`."""
        values, grid = features.values, self.tower.grid(features.values["images"])
        middle = [(values[f"query_{index}"], values[f"key_{index}"]) for index in self.options.middle_blocks]
        return self.unit_patches(self.run_last_blocks(values["tokens"], grid, middle, labels), grid)

    def run_self_self(self, tokens: Tensor) -> Tensor:
        """GEM: a path of self-self attention beside the last blocks."""
        options, tower = self.options, self.tower
        first = max(len(tower.blocks) - options.depth + 1, 0)
        tokens, _ = tower.run(tokens, stop=first)
        path = tokens
        for index in range(first, len(tower.blocks)):
            said = self_self(tower.blocks[index], tokens, options.iterations, options.temperature)
            path = path + said if options.whole_block else said
            tokens, _ = tower.run(tokens, index, index + 1)
        return tower.project(path)

    def _by_proxy(self, tokens: Tensor, grid: Grid, images: Tensor) -> Tensor:
        """ProxyCLIP's patches (B, h2, w2, D), on the grid of the proxy."""
        block = self.tower.blocks[-1]
        value = block.qkv(tokens)[2][:, :, -grid[0] * grid[1] :]
        proxy = self._proxy[0]
        if not torch.compiler.is_compiling():  # an exporter follows no module to another device
            proxy.to(images.device)
        features = proxy(pixels_of(images, self.mean, self.std))
        proxy_grid = (features.shape[2], features.shape[3])
        attention = proxy_attention(features.float(), self.options.beta, self.options.gamma)
        mixed = mix_by_proxy(value, grid, attention, proxy_grid)
        return F.normalize(self.tower.project(block.output(mixed)).unflatten(1, proxy_grid), dim=-1)

    @staticmethod
    def unit_patches(tokens: Tensor, grid: Grid) -> Tensor:
        """The patches of tokens (B, K, D), without what stands before them, at unit length (B, h, w, D)."""
        return F.normalize(tokens[:, -grid[0] * grid[1] :].unflatten(1, grid), dim=-1)

    @property
    def exports_any_size(self) -> bool:
        """Unless a second encoder or a second pass makes a grid of its own, or positions are taken by their number."""
        options = self.options
        return options.mixing != "proxy" and not options.feedback and not options.positions_by_count

    def score_grid(self, features: ImageFeatures, text: Tensor) -> Tensor:
        values = features.values
        return _cosines(values["patches"] if "patches" in values else self._second_pass(features, text), text)

    @torch.no_grad()
    def score(
        self, features: ImageFeatures, text: Tensor, *, word_to_class: Tensor | None = None, seen: Tensor | None = None
    ) -> GridScores:
        """Score words against images; see `SegmentationModel.score`. ``seen`` makes no difference."""
        logits = self.score_grid(features, text)
        height, width = features.size
        if self._pads:
            fitted, place = self.fitted(torch.empty(0, 1, height, width))
            frame = (fitted.shape[-2], fitted.shape[-1])
            return GridScores(
                logits, word_to_class=word_to_class, resize_to=frame, crop=features.size, crop_place=place
            )
        resize_to = features.size if self.options.resize_to_window else None
        return GridScores(logits, word_to_class=word_to_class, resize_to=resize_to)

    def _second_pass(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """ResCLIP: the labels of a first pass over the last block steer a second one. (B, h, w, D) of unit length."""
        options, num_prefix = self.options, self.tower.num_prefix
        agree = label_agreement(self.patch_labels(features, text), options.neighbour_std, options.feedback_same_entity)
        weights = F.pad(agree / agree.amax(dim=(1, 2), keepdim=True), (num_prefix, 0, num_prefix, 0))
        return self.one_pass(features, weights)

    def patch_labels(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """The word of each patch (B, h, w) in ResCLIP's first pass, the most frequent of its pixels'."""
        images = features.values["images"]
        height, width = self.tower.grid(images)
        labels = self.first_labels(_cosines(self.one_pass(features), text), images)
        return majority(labels[..., : height * self.patch_size, : width * self.patch_size], (height, width))

    def first_labels(self, logits: Tensor, images: Tensor) -> Tensor:
        """The word of each pixel in ResCLIP's first pass, 0 where none is likely.

        The cosines are interpolated to the image and refined by PAMR, whatever comes after. Of many words only those
        that lead somewhere are refined; what the others take of the probability is interpolated.

        Args:
            logits: (B, W, h, w) cosines.
            images: (B, 3, H, W).

        Returns:
            (B, H, W) int64.
        """
        scale, size = self.options.logit_scale, (int(images.shape[-2]), int(images.shape[-1]))
        logits = logits.float()
        best = logits.flatten(2).amax(dim=2)
        leading = torch.zeros_like(best).scatter_(1, logits.argmax(dim=1).flatten(1), 4.0)
        # No topk: an exported graph cannot show that a tensor of any number of words has that many.
        ranks = torch.arange(torch.sym_min(logits.shape[1], _FEEDBACK_WORDS), device=logits.device)
        words = (best + leading).argsort(dim=1, descending=True)[:, ranks].sort().values
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(1, words, True)[..., None, None]
        rest = (scale * logits).masked_fill(chosen, _NOTHING).logsumexp(dim=1, keepdim=True)
        rest = F.interpolate(rest, size=size, mode="bilinear", align_corners=False)[:, 0]
        refined = logits.gather(1, words[..., None, None].expand(-1, -1, *logits.shape[2:]))
        refined = F.interpolate(refined, size=size, mode="bilinear", align_corners=False)
        refined = scale * pamr(refined, images.float())
        largest, winner = refined.max(dim=1)
        total = torch.logaddexp(refined.logsumexp(dim=1), rest)
        labels = words.gather(1, winner.flatten(1)).unflatten(1, size)
        return labels.masked_fill((largest - total).exp() < self.options.feedback_threshold, 0)


def _cosines(patches: Tensor, text: Tensor) -> Tensor:
    """Patches (B, h, w, D) and text (W, D) of unit length to cosines (B, W, h, w), float32."""
    logits = text.to(patches.dtype) @ patches.flatten(1, 2).transpose(1, 2)
    return logits.unflatten(2, patches.shape[1:3]).float()
