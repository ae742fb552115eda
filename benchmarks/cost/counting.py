"""Counting the arithmetic of a forward pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_FLOPS_PER_MAC = 2
# What fvcore charges for an element of a norm's input and of a bilinear resize's output.
FVCORE_NORM = 5
FVCORE_BILINEAR = 4
_ATTENTION = "scaled_dot_product"


@dataclass(frozen=True)
class Count:
    """The arithmetic of one run.

    Attributes:
        macs: multiply-adds of all matrix products, convolutions and attention products.
        attention: those of them inside ``scaled_dot_product_attention``, which fvcore does not see.
        norm_elements: numbers that went through a layer norm.
        bilinear_elements: numbers that a bilinear resize made.
        by_operation: multiply-adds by PyTorch's operation.
    """

    macs: int
    attention: int
    norm_elements: int
    bilinear_elements: int
    by_operation: dict[str, int] = field(default_factory=dict)

    @property
    def norms(self) -> int:
        """What fvcore adds for the layer norms: five per element."""
        return FVCORE_NORM * self.norm_elements

    @property
    def resizes(self) -> int:
        """What fvcore adds for the bilinear resizes: four per element of the result."""
        return FVCORE_BILINEAR * self.bilinear_elements


def count(run: Callable[[], Any], module: nn.Module | None = None) -> Count:
    """Run once and count.

    A multiply-add counts as one, as in the papers' figures (they call it a FLOP). Attention products count in full,
    masked or not. Elementwise work, softmax, norms, resizes and Fourier transforms do not count.

    Args:
        run: the forward pass; it may run on the meta device, where it costs nothing.
        module: what it runs, if it has parameters that train: none does meanwhile, for PyTorch's counter stumbles over
            views of such parameters.
    """
    flops = FlopCounterMode(display=False, custom_mapping=_more_operations())
    elements = _Elements()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what other threads compute would not be seen
    try:
        with torch.no_grad(), _frozen(module), _no_fast_path(), flops, elements:
            run()
    finally:
        torch.set_num_threads(threads)
    found = flops.get_flop_counts().get("Global", {})
    by_operation = {str(operation): value // _FLOPS_PER_MAC for operation, value in found.items()}
    return Count(
        sum(by_operation.values()),
        sum(value for name, value in by_operation.items() if _ATTENTION in name),
        elements.found["norm"],
        elements.found["bilinear"],
        by_operation,
    )


def fvcore_resize(*shape: int) -> int:
    """What fvcore charges for a bilinear resize to ``shape``."""
    return FVCORE_BILINEAR * math.prod(shape)


class _Elements(TorchDispatchMode):
    """Counts the numbers that go through norms and resizes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_layer_norm.default:
            self.found["norm"] += args[0].numel()
        elif func.overloadpacket is torch.ops.aten.upsample_bilinear2d:
            self.found["bilinear"] += result.numel()
        return result


def _more_operations() -> dict[Any, Callable[..., int]]:
    """What PyTorch's counter leaves out: vectors, and in older releases attention on a CPU."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten.mv: lambda matrix, vector, **_: _FLOPS_PER_MAC * math.prod(matrix),
        aten.addmv: lambda bias, matrix, vector, **_: _FLOPS_PER_MAC * math.prod(matrix),
        aten.dot: lambda vector, other, **_: _FLOPS_PER_MAC * math.prod(vector),
    }


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Queries by keys, and weights by values."""
    batch, heads, queries, width = query
    return _FLOPS_PER_MAC * batch * heads * queries * key[2] * (width + value[3])


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Keep ``nn.MultiheadAttention`` off its one-operation path, which no counter sees into."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _frozen(module: nn.Module | None) -> Iterator[None]:
    training = [] if module is None else [weight for weight in module.parameters() if weight.requires_grad]
    for weight in training:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in training:
            weight.requires_grad_(True)
