"""The numbers of a training run, and how parameters are grouped by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator


class Multiplier(BaseModel):
    """Factors on learning rate and weight decay for the parameters whose name contains the rule's key.

    Attributes:
        lr: factor on the base learning rate; 0 keeps the parameters where they are.
        decay: factor on the weight decay.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float = Field(default=1.0, ge=0)
    decay: float = Field(default=1.0, ge=0)


class TrainSettings(BaseModel):
    """Everything the loop needs to know, apart from the task.

    Attributes:
        steps: number of optimizer steps.
        batch_size: samples in one forward pass on one process.
        accumulate: forward passes whose mean gradient makes one optimizer step.
        lr: base learning rate, before multipliers.
        weight_decay: decoupled decay of AdamW.
        betas: AdamW's averaging factors.
        multipliers: rules by name; the longest key contained in a parameter's name wins, then the alphabetically
            first, and only that one applies.
        schedule: "poly" decays by ``power`` to ``min_lr``, "constant" stays; both warm up linearly.
        warmup_steps: length of the warm-up.
        warmup_ratio: fraction of the rate at step 0.
        power: exponent of the polynomial decay.
        min_lr: rate at the end.
        clip_norm: largest gradient norm; None leaves gradients alone.
        precision: "fp32", or "bf16" for autocast.
        seed: of the initial weights, data and dropout.
        workers: background processes that prepare batches; 0 prepares them in the loop. Does not change results.
        log_every: steps between two lines of the log.
        checkpoint_every: steps between two checkpoints; the end always makes one.
        keep_checkpoints: number of checkpoints kept.
        snapshot_every: steps between two sets of sample pictures; 0 makes none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    accumulate: int = Field(default=1, ge=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    multipliers: dict[str, Multiplier] = Field(default_factory=dict)
    schedule: Literal["poly", "constant"] = "poly"
    warmup_steps: int = Field(default=0, ge=0)
    warmup_ratio: float = Field(default=1e-6, ge=0, le=1)
    power: float = Field(default=0.9, ge=0)
    min_lr: float = Field(default=1e-6, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
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


RESUMABLE = frozenset({"workers", "log_every", "checkpoint_every", "keep_checkpoints", "snapshot_every"})
"""Settings that may differ between the first part of a run and its continuation: they do not touch the weights."""


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


def group_parameters(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: TrainSettings
) -> list[ParameterGroup]:
    """Sort the trainable parameters into groups by the rules of ``settings``.

    Args:
        named_parameters: of the model; those that need no gradient are left out.
        settings: gives the base rate, the decay and the rules.

    Returns:
        Groups that have parameters, in the order in which the model first needs them.
    """
    groups: dict[str, ParameterGroup] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        key = rule_for(name, settings.multipliers)
        rule = settings.multipliers.get(key, Multiplier())
        if key not in groups:
            groups[key] = ParameterGroup(key, settings.lr * rule.lr, settings.weight_decay * rule.decay)
        groups[key].names.append(name)
        groups[key].parameters.append(parameter)
    return list(groups.values())
