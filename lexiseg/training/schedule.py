"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def poly_warmup(
    step: int,
    total_steps: int,
    base_lr: float,
    *,
    warmup_steps: int = 1500,
    power: float = 0.9,
    min_lr: float = 1e-6,
    warmup_ratio: float = 1e-6,
) -> float:
    """Polynomial decay with linear warm-up, as ZegCLIP and Cascade-CLIP train.

    With ``r = (base_lr - min_lr) * (1 - step / total_steps) ** power + min_lr`` the rate is ``r``, and during the
    first ``warmup_steps`` steps ``r * (1 - (1 - step / warmup_steps) * (1 - warmup_ratio))``. A group's multiplier
    belongs into ``base_lr``: the floor ``min_lr`` is absolute, so multiplying the result would not be the same.

    Args:
        step: 0-based optimizer step, ``0 <= step``; steps past the end stay at ``min_lr``.
        total_steps: number of optimizer steps of the whole run, at least 1.
        base_lr: the group's peak rate.
        warmup_steps: length of the warm-up; 0 switches it off.
        power: exponent of the decay.
        min_lr: rate at the end of the run.
        warmup_ratio: fraction of the rate at step 0.

    Returns:
        The learning rate for the update made at ``step``.

    Raises:
        ValueError: ``step`` is negative or ``total_steps`` is not positive.

    Source: the authors' training configuration of ZegCLIP (CVPR 2023, Sec. 4.2, "default schedule").
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"poly_warmup needs step >= 0 and total_steps >= 1, got {step} and {total_steps}")
    remaining = max(0.0, 1.0 - step / total_steps)
    rate = (base_lr - min_lr) * remaining**power + min_lr
    return rate * warmup_factor(step, warmup_steps, warmup_ratio)


def cosine(step: int, total_steps: int, base_lr: float, *, min_lr: float = 0.0) -> float:
    """Half a cosine from ``base_lr`` down to ``min_lr``, as ZSSeg, FreeSeg and DeOP learn their prompts.

    Args:
        step: 0-based optimizer step; steps past the end stay at ``min_lr``.
        total_steps: number of optimizer steps of the whole run.
        base_lr: the group's rate.
        min_lr: rate at the end.
    """
    return min_lr + (base_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total_steps)))


def warmup_factor(step: int, warmup_steps: int, warmup_ratio: float, *, constant: bool = False) -> float:
    """What the rate is multiplied with in the warm-up, and 1 behind it.

    Args:
        step: 0-based optimizer step.
        warmup_steps: length of the warm-up; 0 switches it off.
        warmup_ratio: the factor at step 0.
        constant: keep that factor to the end of the warm-up, instead of climbing linearly to 1.
    """
    if step >= warmup_steps:
        return 1.0
    return warmup_ratio if constant else 1.0 - (1.0 - step / warmup_steps) * (1.0 - warmup_ratio)


def constant_warmup(step: int, base_lr: float, *, warmup_steps: int = 0, warmup_ratio: float = 1e-6) -> float:
    """A constant rate after a linear warm-up from ``base_lr * warmup_ratio``.

    Args:
        step: 0-based optimizer step.
        base_lr: the group's rate.
        warmup_steps: length of the warm-up; 0 switches it off.
        warmup_ratio: fraction of the rate at step 0.
    """
    return base_lr * warmup_factor(step, warmup_steps, warmup_ratio)
