"""The numbers of a training run, and how parameters are grouped by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn


class Multiplier(BaseModel):
    """Factors on learning rate and weight decay for the parameters whose name contains the rule's key.

    Attributes:
        lr: factor on the base learning rate; 0 keeps the parameters where they are.
        decay: factor on the weight decay.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    lr: float = Field(default=1.0, ge=0)
    decay: float = Field(default=1.0, ge=0)


class TrainSettings(BaseModel):
    """Everything the loop needs to know, apart from the task.

    Attributes:
        steps: number of optimizer steps. 0 trains nothing: the model is put together, from CLIP and what it starts
            from, and written.
        batch_size: samples in one forward pass of all processes together; each takes its share of them.
        accumulate: forward passes whose mean gradient makes one optimizer step.
        lr: base learning rate, before multipliers.
        weight_decay: decoupled decay of AdamW; of SGD the usual one, added to the gradient.
        optimizer: "adamw" or "sgd".
        betas: AdamW's averaging factors.
        momentum: of SGD.
        no_decay: kinds of layers whose parameters do not decay, whatever rule applies to them: "norm" layers and
            tables of "embedding" (the decoupled papers' rule).
        multipliers: rules by name; the longest key contained in a parameter's name wins, then the alphabetically
            first, and only that one applies.
        schedule: "poly" decays by ``power`` to ``min_lr``, "cosine" follows half a cosine to it, "constant" stays.
        warmup_steps: length of the warm-up.
        warmup_ratio: fraction of the rate at step 0.
        warmup: "linear" climbs from that fraction; "constant" keeps it to the end of the warm-up.
        power: exponent of the polynomial decay.
        min_lr: rate at the end.
        clip_norm: largest gradient norm; None leaves gradients alone.
        precision: "fp32", or "bf16" for autocast.
        sharding: "fsdp" spreads weights, gradients and optimizer over the processes instead of giving each a copy, for
            towers that are too large; with one process it does nothing. Does not change results.
        seed: of the initial weights, data and dropout.
        workers: background processes that prepare batches; 0 prepares them in the loop. Does not change results.
        log_every: steps between two lines of the log.
        checkpoint_every: steps between two checkpoints; the end always makes one.
        keep_checkpoints: number of checkpoints kept.
        snapshot_every: steps between two sets of sample pictures; 0 makes none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    accumulate: int = Field(default=1, ge=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    no_decay: tuple[Literal["norm", "embedding"], ...] = ()
    multipliers: dict[str, Multiplier] = Field(default_factory=dict)
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    warmup_steps: int = Field(default=0, ge=0)
    warmup_ratio: float = Field(default=1e-6, ge=0, le=1)
    warmup: Literal["linear", "constant"] = "linear"
    power: float = Field(default=0.9, ge=0)
    min_lr: float = Field(default=1e-6, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    sharding: Literal["none", "fsdp"] = "none"
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=1, ge=0)
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    snapshot_every: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be in 0..1")
        return self


RESUMABLE = frozenset({"workers", "log_every", "checkpoint_every", "keep_checkpoints", "snapshot_every", "sharding"})
"""Settings that may differ between the first part of a run and its continuation: they do not touch the weights."""

_LATER = ("optimizer", "momentum", "no_decay", "warmup")


def identity_of(settings: TrainSettings) -> dict[str, Any]:
    """The settings that must be the same when a run is resumed, as JSON values.

    Younger keys are left out where they say nothing new, so that a run begun before there were any can be resumed.
    """
    values = settings.model_dump(mode="json", exclude=set(RESUMABLE))
    for key in _LATER:
        if getattr(settings, key) == TrainSettings.model_fields[key].default:
            del values[key]
    return values


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
