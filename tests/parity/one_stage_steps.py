"""Golden cases of the one-stage systems' optimizer: rates and decays of its groups, and steps with the schedule."""

from __future__ import annotations

from typing import Any

import torch

from lexiseg.data.base import remap_to_seen
from lexiseg.models.zegclip import ZegCLIP
from lexiseg.recipes import TrainSettings
from lexiseg.training.trainer import learning_rate
from lexiseg.weights.filling import authors_key
from tests.parity.case import Case
from tests.parity.one_stage import build


def check_groups(case: Case, model: ZegCLIP, groups: list[dict[str, Any]], names: list[str], base: float) -> None:
    """Compare rate and decay of every parameter that lexiseg trains with the authors' optimizer.

    What they train beside it has to be what lexiseg does not have at all: weights that no output depends on.
    """
    frozen = {str(authors_key(name, model.system)) for name, _ in model.named_parameters()} - set(names)
    stated = {group["name"]: group for group in case.config.get("param_groups", [])}
    if not stated:
        return
    wrong = []
    for name, group in zip(names, groups, strict=True):
        theirs = stated.get(name, {})
        found = {"lr_mult": group["base"] / base, "weight_decay": group["weight_decay"], "requires_grad": True}
        if any(abs(float(theirs.get(key, -1)) - float(value)) > 1e-9 for key, value in found.items()):
            wrong.append(name)
    case.check_that("param_groups", not wrong, f"{wrong[:3]} have another rate or decay")
    trained = {name for name, group in stated.items() if group["requires_grad"]} - set(names)
    alive = sorted(trained & frozen)
    case.check_that("param_groups: frozen", not alive, f"{alive[:3]} are not trained here")


def optimizer_steps(case: Case) -> None:
    """Some AdamW steps with the schedule, on given batches."""
    config = case.config
    model = build(case).train()
    text = case.input("text_embeddings").float()[case.input("seen_idx").long()]
    optimizer_config, hook = config["optimizer"], config["lr_hook"]
    keys = optimizer_config["paramwise_cfg"]["custom_keys"]
    groups, names = [], []
    for name, parameter in model.trainable_parameters():
        # The longest rule that is part of the name counts, ties in alphabetical order.
        theirs = str(authors_key(name, model.system))
        rule = next((key for key in sorted(sorted(keys), key=len, reverse=True) if key in theirs), None)
        options = keys.get(rule, {})
        names.append(theirs)
        groups.append(
            {
                "params": [parameter],
                "base": optimizer_config["lr"] * options.get("lr_mult", 1.0),
                "weight_decay": optimizer_config["weight_decay"] * options.get("decay_mult", 1.0),
            }
        )
    check_groups(case, model, groups, names, optimizer_config["lr"])
    optimizer = torch.optim.AdamW(groups, lr=optimizer_config["lr"])
    plan = TrainSettings(
        steps=hook["max_iters"],
        batch_size=1,
        lr=optimizer_config["lr"],
        power=hook["power"],
        min_lr=hook["min_lr"],
        warmup_steps=hook["warmup_iters"],
        warmup_ratio=hook["warmup_ratio"],
    )
    largest = []
    steps = sorted({int(name.split("/")[0].removeprefix("step")) for name in case.expected_names("step")})
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, group["base"], plan)
        largest.append(max(group["lr"] for group in optimizer.param_groups))
        labels = remap_to_seen(case.input(f"step{step}/labels")[:, 0].long(), case.input("seen_idx").tolist())
        losses = model.losses(case.input(f"step{step}/image"), labels, text)
        case.check(f"step{step}/loss_total", losses["loss"])
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    case.check_numbers("rates", largest, config["max_group_lr_per_step"])
    parameters = {authors_key(name, model.system): value for name, value in model.state_dict().items()}
    for name in case.expected_names("final_param/"):
        key = name.removeprefix("final_param/")
        if key in parameters:
            case.check(name, parameters[key])
        else:
            case.skip(name)
