"""Proposals that a run of our own has trained, as a start for a generator with another CLIP or other classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.proposals.mask2former import Mask2Former
from lexiseg.proposals.maskformer import MaskFormer
from lexiseg.words import first_line

OPTION = "model.options.proposals."


def own_folder(source: str) -> Path | None:
    """The folder of a model that lexiseg wrote, if ``source`` is one or the run that made it."""
    for folder in (Path(source).expanduser(), Path(source).expanduser() / "model"):
        try:
            config = json.loads((folder / "config.json").read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(config, dict) and {"system", "options", "seen_names"} <= config.keys():
            return folder
    return None


def seen_by(source: str) -> tuple[str, ...]:
    """The classes whose masks proposals saw that come from a folder of our own; none of others, who do not say."""
    folder = own_folder(source)
    return () if folder is None else tuple(json.loads((folder / "config.json").read_text("utf-8"))["seen_names"])


def own_tensors(generator: MaskFormer | Mask2Former, folder: Path, source: str) -> dict[str, Tensor]:
    """The tensors of our own generator in a folder without its class head, seen to fit."""
    options = json.loads((folder / "config.json").read_text("utf-8"))["options"]
    before = {key: options.get("proposals", {}).get(key) for key in ("kind", "heads")}
    for key, value in before.items():
        if getattr(generator.options, key) != value:
            raise LexisegError(
                f"The proposals of '{source}' have {key} {value} and this generator {getattr(generator.options, key)}; "
                f"set {OPTION}{key} to {value}."
            )
    try:
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise LexisegError(
            f"The weights in '{folder}' cannot be read ({first_line(error)}); train them again."
        ) from error
    prefix, head = "generator.", "class_embed."
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    found, wanted = (
        {name: value for name, value in tensors.items() if not name.startswith(head)}
        for tensors in (found, generator.state_dict())
    )
    problem = first_problem(found, wanted)
    if problem is not None:
        raise LexisegError(
            f"The proposals of '{source}' do not fit this generator: {problem[1]}; give both the same options, but for "
            "the class head."
        )
    return found


def first_problem(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The first tensor that is missing, of another shape or left over, and what is wrong with it."""
    for name, ours in wanted.items():
        if name not in tensors:
            return name, f"there is no '{name}' in it"
        if tensors[name].shape != ours.shape:
            shapes = (" x ".join(map(str, tensor.shape)) for tensor in (tensors[name], ours))
            return name, "'{}' is {} there and {} here".format(name, *shapes)
    return next(((name, f"its '{name}' is not expected here") for name in tensors if name not in wanted), None)
