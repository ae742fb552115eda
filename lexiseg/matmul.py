"""Products of float32 matrices on a processor, by the library that computes them fastest."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Turned off where a benchmark compares.
enabled = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# MKL, which torch takes for float32, uses no AVX-512 on processors not made by Intel, where oneDNN is a quarter faster;
# on processors without it MKL is.
onednn = torch.backends.cpu.get_cpu_capability() == "AVX512"
# Below this many multiply-adds starting oneDNN's product takes what it saves.
LEAST = 1 << 25


def plain(x: Tensor) -> bool:
    """Whether ``x`` is computed as it is: float32 on a processor, no gradient, no autocast, no graph being made."""
    return (
        enabled
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """``torch.nn.functional.linear`` of x (..., K) and weight (N, K), and a ReLU if that is asked for."""
    if onednn and plain(x) and weight.dtype == x.dtype and x.numel() * len(weight) >= LEAST:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")
        return result
    x = F.linear(x, weight, bias)
    return x.relu_() if relu else x


def convolve(
    layer: nn.Conv2d, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """``layer`` on x (B, C, h, w), with another weight and bias if they are given, and a ReLU if that is asked for.

    A convolution of single pixels is a matrix product, which torch leaves to slower code for one picture.
    """
    weight, bias = (layer.weight, layer.bias) if weight is None else (weight, bias)
    if layer.kernel_size == (1, 1) and plain(x):
        rows = x[..., :: layer.stride[0], :: layer.stride[1]].permute(0, 2, 3, 1)
        return linear(rows, weight.flatten(1), bias, relu=relu).permute(0, 3, 1, 2)
    x = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
    return x.relu_() if relu else x
