"""What a training's proposals start from beside random weights: an ImageNet ResNet, or a generator of our own.

Only weights are taken. A MaskFormer that others published is no start: it has seen masks of the classes that are unseen
here, and does not say which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.hub import cached, download
from lexiseg.proposals.backbone import RESNET_WIDTHS, ResNetBackbone
from lexiseg.proposals.base import ProposalGenerator
from lexiseg.proposals.heads import QueryGenerator
from lexiseg.words import first_line

IMAGENET = "imagenet"
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")
# timm's ResNets of our structure. They stand in for the detectron2 files that the papers start from.
IMAGENET_WEIGHTS = {
    "r50": "timm/resnet50.a1_in1k",
    "r101": "timm/resnet101.a1h_in1k",
    "r50c": "timm/resnet50s.gluon_in1k",
    "r101c": "timm/resnet101s.gluon_in1k",
}
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_INSTEAD = "--set proposals_from=PATH, or start from random weights with --set proposals_from=null,"
_BODY = "backbone.body."
_OPTION = "model.options.proposals."


def is_resnet(source: str) -> bool:
    """Whether a start is a ResNet alone, ImageNet's or a file's, and no generator that has seen masks."""
    return source == IMAGENET or source.endswith(WEIGHT_FILES)


def start_proposals(generator: ProposalGenerator, source: str) -> list[str]:
    """Fill a generator with weights that were trained before.

    Args:
        generator: MaskFormer or Mask2Former; on the CPU.
        source: one of

            - "imagenet": the backbone gets timm's ImageNet weights from the hub, batch statistics included;
            - a file (.safetensors, or .pth that holds nothing but tensors) of such a ResNet, by timm's names, which are
              torchvision's where the stem is one convolution;
            - the folder of a run or of a model of our own that proposes regions, whose CLIP and classes may be others:
              all but its class head is taken.

    Returns:
        names of the generator's tensors that were filled.

    Raises:
        LexisegError: the generator has no such weights, the file or model is not there, cannot be downloaded or is
            damaged, or it is of another form; the first tensor that does not fit and the option to change are named.
    """
    generator = _query_generator(generator, source)
    if source == IMAGENET:
        repository = _imagenet_repository(generator)
        file = download(repository, _HUB_FILES, repository, instead=_INSTEAD)
        found = fit_resnet(generator, _read_resnet(file), f"the ImageNet weights {repository}")
    elif source.endswith(WEIGHT_FILES):
        found = fit_resnet(generator, _read_resnet(Path(source).expanduser()), f"'{source}'")
    else:
        found = _own_tensors(generator, source)
    generator.load_state_dict(found, strict=False)
    return sorted(found)


def describe_start(generator: ProposalGenerator, source: str) -> str:
    """What `start_proposals` would take, without a download: a file or folder is tried.

    Raises:
        LexisegError: as `start_proposals`, but not where something would have to be downloaded.
    """
    if source == IMAGENET:
        repository = _imagenet_repository(_query_generator(generator, source))
        here = "in the local cache" if cached(repository, _HUB_FILES) else "not on this machine yet, to be downloaded"
        return f"{IMAGENET}: the backbone from {repository} ({here})"
    return f"{source} ({len(start_proposals(generator, source))} tensors)"


def _query_generator(generator: ProposalGenerator, source: str) -> QueryGenerator:
    """The generator, if it is one that can be filled."""
    if not isinstance(generator, QueryGenerator):
        raise LexisegError(
            f"'proposals_from' is '{source}', but only a maskformer or mask2former can start from weights; "
            "set proposals_from to null."
        )
    if not isinstance(generator.backbone, ResNetBackbone) and is_resnet(source):
        raise LexisegError(
            f"'proposals_from' is '{source}', but there are no such weights for the backbone "
            f"'{generator.options.backbone}'; set {_OPTION}backbone to a ResNet, or proposals_from to null."
        )
    return generator


# ---- a ResNet alone


def _imagenet_repository(generator: QueryGenerator) -> str:
    options = generator.options
    if tuple(options.widths or RESNET_WIDTHS) != RESNET_WIDTHS:
        raise LexisegError(
            f"There are no ImageNet weights for a {options.backbone} with these widths; set {_OPTION}widths to null, "
            "or proposals_from to null."
        )
    return IMAGENET_WEIGHTS[options.backbone]


def _read_resnet(path: Path) -> dict[str, Tensor]:
    """The tensors of a ResNet's file, without its class head and what counts batches."""
    if not path.is_file():
        raise LexisegError(f"There is no file '{path}' for the proposals to start from; give one, or 'imagenet'.")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise LexisegError(f"'{path}' is damaged ({first_line(error)}); download it again.") from error
    except Exception as error:  # what weights_only refuses comes as errors of many kinds
        raise LexisegError(
            f"'{path}' is damaged or holds more than tensors, so it was not loaded; give a .safetensors file."
        ) from error
    for wrapping in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapping), dict):
            state = state[wrapping]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise LexisegError(f"'{path}' is not a state dict; give the file of a ResNet's weights.")
    return {
        str(name): tensor
        for name, tensor in state.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }


def fit_resnet(generator: QueryGenerator, tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """See that a ResNet's tensors are those of the backbone, and give them by the generator's names.

    Raises:
        LexisegError: they are not; the first one and the option to change are named.
    """
    wanted = {
        name.removeprefix(_BODY): tensor
        for name, tensor in generator.state_dict().items()
        if name.startswith(_BODY) and not name.endswith("num_batches_tracked")
    }
    problem = _first_problem(tensors, wanted)
    if problem is not None:
        name, said = problem
        stem = name.startswith(("conv1", "bn1"))
        option = "backbone" if name not in wanted or name not in tensors else "stem_width" if stem else "widths"
        raise LexisegError(
            f"The backbone '{generator.options.backbone}' does not fit {what}: {said}; change {_OPTION}{option}, or "
            "give other weights."
        )
    return {_BODY + name: tensor for name, tensor in tensors.items()}


def _first_problem(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The first tensor that is missing, of another shape or left over, and what is wrong with it."""
    for name, ours in wanted.items():
        if name not in tensors:
            return name, f"there is no '{name}' in it"
        if tensors[name].shape != ours.shape:
            shapes = (" x ".join(map(str, tensor.shape)) for tensor in (tensors[name], ours))
            return name, "'{}' is {} there and {} here".format(name, *shapes)
    return next(((name, f"its '{name}' is not expected here") for name in tensors if name not in wanted), None)


# ---- a generator of our own


def seen_by(source: str) -> tuple[str, ...]:
    """The classes whose masks the proposals saw that ``source`` holds; none for a ResNet alone.

    Raises:
        LexisegError: it is a folder without a model of lexiseg.
    """
    return () if is_resnet(source) else tuple(_own_config(source)[1]["seen_names"])


def _own_config(source: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a model that lexiseg wrote, given itself or by the run that made it, and its settings."""
    for folder in (Path(source).expanduser(), Path(source).expanduser() / "model"):
        try:
            config = json.loads((folder / "config.json").read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(config, dict) and {"system", "options", "seen_names"} <= config.keys():
            return folder, config
    raise LexisegError(
        f"'{source}' is no run or model of lexiseg for the proposals to start from; give one, 'imagenet' or a "
        "ResNet's file (a published MaskFormer has seen masks of unseen classes)."
    )


def _own_tensors(generator: QueryGenerator, source: str) -> dict[str, Tensor]:
    """The tensors of our own generator in a folder without its class head, seen to fit."""
    folder, config = _own_config(source)
    before = {key: config["options"].get("proposals", {}).get(key) for key in ("kind", "heads")}
    for key, value in before.items():
        if getattr(generator.options, key) != value:
            raise LexisegError(
                f"The proposals of '{source}' have {key} {value} and this generator {getattr(generator.options, key)}; "
                f"set {_OPTION}{key} to {value}."
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
    problem = _first_problem(found, wanted)
    if problem is not None:
        raise LexisegError(
            f"The proposals of '{source}' do not fit this generator: {problem[1]}; give both the same options, but for "
            "the class head."
        )
    return found
