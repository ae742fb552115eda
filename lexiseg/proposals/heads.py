"""What the two query-based generators share: class heads, norms and initial weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lexiseg.errors import LexisegError
from lexiseg.matmul import convolve, linear
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


def build_class_head(options: QueryOptions) -> nn.Module | None:
    """The class head that the options name; None for "none"."""
    if options.class_head == "cosine-mlp":
        return ClassMLP(options.hidden_dim, options.class_hidden, options.embed_dim)
    if options.class_head == "linear":
        return nn.Linear(options.hidden_dim, options.embed_dim)
    return None


def check_query_options(options: QueryOptions) -> None:
    """Check that widths fit together; a `LexisegError` says which do not."""
    if options.pixel_dim % _GROUPS:
        raise LexisegError(f"pixel_dim must be a multiple of {_GROUPS} (its group norms), not {options.pixel_dim}.")
    # The sine position embedding fills each half of the width with pairs of sine and cosine.
    for name, width in (("hidden_dim", options.hidden_dim), ("pixel_dim", options.pixel_dim)):
        if width % 4:
            raise LexisegError(f"{name} must be a multiple of 4 (its position embedding), not {width}.")
    if options.hidden_dim % options.heads:
        raise LexisegError(f"hidden_dim {options.hidden_dim} cannot be split into {options.heads} heads; change heads.")


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
