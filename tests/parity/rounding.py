"""Gradients that rounding decides: what a golden case in single precision can say of them, and what it cannot.

A norm over very few values (a group of two pixels at stride 32) is nearly a step: its gradient is a difference of
nearly equal numbers. A ReLU whose input is zero but for rounding has one of two gradients. There two right programs
differ by more than the usual tolerance, and only double precision tells a mistake from rounding. So a gradient that
misses is made again in double precision, and once more for several changes of the last bits of every weight and pixel.
It passes if the authors' value lies no further from the exact one than such changes move it, and the report says so.
What a ReLU lets through reaches every gradient in front of it, so that a case may miss many of them at once: those that
are the authors' in double precision are right, however many they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from tests.parity.case import GRADIENT_TOLERANCE, Case

# Two units in the last place of single precision: every operation of a network changes its values by about as much.
_LAST_BITS = 2.0**-22
_DRAWS = 4
_MARGIN = 3.0
# More than this part of a case's gradients cannot be rounding.
_MOST = 0.1

Gradients = Callable[[int | None], Mapping[str, Tensor]]
"""From None to the gradients in double precision; from a seed to those with other last bits."""


def stirred(tensors: Iterable[Tensor], seed: int | None) -> None:
    """Change the last single-precision bits of double-precision tensors in place; not at all for the seed None."""
    if seed is None:
        return
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.mul_(1 + _LAST_BITS * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))


def in_double(modules: Iterable[nn.Module], seed: int | None) -> None:
    """Bring modules to double precision, their last bits changed."""
    for module in modules:
        module.double()
        stirred([*module.parameters(), *module.buffers()], seed)


def check_gradients(case: Case, gradients: Mapping[str, Tensor], again: Gradients, most: float = _MOST) -> None:
    """Compare all ``expected/grad/`` tensors of a case.

    Args:
        case: the case.
        gradients: ours, by the authors' keys.
        again: makes them in double precision.
        most: the part of them that may be further from ours in double precision than the tolerance.
    """
    names = case.expected_names("grad/")
    runs: list[dict[str, Tensor]] = []
    excused = 0
    for name in names:
        key = name.removeprefix("grad/")
        if key not in gradients:
            case.problems.append(f"{name}: there is no such gradient")
            continue
        ours, expected = gradients[key].detach().double(), case.tensors[f"expected/{name}"].double()
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        if ours.shape != expected.shape or float((ours - expected).abs().max()) <= GRADIENT_TOLERANCE * scale:
            case.check(name, gradients[key])
            continue
        runs = runs or [dict(again(seed)) for seed in (None, *range(_DRAWS))]
        exact = runs[0][key]
        moved = max(float((each - exact).abs().max()) for each in (ours, *(run[key] for run in runs[1:])))
        theirs = float((expected - exact).abs().max())
        excused += theirs > GRADIENT_TOLERANCE * scale
        if theirs > _MARGIN * moved or excused > max(1, round(most * len(names))):
            case.check(name, gradients[key])
            continue
        case.touched.add(f"expected/{name}")
        case.compared.append((name, theirs, 0.0))
        case.notes.append(
            f"{name}: {float((ours - expected).abs().max()) / scale:.1e} of its largest value from the authors', which "
            f"is rounding: theirs is {theirs:.1e} from the gradient in double precision (largest value "
            f"{float(exact.abs().max()):.1e}), and other last bits of weights and pixels move that by {moved:.1e}"
        )
