"""The optimizer: parameters grouped by name, and learning rates as pure functions of the step.

So a resumed run needs no state of a scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lexiseg.recipes.schema import Multiplier, TrainSettings

RESUMABLE = frozenset(
    {
        "workers",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "snapshot_every",
        "sharding",
        "keep_best",
        "patience",
    }
)
"""Settings that may differ between the first part of a run and its continuation: they do not touch the weights."""


def identity_of(settings: TrainSettings) -> dict[str, Any]:
    """The settings that must be the same when a run is resumed, as JSON values.

    Keys with their default are left out, so that a run begun before there were such keys can be resumed.
    """
    values = settings.model_dump(mode="json", exclude=set(RESUMABLE), exclude_defaults=True)
    return {**values, "steps": settings.steps}


@dataclass
class ParameterGroup:
    """Trainable parameters that share their learning rate and decay.

    Attributes:
        key: the rule that chose them; "" for the parameters no rule names.
        lr: peak learning rate, multiplier included.
        weight_decay: decay, multiplier included.
        names: of the parameters, in the model's order.
        parameters: the tensors.
    """

    key: str
    lr: float
    weight_decay: float
    names: list[str] = field(default_factory=list)
    parameters: list[torch.nn.Parameter] = field(default_factory=list)


def rule_for(name: str, keys: Iterable[str]) -> str:
    """The rule for the parameter ``name``: the longest key it contains, else the alphabetically first, else ""."""
    return next((key for key in sorted(sorted(keys), key=len, reverse=True) if key in name), "")


_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
)


def undecayed_names(model: nn.Module, settings: TrainSettings) -> frozenset[str]:
    """Names of the parameters that ``settings.no_decay`` takes from the weight decay."""
    kinds = {"norm": _NORMS, "embedding": (nn.Embedding,)}
    wanted = tuple(layer for kind in settings.no_decay for layer in kinds[kind])
    if not wanted:
        return frozenset()
    return frozenset(
        f"{place}.{name}" if place else name
        for place, module in model.named_modules()
        if isinstance(module, wanted)
        for name, _ in module.named_parameters(recurse=False)
    )


def group_parameters(model: nn.Module, settings: TrainSettings) -> list[ParameterGroup]:
    """Sort the parameters that need a gradient into groups by the rules of ``settings``.

    In the order in which the model first needs them; those of one rule with and without decay are apart.
    """
    groups: dict[tuple[str, bool], ParameterGroup] = {}
    undecayed = undecayed_names(model, settings)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key, spared = rule_for(name, settings.multipliers), name in undecayed
        rule = settings.multipliers.get(key, Multiplier())
        if (key, spared) not in groups:
            decay = 0.0 if spared else settings.weight_decay * rule.decay
            groups[key, spared] = ParameterGroup(key, settings.lr * rule.lr, decay)
        groups[key, spared].names.append(name)
        groups[key, spared].parameters.append(parameter)
    return list(groups.values())


def build_optimizer(groups: Iterable[ParameterGroup], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer of ``settings`` for these groups; the loop sets their rates."""
    parts = [{"params": group.parameters, "weight_decay": group.weight_decay} for group in groups]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parts, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.AdamW(parts, lr=settings.lr, betas=settings.betas)


def learning_rate(step: int, base_lr: float, settings: TrainSettings) -> float:
    """The rate of a group with peak rate ``base_lr`` for the update made at 0-based ``step``."""
    if base_lr == 0.0:
        return 0.0
    if settings.schedule == "constant":
        rate = base_lr
    elif settings.schedule == "cosine":
        rate = cosine(step, settings.steps, base_lr, min_lr=settings.min_lr)
    else:
        rate = poly_warmup(step, settings.steps, base_lr, warmup_steps=0, power=settings.power, min_lr=settings.min_lr)
    constant = settings.warmup == "constant"
    return rate * warmup_factor(step, settings.warmup_steps, settings.warmup_ratio, constant=constant)


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
    """Polynomial decay with linear warm-up, as ZegCLIP and Cascade-CLIP train (the authors' configuration, Sec. 4.2).

    With ``r = (base_lr - min_lr) * (1 - step / total_steps) ** power + min_lr`` the rate is ``r``, and during the first
    ``warmup_steps`` steps ``r * (1 - (1 - step / warmup_steps) * (1 - warmup_ratio))``. A group's multiplier belongs
    into ``base_lr``: the floor ``min_lr`` is absolute. ``step`` is 0-based, and past the end the rate is ``min_lr``; a
    negative step, or no steps in all, is a ValueError.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"poly_warmup needs step >= 0 and total_steps >= 1, got {step} and {total_steps}")
    remaining = max(0.0, 1.0 - step / total_steps)
    rate = (base_lr - min_lr) * remaining**power + min_lr
    return rate * warmup_factor(step, warmup_steps, warmup_ratio)


def cosine(step: int, total_steps: int, base_lr: float, *, min_lr: float = 0.0) -> float:
    """Half a cosine from ``base_lr`` down to ``min_lr``, as ZSSeg, FreeSeg and DeOP learn their prompts."""
    return min_lr + (base_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total_steps)))


def warmup_factor(step: int, warmup_steps: int, warmup_ratio: float, *, constant: bool = False) -> float:
    """What the rate is multiplied with in the warm-up: from ``warmup_ratio`` linearly to 1, or constantly that."""
    if step >= warmup_steps:
        return 1.0
    return warmup_ratio if constant else 1.0 - (1.0 - step / warmup_steps) * (1.0 - warmup_ratio)
