"""Golden cases of DeOP's evaluation: metrics, the counters behind its Table 8, and pseudo labels."""

from __future__ import annotations

import torch
from torch import Tensor

from lexiseg.evaluation.metrics import Confusion
from lexiseg.evaluation.proposals import ReleasedRecall
from tests.parity.case import Case, UnsupportedError
from tests.references import pseudo_label


def evaluation(case: Case) -> None:
    """Metrics, the counters behind DeOP's Table 8, and pseudo labels."""
    config, count = case.config, case.numbered("scores_")
    scores = [case.input(f"scores_{index}") for index in range(count)]
    labels = [case.input(f"gt_{index}").long() for index in range(count)]
    masks = [case.input(f"mask_logits_{index}").sigmoid() > 0.5 for index in range(count)]
    predictions = [score.argmax(dim=0) for score in scores]
    unseen = frozenset(config["novel"])
    for name, expected in config["results"].items():
        head, _, threshold = name.rpartition("_thr")
        if name == "generalized":
            confusion = measure(case, predictions, labels)
            counts_of_confusion(case, confusion)
            compare_metrics(case, name, metrics(case, confusion), expected)
        elif head:
            recall = ReleasedRecall(unseen, float(threshold))
            for prediction, mask, label in zip(predictions, masks, labels, strict=True):
                regions = prediction[None] == prediction.unique()[:, None, None]
                recall.update(regions if head.startswith("recall") else mask[mask.flatten(1).any(dim=1)], label)
            compare_metrics(case, name, counters(recall), expected)
        elif name.startswith("pseudo"):
            found = [
                pseudo_label(
                    score,
                    label,
                    config["base"],
                    reject=rejection(name),
                    prior="noprior" not in name,
                    ignore_index=config["num_classes"],
                )
                for score, label in zip(scores, labels, strict=True)
            ]
            for index, pseudo in enumerate(found):
                case.check(f"{name}/{index}", pseudo)
            # Rejected pixels are not judged.
            judged = [
                label.masked_fill(pseudo == config["num_classes"], config["ignore"])
                for pseudo, label in zip(found, labels, strict=True)
            ]
            compare_metrics(case, name, metrics(case, measure(case, found, judged)), expected)
        else:
            raise UnsupportedError(f"results called {name} are not known")


def rejection(name: str) -> float:
    """The threshold in names such as ``rej0`` and ``rej04``, which are 0 and 0.4."""
    digits = name.rpartition("rej")[2] if "rej" in name else "0"
    return float(f"{digits[0]}.{digits[1:] or '0'}")


def measure(case: Case, predictions: list[Tensor], labels: list[Tensor]) -> Confusion:
    confusion = Confusion(case.config["num_classes"], ignore_index=case.config["ignore"])
    for prediction, label in zip(predictions, labels, strict=True):
        confusion.update(prediction.numpy(), label.numpy())
    return confusion


def counts_of_confusion(case: Case, confusion: Confusion) -> None:
    """Compare with the authors' matrix (prediction x label, the ignored last), of which we keep three sums."""
    matrix, classes = case.tensors["expected/confusion"], case.config["num_classes"]
    case.skip("confusion")
    for name, ours, theirs in (
        ("intersection", confusion.intersection, matrix.diagonal()[:classes]),
        ("predicted", confusion.predicted, matrix[:classes, :classes].sum(dim=1)),
        ("labelled", confusion.labelled, matrix[:, :classes].sum(dim=0)),
    ):
        case.check_numbers(f"confusion: {name}", [float(value) for value in ours], [float(value) for value in theirs])


def metrics(case: Case, confusion: Confusion) -> dict[str, float]:
    """Our metrics in percent under the authors' names."""
    base, novel = case.config["base"], case.config["novel"]
    found = confusion.compute(base, novel)
    share = confusion.labelled / confusion.labelled.sum()
    values = {
        "mIoU": found.miou,
        "mACC": found.macc,
        "pACC": found.pacc,
        "mIoU-base": found.miou_seen,
        "mIoU-unbase": found.miou_unseen,
        "hIoU-base": found.hiou,
        "fwIoU": float((share * torch.nan_to_num(torch.tensor(found.iou)).numpy()).sum()),
    }
    for name, ids in (("pAcc-base", base), ("pAcc-unbase", novel)):
        values[name] = float(confusion.intersection[ids].sum() / confusion.labelled[ids].sum())
    for index in range(case.config["num_classes"]):
        # The authors print no IoU for a class without labels; in the means it is 0 if it was predicted, as with us.
        values[f"IoU-c{index}"] = float(found.iou[index]) if confusion.labelled[index] else float("nan")
        values[f"ACC-c{index}"] = float(found.accuracy[index])
    return {name: 100 * value for name, value in values.items()}


def counters(recall: ReleasedRecall) -> dict[str, float]:
    shares = recall.compute()
    return {
        "countIoU": recall.matched,
        "countIoUSeen": recall.matched_seen,
        "countIoUUnseen": recall.matched_unseen,
        "countAllMask": recall.predicted,
        "countSeenAllMask": recall.labelled_seen,
        "countUnseenAllMask": recall.labelled_unseen,
        "AP": shares.all,
        "Recall": shares.all,
        "R_Seen": shares.seen,
        "R_Unseen": shares.unseen,
    }


def compare_metrics(case: Case, name: str, found: dict[str, float], expected: dict[str, float]) -> None:
    unknown = sorted(expected.keys() - found.keys())
    case.check_that(f"{name}: names", not unknown, f"{unknown[:3]} are not known")
    known = [key for key in expected if key in found]
    case.check_numbers(name, [float(found[key]) for key in known], [float(expected[key]) for key in known])
