"""Which kind of golden case it is: the JSON says so under ``runner``, or its other contents show it."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from tests.parity.case import Case, UnsupportedError
from tests.parity.one_stage import backbone, evaluation, slide, text_path, training
from tests.parity.one_stage_steps import optimizer_steps
from tests.parity.pieces import learning_rates, loss_only, metric, positions, sizes, tokens
from tests.parity.training_free import training_free

Kinds = list[tuple[Callable[[Case], bool], Callable[[Case], None]]]

# Each of these has KINDS: a test on what a case contains, and what compares such a case.
FAMILIES = ("cat_seg", "decoupled_clip", "proposals", "deop", "maft")


def _present(case: Case, *keys: str) -> bool:
    return all(key in case.config for key in keys)


KINDS: Kinds = [
    (lambda case: _present(case, "table", "base_lr"), learning_rates),
    (lambda case: _present(case, "test_columns"), sizes),
    (lambda case: _present(case, "grid_from"), positions),
    (lambda case: any(key.endswith("_texts") for key in case.config), tokens),
    (lambda case: "input/raw_labels" in case.tensors, metric),
    (lambda case: _present(case, "backbone_config"), backbone),
]


def families() -> Kinds:
    """The kinds of the other families' files."""
    return [kind for name in FAMILIES for kind in importlib.import_module(f"tests.parity.{name}").KINDS]


def compare(case: Case) -> None:
    """Find out what kind of case this is and compare it."""
    config = case.config
    if "runner" in config:
        return importlib.import_module(f"tests.parity.{config['runner']}").compare(case)
    if "method" in config and "source_files" in config:
        return training_free(case)
    one_stage, read = "repo" in config, set(case.read)
    for matches, function in KINDS if one_stage else families() + KINDS:
        if matches(case):
            case.read.intersection_update(read)  # looking what kind it is compares nothing
            return function(case)
    case.read.intersection_update(read)
    if not one_stage:
        raise UnsupportedError(f"cases of {config.get('repo') or 'an unnamed system'} are not supported yet")
    if "model_config" not in config:
        if "input/pred_masks" in case.tensors:
            return loss_only(case)
        raise UnsupportedError("this kind of case is not known")
    if "optimizer" in config:
        return optimizer_steps(case)
    if "input/tokens" in case.tensors:
        return text_path(case)
    if "ori_shape" in config:
        return slide(case)
    return training(case) if "input/labels" in case.tensors else evaluation(case)
