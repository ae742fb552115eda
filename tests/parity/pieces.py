"""Golden cases of single pieces: schedule, sizes, position tables, tokens, metrics, losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lexiseg.clip.model import build_clip
from lexiseg.clip.positions import resize_positions
from lexiseg.data.transforms import train_size
from lexiseg.evaluation.metrics import Confusion, Metrics, nanmean, percent
from lexiseg.losses.masks import count_masks, mask_losses
from lexiseg.losses.ssim import ssim_loss
from lexiseg.normalisation import IMAGENET_MEAN, IMAGENET_STD
from lexiseg.recipes import TrainSettings
from lexiseg.training.trainer import learning_rate
from lexiseg.windows import working_size
from tests.parity.case import Case
from tests.parity.clip_build import architecture
from tests.references import reduce_zero_label


def learning_rates(case: Case) -> None:
    """The schedule's table: columns are the iteration and the rate of groups with the base rates of the case."""
    config = case.config
    bases = [config["lr_mult_10_group"], config["base_lr"]]
    for total, rows in config["table"].items():
        plan = TrainSettings(steps=int(total), batch_size=1, lr=1.0, warmup_steps=1500)
        for column, base in enumerate(bases, start=1):
            actual = [learning_rate(int(row[0]), base, plan) for row in rows]
            case.check_numbers(f"{total} iterations, base {base:g}", actual, [row[column] for row in rows])


def sizes(case: Case) -> None:
    """Sizes of resized pictures."""
    config = case.config
    # Pictures more than four times as long as wide stay smaller here than in the released code.
    usual = [row for row in config["test"] if max(row[:2]) <= 4 * min(row[:2])]
    wrong = [row for row in usual if list(working_size(row[0], row[1], 512)) != row[2:]]
    case.check_that(f"test sizes ({len(usual)})", not wrong, f"the first that differs is {wrong[:1]}")
    wrong = [row for row in config["train"] if list(train_size(row[0], row[1], row[2])) != row[3:]]
    case.check_that(f"train sizes ({len(config['train'])})", not wrong, f"the first that differs is {wrong[:1]}")
    if "normalisation" in config:
        given = config["normalisation"]
        case.check_numbers("mean", [255 * value for value in IMAGENET_MEAN], given["mean"])
        case.check_numbers("std", [255 * value for value in IMAGENET_STD], given["std"])


def positions(case: Case) -> None:
    """Resizing the position table when CLIP is loaded."""
    table = case.input("positional_embedding")
    source, target = case.config["grid_from"], case.config["grid_to"]
    case.check("positional_embedding", resize_positions(table, (target, target), (source, source), "bilinear"))


def tokens(case: Case) -> None:
    """The tokenizer."""
    stems = [key.removesuffix("_texts") for key in case.config if key.endswith("_texts")]
    context = next(case.tensors[f"expected/{stem}_token_ids"].shape[1] for stem in stems)
    clip = build_clip(architecture({"context_length": context}))
    for stem in stems:
        case.check(f"{stem}_token_ids", clip.tokenize(case.config[f"{stem}_texts"]))


def metric(case: Case) -> None:
    """Histograms, IoU and their means."""
    config = case.config
    confusion = Confusion(config["num_classes"], ignore_index=config.get("ignore_index", 255))
    for label, prediction in zip(case.input("raw_labels").numpy(), case.input("predictions").numpy(), strict=True):
        confusion.update(prediction, reduce_zero_label(label) if config["reduce_zero_label"] else label)
    result = confusion.compute(case.input("seen_idx").tolist(), case.input("unseen_idx").tolist())
    found = {
        "area_intersect": confusion.intersection,
        "area_union": confusion.predicted + confusion.labelled - confusion.intersection,
        "area_pred": confusion.predicted,
        "area_label": confusion.labelled,
        "IoU": result.iou,
        "Acc": result.accuracy,
        "pAcc": result.pacc,
        "mIoU_all": result.miou,
        "mIoU_seen": result.miou_seen,
        "mIoU_unseen": result.miou_unseen,
        "hIoU": result.hiou,
    }
    for name, value in found.items():
        case.check(name, torch.as_tensor(value, dtype=torch.float64))
    check_printed(case, result)
    check_unlabelled(case, confusion, result)
    case.check_stated(
        "number of names", {"n": len(config.get("class_names", result.iou))}, {"n": config["num_classes"]}
    )


def check_unlabelled(case: Case, confusion: Confusion, result: Metrics) -> None:
    """Compare the classes without an IoU, and those that only predictions show; the cases may name a few of them."""
    iou, labelled = result.iou, confusion.labelled
    unlabelled = [int(index) for index in range(len(iou)) if iou[index] == 0 and labelled[index] == 0]
    found_ids = {
        "nan_iou_classes": [int(index) for index in range(len(iou)) if math.isnan(iou[index])],
        "zero_label_but_predicted": unlabelled,
    }
    for key, ids in found_ids.items():
        stated = case.config.get(key)
        if stated is not None:
            case.check_that(key, set(stated) <= set(ids), f"{ids} instead of {stated}")


def check_printed(case: Case, result: Metrics) -> None:
    """Compare what the authors' code printed and returned, of all, the seen and the unseen classes."""
    printed = case.config.get("printed_by_authors_code", {})
    summary = result.summary()
    everything = list(range(len(result.iou)))
    seen, unseen = (case.input(name).tolist() for name in ("seen_idx", "unseen_idx"))
    parts = {"Summary:": everything, "Seen Summary:": seen, "Unseen Summary:": unseen}
    for (title, ids), ours in zip(parts.items(), ("miou", "miou_seen", "miou_unseen"), strict=True):
        if title not in printed:
            continue
        accuracy = result.accuracy[ids]
        for key, value in (("mIoU", summary[ours]), ("mAcc", percent(nanmean(accuracy))), ("aAcc", summary["pacc"])):
            given = printed[title].get(key)
            text = "nan" if value is None else f"{value:.2f}"
            fine = given is None or given == text or float(given) == float(text)
            case.check_that(f"{title} {key}", fine, f"{text}, not {given}")
    returned = case.config.get("returned_summary", {})
    for key, name in (("aAcc", "pacc"), ("mIoU", "miou"), ("mAcc", "macc")):
        value = summary[name]
        if key in returned and value is not None:
            case.check_that(f"returned {key}", abs(100 * returned[key] - value) < 1e-6, f"{value}, not {returned[key]}")


def loss_only(case: Case) -> None:
    """The losses and their gradients, given mask logits."""
    config = case.config
    weights = config["weights"]
    labels = case.input("labels").long()
    case.check_stated("classes", config, {"num_classes": case.input("pred_masks").shape[1]})
    if "num_masks" in config:
        case.check_numbers("num_masks", [count_masks(labels)], [config["num_masks"]])
    names = ["", *(f"_{index}" for index in range(config.get("n_aux", 0)))]
    total: Tensor | float = 0.0
    grads: dict[str, Tensor] = {}
    for name in names:
        logits = case.input(f"aux_pred_masks{name}" if name else "pred_masks").clone().requires_grad_()
        rate = weights.get("loss_weight", 1.0)
        focal_weight, second_weight = weights["mask_weight"] * rate, weights["dice_weight"] * rate
        if case.has("loss/loss_ssim"):
            focal = mask_losses(logits, labels, focal_weight=focal_weight, dice_weight=0.0)
            ssim = ssim_loss(logits, labels, weight=second_weight)
            loss, parts = focal.total + ssim, {"loss_mask": focal.mask, "loss_ssim": ssim}
        else:
            losses = mask_losses(logits, labels, focal_weight=focal_weight, dice_weight=second_weight)
            loss, parts = losses.total, {"loss_mask": losses.mask, "loss_dice": losses.dice}
        loss.backward()
        total = total + loss.detach()
        for part, value in parts.items():
            case.check(f"loss/{part}{name}", value)
        grads[f"grad_aux{name}" if name else "grad_pred_masks"] = logits.grad if logits.grad is not None else logits
    case.check("loss_total", torch.as_tensor(total))
    for key, gradient in grads.items():
        case.check(key, gradient)
