"""The image side of the one-stage systems: a CLIP tower with prompts, run once over a picture.

Where the authors' code and the papers differ the code is followed, and said so at that line, because the published
checkpoints need it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lexiseg.clip.image import ImageTokens
from lexiseg.clip.model import CLIP
from lexiseg.models.base import ImageFeatures, SegmentationModel, Triple
from lexiseg.models.mask_decoder import unit
from lexiseg.models.one_stage_options import Backbone, OneStageOptions
from lexiseg.models.prompts import VisualPrompts
from lexiseg.models.spectral import SpectralFilter, SpectralOptions
from lexiseg.windows import WindowPolicy


class OneStageTower(SegmentationModel):
    """The image tower of `lexiseg.models.one_stage.OneStageModel`, its prompts, and what of it trains.

    Shapes: images (B, 3, H, W) give h x w = N patches.

    Args:
        clip: the towers. The text tower is frozen always, the image tower unless ``backbone`` is "finetune".
        options: see `OneStageOptions`.
        seen_names: classes that had masks in training.
        backbone: "prompt" keeps CLIP frozen and learns prompts; "fixed" is a frozen tower without prompts, "finetune"
            a tower that is trained.
        spectral: add spectral prompts with these options, decode with spectral guidance, and train with the structural
            similarity in place of the dice loss: all three of SPT-SEG. None has none of them.

    Raises:
        LexisegError: the options do not fit the tower.
    """

    options: OneStageOptions

    def __init__(
        self,
        clip: CLIP,
        options: OneStageOptions,
        seen_names: Sequence[str] = (),
        *,
        backbone: Backbone = "prompt",
        spectral: SpectralOptions | None = None,
    ) -> None:
        super().__init__(clip, options, tuple(seen_names))
        tower = clip.image_tower
        self.backbone: Backbone = backbone
        self.spectral_options = spectral
        self.prompts: VisualPrompts | None = None
        if backbone == "prompt":
            depth = tower.num_blocks - 1 if options.prompt_depth is None else options.prompt_depth
            self.prompts = VisualPrompts(
                options.num_prompts, tower.width, tower.num_blocks, tower.patch_size, depth, options.prompt_dropout
            )
        self.spectral: SpectralFilter | None = None
        if spectral is not None:
            side = spectral.filter_grid or max((options.window_size or clip.image_size) // tower.patch_size, 1)
            self.spectral = SpectralFilter((side, side), tower.width)

    @property
    def mean(self) -> Triple:
        """Mean the images are normalised with, RGB in 0..1."""
        return self.options.mean or self.clip.mean

    @property
    def std(self) -> Triple:
        """Standard deviation the images are normalised with, RGB in 0..1."""
        return self.options.std or self.clip.std

    @property
    def window(self) -> WindowPolicy:
        """How to run it over a picture by default."""
        options = self.options
        stride = options.window_stride or options.window_size or 0
        return WindowPolicy(options.window_size, stride, options.short_side, antialias=options.antialias)

    def frozen_names(self) -> tuple[str, ...]:
        """Beginnings of the names of parameters outside CLIP that do not train."""
        return ("spectral.",) if self.spectral_options is not None and not self.spectral_options.train_filter else ()

    def trainable_names(self) -> tuple[str, ...]:
        """Everything outside CLIP but the `frozen_names`; with a fine-tuned backbone the image tower as well."""
        tower = ("clip.model.visual.",) if self.backbone == "finetune" else ()
        frozen = self.frozen_names()
        return tuple(
            name
            for name, _ in self.named_parameters()
            if name.startswith(tower) or not name.startswith(("clip.", *frozen))
        )

    def run_tower(self, images: Tensor, *, levels: Sequence[int] = (), keep_rows: bool = False) -> ImageTokens:
        """Run the image tower with the prompts.

        Args:
            images: (B, 3, H, W), sides multiples of the patch size.
            levels: blocks (0-based) whose outputs are wanted.
            keep_rows: see `VisualPrompts.hook`.
        """
        tower, options = self.clip.image_tower, self.options
        tokens, grid = tower.embed(
            images,
            interpolation=options.position_interpolation,
            class_embedding_twice=options.class_embedding_twice,
        )
        hook = None if self.prompts is None else self.prompts.hook(grid[0] * grid[1], keep_rows=keep_rows)
        if self.spectral is not None and self.spectral_options is not None:
            hook = self.spectral.hook(grid, self.spectral_options.filter_blocks, hook)
        return tower.run(tokens, grid, before_block=hook, levels=levels)

    def finish(self, result: ImageTokens) -> tuple[Tensor, Tensor]:
        """Turn the tower's last tokens into unit vectors: class embedding (B, D) and patches (B, N, D)."""
        tokens = result.tokens
        if tokens.shape[1] > 1 + result.num_patches:
            tokens = torch.cat([tokens[:, :1], tokens[:, -result.num_patches :]], dim=1)
        if self.prompts is not None:
            tokens = self.prompts.norm(tokens)
        tokens = unit(self.clip.image_tower.project(tokens))
        return tokens[:, 0], tokens[:, 1:]

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """Blocks (0-based) whose outputs `collect` needs."""
        return ()

    def collect(self, result: ImageTokens, patches: Tensor) -> dict[str, Tensor]:
        """What `encode_images` keeps beside the class embedding.

        Args:
            result: of the tower, with the `level_blocks`.
            patches: final patches (B, N, D) of unit length.
        """
        return {"patches": patches.unflatten(1, result.grid)}

    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Run the image tower; see `SegmentationModel.encode_images`.

        Returns:
            features with ``cls`` (B, D), of unit length, and what `collect` adds: for ZegCLIP and SPT-SEG ``patches``
            (B, h, w, D), of unit length.
        """
        size = (int(images.shape[-2]), int(images.shape[-1]))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.backbone != "fixed"):
            result = self.run_tower(self.fit_to_patches(images), levels=self.level_blocks)
        cls, patches = self.finish(result)
        return ImageFeatures(size, {"cls": cls, **self.collect(result, patches)})
