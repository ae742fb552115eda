"""What the two query-based generators share: backbone, class heads, norms and initial weights."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from lexiseg.errors import LexisegError
from lexiseg.matmul import convolve, linear
from lexiseg.proposals.backbone import build_backbone
from lexiseg.proposals.base import ProposalGenerator, Proposals, check_images
from lexiseg.proposals.options import QueryOptions

# The groups of every group norm in the pixel decoders of `transformers`.
_GROUPS = 32


class AnySizeGroupNorm(nn.GroupNorm):
    """Group norm that also takes a single value per group (one channel, one pixel), which then becomes the bias.

    PyTorch's module refuses that as a likely mistake; here it is an image of 32 x 32 pixels in a narrow generator.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, h, w)."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class FastLinear(nn.Linear):
    """A linear layer by `lexiseg.matmul.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., K) to (..., N)."""
        return linear(x, self.weight, self.bias)


class FastConv2d(nn.Conv2d):
    """A convolution of single pixels by `lexiseg.matmul.convolve`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, h, w) to (B, N, h, w), or less with a stride."""
        return convolve(self, x)


def use_own_layers(module: nn.Module) -> None:
    """Turn every group norm under ``module`` into an `AnySizeGroupNorm`, and products of matrices into fast ones."""
    for child in module.modules():
        # In place: some parts of transformers hold their layers in a plain list as well.
        if type(child) is nn.GroupNorm:
            child.__class__ = AnySizeGroupNorm
        elif type(child) is nn.Linear:
            child.__class__ = FastLinear
        elif type(child) is nn.Conv2d and child.kernel_size == (1, 1) and child.groups == 1:
            child.__class__ = FastConv2d


class ClassMLP(nn.Module):
    """Two linear layers with a ReLU between: queries (..., D) to region embeddings (..., E).

    The class head of ZSSeg, DeOP and FreeSeg. (DeOP computes it and does not use it; its checkpoints hold it.)
    """

    def __init__(self, width: int, hidden: int, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, embed_dim)])

    def forward(self, queries: Tensor) -> Tensor:
        """Map queries (..., D) to embeddings (..., E)."""
        return self.layers[1](self.layers[0](queries).relu())


class QueryGenerator(ProposalGenerator):
    """Queries that become masks: N masks at a quarter of the image's size, and an embedding for each.

    Widths that do not fit together are a `LexisegError`. Subclasses call `finish` behind their own parts.
    """

    def __init__(self, options: QueryOptions) -> None:
        super().__init__(frozen_dropout=options.frozen_dropout)
        if options.pixel_dim % _GROUPS:
            raise LexisegError(f"pixel_dim must be a multiple of {_GROUPS} (its group norms), not {options.pixel_dim}.")
        # The sine position embedding fills each half of the width with pairs of sine and cosine.
        for name, width in (("hidden_dim", options.hidden_dim), ("pixel_dim", options.pixel_dim)):
            if width % 4:
                raise LexisegError(f"{name} must be a multiple of 4 (its position embedding), not {width}.")
        if options.hidden_dim % options.heads:
            raise LexisegError(
                f"hidden_dim {options.hidden_dim} cannot be split into {options.heads} heads; change heads."
            )
        self.options = options
        self.backbone = build_backbone(options)

    def finish(self) -> None:
        """Make the class head that the options name, and let all layers be our own, see `use_own_layers`."""
        options = self.options
        self.class_embed: nn.Module | None = None
        if options.class_head == "cosine-mlp":
            self.class_embed = ClassMLP(options.hidden_dim, options.class_hidden, options.embed_dim)
        elif options.class_head == "linear":
            self.class_embed = nn.Linear(options.hidden_dim, options.embed_dim)
        self.embed_dim = None if self.class_embed is None else options.embed_dim
        use_own_layers(self)

    def forward(self, images: Tensor, text: Tensor | None = None) -> Proposals:
        check_images(images, self.stride)
        return self.propose(self.backbone(images), text)

    @abstractmethod
    def propose(self, features: list[Tensor], text: Tensor | None = None) -> Proposals:
        """Propose regions from the backbone's features, at strides 4, 8, 16, 32; ``text`` as in `forward`."""

    def proposals(self, states: Iterable[Tensor], masks: Iterable[Tensor]) -> Proposals:
        """What the queries (B, N, D) and masks (B, N, h, w) of decoder layers, first to last, are as proposals."""
        levels = [
            Proposals(mask_logits, None if self.class_embed is None else self.class_embed(state))
            for state, mask_logits in zip(states, masks, strict=True)
        ]
        return replace(levels[-1], aux=tuple(levels[:-1]))


def start_convolutions(module: nn.Module) -> None:
    """Start convolutions as the papers do: uniform by fan-in (Caffe2's "Xavier fill"), biases zero."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_uniform_(child.weight, a=1)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def start_matrices(module: nn.Module) -> None:
    """Start a transformer as the papers do: every matrix Xavier-uniform, attention biases zero."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
        elif "attn" in name and name.endswith("bias") and "norm" not in name:
            nn.init.zeros_(parameter)
