"""Which kind of golden case it is: that shows in its contents, not in its name."""

from __future__ import annotations

from collections.abc import Callable

from tests.parity_case import Case, UnsupportedError
from tests.parity_pieces import learning_rates, loss_only, metric, positions, sizes, tokens
from tests.parity_zegclip import backbone, evaluation, optimizer_steps, slide, text_path, training


def compare(case: Case) -> None:
    """Find out what kind of case this is and compare it."""
    config = case.config
    kinds: list[tuple[bool, Callable[[Case], None]]] = [
        ("table" in config and "base_lr" in config, learning_rates),
        ("test_columns" in config, sizes),
        ("grid_from" in config, positions),
        (any(key.endswith("_texts") for key in config), tokens),
        ("input/raw_labels" in case.tensors, metric),
        ("backbone_config" in config, backbone),
    ]
    for matches, function in kinds:
        if matches:
            return function(case)
    system = config.get("model_config", {}).get("type", config.get("repo"))
    if system != "ZegCLIP":
        raise UnsupportedError(f"cases of {config.get('repo', system) or 'an unnamed system'} are not supported yet")
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
