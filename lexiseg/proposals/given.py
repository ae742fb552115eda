"""Masks that are given, not proposed: ground truth, for the analyses that ask what perfect masks would give."""

from torch import Tensor
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.label_ids import IGNORE_INDEX
from lexiseg.proposals.base import ProposalGenerator, Proposals, check_images, hard_proposals


class GroundTruth(ProposalGenerator):
    """A generator that "proposes" the masks of ``labels`` (B, H, W), which are set beforehand.

    There is one binary mask for each class of an image, in ascending order. ``ignored`` is the label of no class, to be
    set to :func:`lexiseg.label_ids.ignore_index` of the classes where there are more than 255.
    """

    def __init__(self) -> None:
        super().__init__()
        self.labels: Tensor | None = None
        self.ignored = IGNORE_INDEX

    def forward(self, images: Tensor, text: Tensor | None = None) -> Proposals:
        """The masks of the given labels, padded like the images; a `LexisegError` if they do not fit."""
        check_images(images, self.stride)
        labels = self.labels
        if labels is None:
            raise LexisegError("Ground-truth proposals need labels; set the generator's attribute labels.")
        height, width = images.shape[-2:]
        if len(labels) != len(images) or labels.shape[1] > height or labels.shape[2] > width:
            raise LexisegError(
                f"The labels given are {tuple(labels.shape)}, which does not fit images of {len(images)} x {height} x "
                f"{width}; give the labels of these images, at their size."
            )
        labels = F.pad(labels, (0, width - labels.shape[2], 0, height - labels.shape[1]), value=self.ignored)
        labels = labels.to(images.device)
        present = [values[values != self.ignored] for values in (image.unique() for image in labels)]
        return hard_proposals([image == own[:, None, None] for image, own in zip(labels, present, strict=True)])
