"""What a training's proposals start from beside random weights: an ImageNet ResNet, or a generator of our own.

Only weights are taken. A MaskFormer that others published is no start: it has seen masks of the classes that are unseen
here, and does not say which.
"""

from pathlib import Path

from torch import Tensor

from lexiseg.clip.load import check_state, shapes_of
from lexiseg.errors import LexisegError
from lexiseg.files import is_folder
from lexiseg.hub import cached, download
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.proposals.backbone import RESNET_WIDTHS, ResNetBackbone
from lexiseg.proposals.base import ProposalGenerator
from lexiseg.proposals.heads import QueryGenerator
from lexiseg.recipes.schema import IMAGENET, is_resnet
from lexiseg.weights import load_model
from lexiseg.weights.checkpoint import read_checkpoint

# timm's ResNets of our structure. They stand in for the detectron2 files that the papers start from.
IMAGENET_WEIGHTS = {
    "r50": "timm/resnet50.a1_in1k",
    "r101": "timm/resnet101.a1h_in1k",
    "r50c": "timm/resnet50s.gluon_in1k",
    "r101c": "timm/resnet101s.gluon_in1k",
}
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_THEN = "give --set proposals_from=PATH, or start from random weights with --set proposals_from=null"
_BODY = "backbone.body."
_OPTION = "model.options.proposals."


def proposals_start(generator: ProposalGenerator, source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights that proposals start from.

    Args:
        generator: MaskFormer or Mask2Former.
        source: one of

            - "imagenet": timm's ImageNet weights of the backbone from the hub, batch statistics included;
            - a file (.safetensors or .pth) of such a ResNet, by timm's names, which are torchvision's where the stem is
              one convolution;
            - the folder of a run or of a model of our own that proposes regions, whose CLIP and classes may be others:
              all but its class head is taken.

    Returns:
        tensors by the generator's names, and the classes whose masks they have seen; none for a ResNet alone.

    Raises:
        LexisegError: the generator has no such weights, the file or model is not there, cannot be downloaded or is
            damaged, or it is of another form; the tensors that do not fit and the option to change are named.
    """
    generator = _query_generator(generator, source)
    if not is_resnet(source):
        return _own_tensors(generator, source)
    file, what = Path(source).expanduser(), f"'{source}'"
    if source == IMAGENET:
        repository = _imagenet_repository(generator)
        file = download(repository, _HUB_FILES, repository, then=_THEN)
        what = f"The file of ImageNet weights {repository}"
    found = read_checkpoint(file, lambda state: "layer1.0.conv1.weight" in state).state
    tensors = {_BODY + name: tensor for name, tensor in found.items() if not name.startswith("fc.")}
    what = f"{what}, for the backbone '{generator.options.backbone}',"
    advice = f"change {_OPTION}backbone, {_OPTION}stem_width or {_OPTION}widths, or give other weights"
    return _fitting(generator, tensors, what, _BODY, advice), ()


def describe_start(generator: ProposalGenerator, source: str) -> str:
    """What `proposals_start` would take, without a download: a file or folder is tried.

    Raises:
        LexisegError: as `proposals_start`, but not where something would have to be downloaded.
    """
    if source == IMAGENET:
        repository = _imagenet_repository(_query_generator(generator, source))
        here = "in the local cache" if cached(repository, _HUB_FILES) else "not on this machine yet, to be downloaded"
        return f"{IMAGENET}: the backbone from {repository} ({here})"
    return f"{source} ({len(proposals_start(generator, source)[0])} tensors)"


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


def _imagenet_repository(generator: QueryGenerator) -> str:
    options = generator.options
    if tuple(options.widths or RESNET_WIDTHS) != RESNET_WIDTHS:
        raise LexisegError(
            f"There are no ImageNet weights for a {options.backbone} with these widths; set {_OPTION}widths to null, "
            "or proposals_from to null."
        )
    return IMAGENET_WEIGHTS[options.backbone]


def _own_tensors(generator: QueryGenerator, source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of our own generator in a folder without its class head, and the classes it had masks of."""
    model = load_model(source) if is_folder(source) else None
    if not isinstance(model, DecoupledModel):
        raise LexisegError(
            f"'{source}' is not a lexiseg run or model that proposals could start from; give one, 'imagenet' or a "
            "ResNet's file (a published MaskFormer has seen masks of unseen classes)."
        )
    for key in ("kind", "heads"):
        before, now = (getattr(options, key, None) for options in (model.options.proposals, generator.options))
        if before != now:
            raise LexisegError(
                f"The proposals of '{source}' have {key} {before} and this generator {now}; set {_OPTION}{key} to "
                f"{before}."
            )
    advice = "give both the same options, but for the class head"
    tensors = model.generator.state_dict()
    return _fitting(generator, tensors, f"The generator of '{source}'", "", advice), model.seen_names


def _fitting(
    generator: QueryGenerator, tensors: dict[str, Tensor], what: str, part: str, advice: str
) -> dict[str, Tensor]:
    """Those of the tensors that training starts from, seen to be all that the ``part`` of the generator has."""

    def taken(name: str) -> bool:
        # A class head belongs to its classes, and how many batches a norm has seen means nothing here.
        return name.startswith(part) and not name.startswith("class_embed.") and "num_batches_tracked" not in name

    found = {name: tensor for name, tensor in tensors.items() if taken(name)}
    wanted = {name: shape for name, shape in shapes_of(generator).items() if taken(name)}
    check_state(found, wanted, what, advice=advice)
    return found
