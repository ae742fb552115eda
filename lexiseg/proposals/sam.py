"""Segment Anything's automatic masks as proposals: no training, no classes.

Kirillov et al., "Segment Anything", ICCV 2023, through `transformers`' mask generation, which also runs SAM 2. MAFT and
DeOP show it as a generator; neither says more than "automatic masks", so the settings are SAM's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.hub import GIVE_FOLDER, download_folder
from lexiseg.normalisation import IMAGENET_MEAN, IMAGENET_STD, pixels_of
from lexiseg.proposals.base import ProposalGenerator, Proposals, check_images, hard_proposals
from lexiseg.proposals.options import SamOptions


class Sam(ProposalGenerator):
    """Automatic masks of SAM or SAM 2.

    The model is loaded when it is first run. It is not a part of this module: it is not saved with the system, has no
    parameters here, and is never trained.
    """

    def __init__(self, options: SamOptions) -> None:
        super().__init__()
        self.options = options
        self.pipeline: Any = None
        # Follows the module to its device.
        self.register_buffer("where", torch.zeros(()), persistent=False)

    def use(self, model: Any, image_processor: Any) -> Sam:
        """Run this SAM of `transformers` instead of the one the options name, and return the generator."""
        from transformers.pipelines.mask_generation import MaskGenerationPipeline

        self.pipeline = MaskGenerationPipeline(
            model=model.eval(), image_processor=image_processor, device=self.where.device
        )
        return self

    def load(self, then: str = GIVE_FOLDER) -> Any:
        """The pipeline, on this module's device; ``then`` as in `lexiseg.hub.download`.

        Raises LexisegError if the model cannot be had.
        """
        if self.pipeline is None:
            name = self.options.weights
            if Path(name).is_file():
                raise LexisegError(
                    f"The SAM '{name}' is a file; run `lexiseg convert {name} -o FOLDER` and give that folder as "
                    "proposals.weights."
                )
            from transformers import AutoImageProcessor, AutoModelForMaskGeneration

            folder = name if Path(name).is_dir() else download_folder(name, name, "*processor*", then=then)
            try:
                self.use(AutoModelForMaskGeneration.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder))
            except Exception as error:  # transformers and safetensors raise errors of many kinds
                raise LexisegError(
                    f"The SAM model '{name}' could not be loaded ({type(error).__name__}); give a local folder "
                    "of it, or the name of a SAM on the Hugging Face hub."
                ) from error
        pipeline = self.pipeline
        if pipeline.device != self.where.device:
            pipeline.device = self.where.device
            pipeline.model.to(self.where.device)
        return pipeline

    @torch.no_grad()
    def forward(self, images: Tensor, text: Tensor | None = None) -> Proposals:
        """Propose the binary masks that SAM finds, the best first; a `LexisegError` if it cannot be loaded."""
        check_images(images, self.stride)
        return hard_proposals([self._masks(image) for image in images])

    def _masks(self, image: Tensor) -> Tensor:
        """Masks (N, h, w) in 0..1, means over squares of the option's side, of one normalised image (3, H, W)."""
        from PIL import Image

        pixels = pixels_of(image, IMAGENET_MEAN, IMAGENET_STD)
        pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
        picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
        options = self.options
        pipeline = self.load()
        found = pipeline(
            picture,
            points_per_batch=options.points_per_batch,
            points_per_crop=options.points_per_side,
            pred_iou_thresh=options.pred_iou,
            stability_score_thresh=options.stability,
            crops_nms_thresh=options.nms,
        )
        masks = [torch.as_tensor(mask, device=image.device).bool() for mask in found["masks"]]
        kept = torch.stack(masks) if masks else image.new_zeros(0, *image.shape[1:])
        kept = without_overlaps(kept[: options.max_masks], options.overlaps)
        shown = kept[kept.flatten(1).any(1), None].float()
        return F.avg_pool2d(shown, options.mask_stride, ceil_mode=True)[:, 0]


def without_overlaps(masks: Tensor, keeper: str) -> Tensor:
    """Give every pixel of masks (N, H, W) bool to the "largest" or the "smallest" that has it, or to "all" of them."""
    if keeper == "all" or len(masks) < 2:
        return masks
    areas = masks.flatten(1).sum(1)
    order = areas.argsort(descending=keeper == "largest", stable=True)
    # Rank 0 is the mask that keeps; where no mask lies, every rank is the last one and the mask says no anyway.
    first = masks[order].to(torch.uint8).argmax(0)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device)
    return masks & (first[None] == ranks[:, None, None])
