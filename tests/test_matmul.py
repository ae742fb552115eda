"""Fast products give what torch's usual ones give, and step aside where they would not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lexiseg import matmul
from lexiseg.proposals.maskformer import MaskFormer
from lexiseg.proposals.options import Backbone, MaskFormerOptions


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "LEAST", 0)
    monkeypatch.setattr(matmul, "onednn", matmul.enabled)  # on any processor


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("relu", [False, True])
@torch.no_grad()
def test_linear(shape: tuple[int, ...], relu: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(12, 16), torch.randn(12)
    for rows, some in ((weight, bias), (weight[4:], bias[4:]), (weight, None)):
        wanted = F.linear(x, rows, some)
        torch.testing.assert_close(matmul.linear(x, rows, some, relu=relu), wanted.relu() if relu else wanted)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_convolve(stride: int, side: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, side, stride, padding=side // 2)
    x = torch.randn(2, 6, 7, 9).contiguous(memory_format=layout)
    torch.testing.assert_close(matmul.convolve(layer, x), layer(x))
    torch.testing.assert_close(matmul.convolve(layer, x, relu=True), layer(x).relu())


def test_gradients_and_other_types_go_the_usual_way() -> None:
    x, weight = torch.randn(4, 8), torch.randn(5, 8, requires_grad=True)
    matmul.linear(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert matmul.linear(x, weight).dtype == torch.bfloat16
    with torch.no_grad():
        assert matmul.linear(x.double(), weight.double()).dtype == torch.float64


@pytest.mark.parametrize("backbone", ["r50c", "r50", "tiny"])
@torch.no_grad()
def test_proposals_are_the_same(monkeypatch: pytest.MonkeyPatch, backbone: Backbone) -> None:
    torch.manual_seed(0)
    options = MaskFormerOptions(
        backbone=backbone, widths=(8, 8, 16, 16), stem_width=8, num_queries=5, decoder_layers=2, ffn_dim=32
    )
    generator = MaskFormer(options).eval()
    for name, values in generator.named_buffers():
        if "bn" in name or "downsample" in name:
            values.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 64, 96)
    fast = generator(images)
    monkeypatch.setattr(matmul, "enabled", False)
    usual = generator(images)
    assert usual.embeddings is not None
    # Both are off by as much from float64: by up to 1e-4 with some releases of torch.
    torch.testing.assert_close(fast.mask_logits, usual.mask_logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(fast.embeddings, usual.embeddings, atol=1e-3, rtol=1e-3)
