"""The numbers of a training run, and how parameters are grouped by name."""

from __future__ import annotations

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
    """The rule that applies to the parameter ``name``: the longest key it contains, else the alphabetically first.

    Returns:
        The key, or "" where none is contained.
    """
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
    """Sort the trainable parameters into groups by the rules of ``settings``.

    Args:
        model: its parameters that need no gradient are left out.
        settings: gives the base rate, the decay and the rules.

    Returns:
        Groups that have parameters, in the order in which the model first needs them. Those of one rule with and
        without decay are apart.
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
