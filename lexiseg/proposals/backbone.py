"""Backbones of the proposal generators: images in, features at strides 4, 8, 16 and 32 out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from lexiseg.errors import LexisegError
from lexiseg.matmul import convolve, plain

if TYPE_CHECKING:
    from lexiseg.proposals.options import Backbone, QueryOptions

RESNET_WIDTHS = (64, 128, 256, 512)
TINY_WIDTHS = (32, 48, 64, 96)
_DEPTHS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}
_EXPANSION = 4
# Dilations of the last stage's 3x3 convolutions in the "c" variants, which keep its stride of 2.
_MULTI_GRID = (1, 2, 4)


class ResNetBackbone(nn.Module):
    """timm's ResNet with frozen batch norms, stride in the 3x3 convolution: "r50", "r101", "r50c" or "r101c".

    The variants with "c" are detectron2's DeepLab ResNets as the released DeOP, ZSSeg and FreeSeg configure them: a
    stem of three 3x3 convolutions, and dilations 1, 2, 4 in the last stage. Frozen batch norms use given statistics,
    and all four of their tensors are buffers: the optimiser never sees them. ``widths`` are the stages' inner ones, a
    quarter of the features'. An odd width of the stem is a `LexisegError`.

    Attributes:
        channels: widths of the four features.
    """

    def __init__(self, kind: Backbone, widths: tuple[int, int, int, int], stem_width: int) -> None:
        super().__init__()
        from timm.models.resnet import Bottleneck, ResNet

        if stem_width % 2:
            raise LexisegError(f"The stem width of {kind} must be even, not {stem_width}; change stem_width.")
        deep = kind.endswith("c")
        # The deep stem's last convolution is twice as wide as its others. No last norm starts at zero: frozen, it would
        # stay there and silence its block.
        body = ResNet(
            Bottleneck,
            _DEPTHS[kind.removesuffix("c")],
            num_classes=0,
            global_pool="",
            stem_type="deep",
            stem_width=stem_width // 2,
            channels=widths,
            zero_init_last=False,
            norm_layer=lambda width, **place: FrozenNorm(width),
        )
        if deep:
            for block, dilation in zip(body.layer4, _MULTI_GRID, strict=True):
                block.conv2.dilation = block.conv2.padding = (dilation, dilation)
        else:
            body.conv1 = nn.Conv2d(3, stem_width, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")
        _join_norms(body)
        self.body = body
        self.channels = tuple(width * _EXPANSION for width in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features (B, channels[i], H / 2^(i+2), W / 2^(i+2)), i = 0..3, of images with sides of multiples of 32."""
        body: Any = self.body
        if plain(images):  # as a processor computes convolutions fastest
            images = images.contiguous(memory_format=torch.channels_last)
        x = body.maxpool(body.act1(body.bn1(body.conv1(images))))
        features = []
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = stage(x)
            features.append(x)
        return features


class FrozenNorm(FrozenBatchNorm2d):
    """torchvision's frozen batch norm, in one pass over the features, or none behind a `NormedConv2d`."""

    def affine(self) -> tuple[Tensor, Tensor]:
        """The factor and the term (C,) that the norm amounts to."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, h, w), unless the convolution before has done so."""
        if plain(x):
            return x
        scale, bias = self.affine()
        return torch.addcmul(bias[:, None, None], x, scale[:, None, None])


class NormedConv2d(nn.Conv2d):
    """A convolution that applies the frozen norm behind it as well where a processor computes it, see `plain`."""

    norm: tuple[FrozenNorm]  # a tuple hides it from the state of the module

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (B, C, h, w)."""
        if not plain(x):
            return super().forward(x)
        scale, bias = self.norm[0].affine()
        return convolve(self, x, self.weight * scale[:, None, None, None], bias)


def _join_norms(body: nn.Module) -> None:
    """Let every convolution of a ResNet know the norm behind it."""
    convolutions: list[Any] = [layer for layer in body.modules() if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in body.modules() if isinstance(layer, FrozenNorm)]
    for convolution, norm in zip(convolutions, norms, strict=True):
        convolution.__class__, convolution.norm = NormedConv2d, (norm,)


class TinyBackbone(nn.Module):
    """A light residual network with group norms: it trains from scratch, with any batch, and has no statistics.

    Two strided 3x3 convolutions, the first to ``stem_width``, then a residual block of two per stage, strided in all
    but the first. About 50 million multiply-adds for 128 x 128 pixels at its usual widths.
    """

    def __init__(self, widths: tuple[int, int, int, int] = TINY_WIDTHS, stem_width: int = 16) -> None:
        super().__init__()
        self.channels = widths
        self.stem = nn.Sequential(*_unit(3, stem_width, 2), *_unit(stem_width, widths[0], 2))
        inputs = (widths[0], *widths[:3])
        strides = (1, 2, 2, 2)
        self.stages = nn.ModuleList(
            _Residual(before, after, stride) for before, after, stride in zip(inputs, widths, strides, strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """See `ResNetBackbone.forward`."""
        x = self.stem(images)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def _unit(before: int, after: int, stride: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    return nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), _norm(after), nn.ReLU()


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(groups for groups in (8, 4, 2, 1) if width % groups == 0), width)


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        second = _norm(after)
        self.body = nn.Sequential(
            *_unit(before, after, stride), nn.Conv2d(after, after, 3, padding=1, bias=False), second
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), _norm(after))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.shortcut(x) + self.body(x))


def build_backbone(options: QueryOptions) -> ResNetBackbone | TinyBackbone:
    """Build the backbone that the options name, with random weights."""
    if options.backbone == "tiny":
        return TinyBackbone(options.widths or TINY_WIDTHS, options.stem_width or 16)
    usual = 128 if options.backbone.endswith("c") else 64
    return ResNetBackbone(options.backbone, options.widths or RESNET_WIDTHS, options.stem_width or usual)
