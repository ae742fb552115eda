"""What a training's proposals start from beside random weights: an ImageNet ResNet, or a whole generator.

A generator comes from `transformers`, or from a run of our own, whose CLIP and classes may be others.

Only weights are taken: the class heads, and FreeSeg's interaction with the words, stay as they were built, for no
published MaskFormer has them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.files import read_json
from lexiseg.hub import cached, download
from lexiseg.proposals.backbone import RESNET_WIDTHS, ResNetBackbone
from lexiseg.proposals.base import ProposalGenerator
from lexiseg.proposals.mask2former import Mask2Former
from lexiseg.proposals.maskformer import MaskFormer
from lexiseg.proposals.options import Mask2FormerOptions, QueryOptions
from lexiseg.proposals.own import OPTION, first_problem, own_folder, own_tensors
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
_DEPTHS = {(3, 4, 6, 3): "r50", (3, 4, 23, 3): "r101"}

# From the names of transformers' ResNet to timm's, which are ours.
_STEM = {"embedder.embedder.convolution": "conv1", "embedder.embedder.normalization": "bn1"}
_BLOCK = re.compile(
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|shortcut)\.(convolution|normalization)\.(\w+)"
)
_ENCODER = "model.pixel_level_module.encoder."
_PARTS = {
    "model.pixel_level_module.decoder.": "pixel_decoder.",
    "model.transformer_module.": "transformer.",
    "mask_embedder.": "mask_embed.",
}
# What no tensor's shape tells, and our generators have built in.
_RESNET_FORM = {
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_bottleneck": False,
    "downsample_in_first_stage": False,
}
_MASK2FORMER_FORM = {"activation_function": "relu", "pre_norm": False, "common_stride": 4}


def start_proposals(generator: ProposalGenerator, source: str) -> list[str]:
    """Fill a generator with weights that others trained.

    Args:
        generator: MaskFormer or Mask2Former on a ResNet; on the CPU.
        source: one of

            - "imagenet": the backbone gets timm's ImageNet weights from the hub, batch statistics included;
            - a file (.safetensors, or .pth that holds nothing but tensors) of such a ResNet, by timm's names, which are
              torchvision's where the stem is one convolution;
            - a MaskFormer or Mask2Former on a ResNet in the format of `transformers`, a folder or ``OWNER/NAME`` on the
              hub: backbone, pixel decoder, query decoder, queries and mask embedding are taken, its class head is not;
            - the folder of a run or of a model of our own that proposes regions: all but its class head is taken.

    Returns:
        names of the generator's tensors that were filled.

    Raises:
        LexisegError: the generator has no such weights, the file or model is not there, cannot be downloaded or is
            damaged, or it is of another form; the first tensor that does not fit and the option to change are named.
    """
    generator = _query_generator(generator, source)
    own = own_folder(source)
    if own is not None:
        found = own_tensors(generator, own, source)
    elif source == IMAGENET:
        repository = _imagenet_repository(generator.options)
        file = download(repository, _HUB_FILES, repository, instead=_INSTEAD)
        found = fit_resnet(generator, _read_resnet(file), f"the ImageNet weights {repository}")
    elif source.endswith(WEIGHT_FILES):
        found = fit_resnet(generator, _read_resnet(Path(source).expanduser()), f"'{source}'")
    else:
        found = _transformers_tensors(generator, source)
    generator.load_state_dict(found, strict=False)
    return sorted(found)


def describe_start(generator: ProposalGenerator, source: str) -> str:
    """What `start_proposals` would take, without a download: a local file or folder is tried, a name is only checked.

    Raises:
        LexisegError: as `start_proposals`, but not where something would have to be downloaded.
    """
    options = _query_generator(generator, source).options
    if source == IMAGENET:
        repository = _imagenet_repository(options)
        return f"{IMAGENET}: the backbone from {repository} ({_where(repository)})"
    if not source.endswith(WEIGHT_FILES) and _local_folder(source) is None:
        return f"{source} ({_where(source)})"
    count = len(start_proposals(generator, source))
    return f"{source} ({count} tensors)"


def _where(repository: str) -> str:
    return "in the local cache" if cached(repository, _HUB_FILES) else "not on this machine yet, to be downloaded"


def _query_generator(generator: ProposalGenerator, source: str) -> MaskFormer | Mask2Former:
    """The generator, if it is one that can be filled."""
    if not isinstance(generator, MaskFormer | Mask2Former):
        raise LexisegError(
            f"'proposals_from' is '{source}', but only a maskformer or mask2former can start from weights; "
            "set proposals_from to null."
        )
    if not isinstance(generator.backbone, ResNetBackbone) and own_folder(source) is None:
        raise LexisegError(
            f"'proposals_from' is '{source}', but there are no such weights for the backbone "
            f"'{generator.options.backbone}'; set {OPTION}backbone to a ResNet, or proposals_from to null."
        )
    return generator


# ---- a ResNet alone


def _imagenet_repository(options: QueryOptions) -> str:
    if tuple(options.widths or RESNET_WIDTHS) != RESNET_WIDTHS:
        raise LexisegError(
            f"There are no ImageNet weights for a {options.backbone} with these widths; set {OPTION}widths to null, "
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


def fit_resnet(generator: MaskFormer | Mask2Former, tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """See that a ResNet's tensors are those of the backbone, and give them by the generator's names.

    Raises:
        LexisegError: they are not; the first one and the option to change are named.
    """
    wanted = {
        name.removeprefix(_BODY): tensor
        for name, tensor in generator.state_dict().items()
        if name.startswith(_BODY) and not name.endswith("num_batches_tracked")
    }
    problem = first_problem(tensors, wanted)
    if problem is not None:
        name, said = problem
        stem = name.startswith(("conv1", "bn1"))
        option = "backbone" if name not in wanted or name not in tensors else "stem_width" if stem else "widths"
        raise LexisegError(
            f"The backbone '{generator.options.backbone}' does not fit {what}: {said}; change {OPTION}{option}, or "
            "give other weights."
        )
    return {_BODY + name: tensor for name, tensor in tensors.items()}


# ---- a whole model of transformers


def _local_folder(source: str) -> Path | None:
    """The folder that a name of a model means; None if it is one on the hub.

    Raises:
        LexisegError: it is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        return None
    raise LexisegError(
        f"There is no folder '{source}' for the proposals to start from; give one, OWNER/NAME on the hub, 'imagenet' "
        "or a file."
    )


def _transformers_tensors(generator: MaskFormer | Mask2Former, source: str) -> dict[str, Tensor]:
    """The tensors of a model of `transformers` by our names, seen to fit."""
    folder = _local_folder(source)
    if folder is None:
        settings = download(source, ("config.json",), source, instead=_INSTEAD)
        folder = download(source, _HUB_FILES, source, instead=_INSTEAD).parent
    else:
        settings = folder / "config.json"
    kind = read_json(settings, "give a MaskFormer or Mask2Former as transformers writes it").get("model_type")
    if kind not in ("maskformer", "mask2former"):
        raise LexisegError(
            f"'{source}' is not a MaskFormer or Mask2Former of transformers; give one (of what "
            "lexiseg trained, name the run's folder)."
        )
    if kind != generator.options.kind:
        raise LexisegError(
            f"'{source}' is a {kind}, but this generator is a {generator.options.kind}; set {OPTION}kind."
        )
    from transformers import AutoConfig, AutoModelForUniversalSegmentation

    masked = isinstance(generator, Mask2Former)
    try:
        config = AutoConfig.from_pretrained(settings.parent, local_files_only=True)
        _check_form(config, masked, source)
        # It is built with random weights first, which must not change what comes after it.
        with torch.random.fork_rng(devices=[]):
            model, report = AutoModelForUniversalSegmentation.from_pretrained(
                folder, config=config, local_files_only=True, output_loading_info=True
            )
    except LexisegError:
        raise
    except Exception as error:  # transformers raises errors of many kinds
        raise LexisegError(
            f"The model '{source}' cannot be read ({first_line(error)}); give one as transformers writes it."
        ) from error
    tensors = _our_names(model.state_dict())
    for name in sorted(_our_names(dict.fromkeys(report["missing_keys"]))):
        raise LexisegError(f"The model '{source}' lacks '{name}'; give one as transformers writes it.")
    _fit(generator, tensors, _options_of(config, masked), source)
    return tensors


def _check_form(config: Any, masked: bool, source: str) -> None:
    """Check that a model computes what our generators do, as far as no tensor's shape tells."""
    backbone = config.backbone_config
    if backbone.model_type != "resnet":
        raise LexisegError(
            f"The backbone of '{source}' is a {backbone.model_type}, but only ResNets are supported; give a model "
            "with one."
        )
    decoder = {"activation_function": "relu"} if not masked else _MASK2FORMER_FORM
    for part, form in ((backbone, _RESNET_FORM), (config if masked else config.decoder_config, decoder)):
        for key, value in form.items():
            if getattr(part, key, value) != value:
                raise LexisegError(
                    f"The model '{source}' has {key} {getattr(part, key)}, and generators have {value} here; give "
                    "another one."
                )


def _our_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Values by our names; what our generators do not have is left out."""
    found = {}
    for name, value in state.items():
        if name.startswith(_ENCODER):
            if not name.endswith("num_batches_tracked"):
                found[_BODY + _timm_name(name.removeprefix(_ENCODER))] = value
            continue
        for theirs, ours in _PARTS.items():
            if name.startswith(theirs):
                found[ours + name.removeprefix(theirs)] = value
    return found


def _timm_name(name: str) -> str:
    match = _BLOCK.fullmatch(name)
    if match is None:
        layer, _, tensor = name.rpartition(".")
        return f"{_STEM.get(layer, layer)}.{tensor}"
    stage, block, place, kind, tensor = match.groups()
    norm = kind == "normalization"
    inner = f"downsample.{int(norm)}" if place is None else f"{'bn' if norm else 'conv'}{int(place) + 1}"
    return f"layer{int(stage) + 1}.{block}.{inner}.{tensor}"


def _options_of(config: Any, masked: bool) -> dict[str, Any]:
    """Our options that give a generator of the same form; those that cannot be told are left out."""
    resnet = config.backbone_config
    options: dict[str, Any] = {
        "widths": tuple(width // 4 for width in resnet.hidden_sizes),
        "stem_width": resnet.embedding_size,
        "mask_dim": config.mask_feature_size,
    }
    depths = _DEPTHS.get(tuple(resnet.depths))
    if depths is not None:
        options["backbone"] = depths
    if masked:
        return options | {
            "num_queries": config.num_queries,
            "hidden_dim": config.hidden_dim,
            "pixel_dim": config.feature_size,
            "heads": config.num_attention_heads,
            # transformers counts the prediction before the first layer as a layer.
            "decoder_layers": config.decoder_layers - 1,
            "ffn_dim": config.dim_feedforward,
            "encoder_layers": config.encoder_layers,
            "encoder_ffn_dim": config.encoder_feedforward_dim,
            "encoder_heads": config.num_attention_heads,
            "encoder_points": 4,
        }
    decoder = config.decoder_config
    return options | {
        "num_queries": decoder.num_queries,
        "hidden_dim": decoder.d_model,
        "pixel_dim": config.fpn_feature_size,
        "heads": decoder.decoder_attention_heads,
        "decoder_layers": decoder.decoder_layers,
        "ffn_dim": decoder.decoder_ffn_dim,
    }


def _fit(
    generator: MaskFormer | Mask2Former, tensors: Mapping[str, Tensor], theirs: Mapping[str, Any], source: str
) -> None:
    """Check that a model's tensors are those of the generator, and that it reads them in the same way.

    Raises:
        LexisegError: they are not; the first one and the options to change are named.
    """
    wanted = {
        name: tensor
        for name, tensor in generator.state_dict().items()
        if name.startswith((_BODY, *_PARTS.values())) and not name.endswith("num_batches_tracked")
    }
    ours = _own_options(generator.options)
    changes = [
        f"{OPTION}{key} to {list(value) if isinstance(value, tuple) else value}"
        for key, value in theirs.items()
        if ours[key] != value
    ]
    advice = f"set {' and '.join(changes)}" if changes else "give a model with the same architecture"
    problem = first_problem(tensors, wanted)
    if problem is not None:
        raise LexisegError(f"The proposals of '{source}' do not fit this generator: {problem[1]}; {advice}.")
    if changes:
        raise LexisegError(
            f"The proposals of '{source}' were trained with another architecture, though all sizes match; {advice}."
        )


def _own_options(options: QueryOptions) -> dict[str, Any]:
    """The options with those written out that are None for the usual value."""
    values = options.model_dump()
    values["widths"] = tuple(options.widths or RESNET_WIDTHS)
    # Of a stem with one convolution, as all of transformers' are.
    values["stem_width"] = options.stem_width or 64
    if isinstance(options, Mask2FormerOptions):
        values["encoder_heads"] = options.encoder_heads or options.heads
    return values
