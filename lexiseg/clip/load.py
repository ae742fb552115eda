"""Finding a CLIP by name: shipped with lexiseg, in a folder, a known open_clip tag, a local file, or on the hub."""

import difflib
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import open_clip
import torch
from open_clip.factory import convert_state_dict, get_model_config, load_state_dict
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_parameter_registration_hook

from lexiseg import catalog
from lexiseg.clip.foreign import load_foreign
from lexiseg.clip.model import CLIP, CONFIG_NAME, WEIGHTS_NAME, build_clip, check_architecture
from lexiseg.clip.positions import resize_positions
from lexiseg.errors import LexisegError
from lexiseg.files import local, read_json, utf8_path
from lexiseg.hub import download
from lexiseg.words import did_you_mean, first_line, near_names, printable, shorten

# A picture of 4096 pixels in patches of 16; a table of positions is not stretched further.
_MOST_PATCHES = 256 * 256
_HUB_WEIGHTS = (WEIGHTS_NAME, "open_clip_pytorch_model.bin")


def load_clip(name: str | Path) -> CLIP:
    """Load a CLIP.

    Args:
        name: one of

            - a CLIP that comes with lexiseg, see `lexiseg.catalog.packaged_clips`: ``"clip-emoji"``;
            - an open_clip architecture and pretrained tag: ``"ViT-B-16/openai"`` (the tag decides on QuickGELU:
              OpenAI's weights need it);
            - an architecture and a local file: ``"ViT-B-16/path/to/open_clip_model.safetensors"``. A file does not say
              which activation it was trained with; for OpenAI's weights write ``"ViT-B-16-quickgelu/..."``;
            - a folder with ``open_clip_config.json`` and ``open_clip_model.safetensors``;
            - a hub repository of open_clip: ``"hf-hub:owner/name"``;
            - a dual encoder of another library: ``"transformers:google/tipsv2-b14"``, see `lexiseg.clip.foreign`.

    Returns the model in float32, in evaluation mode and on the CPU. Raises LexisegError if the name is unknown (near
    names are listed), the weights do not fit, or the hub is out of reach.
    """
    text = str(name)
    folder = local(text)
    if text in catalog.packaged_clips():
        clip = _load_folder(catalog.PACKAGED_FOLDER / text, text)
        clip.packaged = True
    elif text.startswith(("transformers:", "timm:")):
        clip = load_foreign(text)
    elif text.startswith("hf-hub:"):
        clip = _load_hub(text)
    elif folder is not None and folder.is_dir():
        clip = _load_folder(folder, text)
    elif "/" in text and get_model_config(text.split("/", 1)[0]) is not None:
        clip = _load_architecture(text)
    else:
        raise LexisegError(_unknown(text))
    return clip.eval()


def _unknown(name: str) -> str:
    known = catalog.packaged_clips() + [f"{arch}/{tag}" for arch, tag in open_clip.list_pretrained() if "ViT" in arch]
    shown = shorten(name)
    if tags := [f"{arch}/{tag}" for arch, tag in open_clip.list_pretrained() if arch == name][:3]:
        return f"No CLIP is called '{shown}'; {did_you_mean(tags)}"
    if Path(name).suffix or name.startswith((".", "/", "~")):
        return f"There is no folder '{shown}' with a CLIP in it; give a folder with {CONFIG_NAME} and {WEIGHTS_NAME}."
    hint = near_names(name, known, "give one such as 'ViT-B-16/openai'.")
    return f"No CLIP is called '{shown}'; {hint}"


def _load_folder(folder: Path, name: str) -> CLIP:
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    for path in (config_path, weights_path):
        if not path.is_file():
            raise LexisegError(f"The folder '{folder}' has no {path.name}; a CLIP folder needs both files.")
    architecture = read_json(config_path)
    check_architecture(architecture, name)
    state = read_safetensors(weights_path)
    if folder.parent != catalog.PACKAGED_FOLDER:  # a stranger's configuration may ask for a model of any size
        fitted(sketch(lambda: build_clip(architecture, name=name), len(state), f"'{config_path}'"), state, weights_path)
    clip = build_clip(architecture, name=name)
    fill(clip, state, weights_path)
    return clip


def _tagged(arch: str, tag: str) -> tuple[dict[str, Any], Any]:
    """An architecture of open_clip as its pretrained tag has it, and what open_clip says of the tag; empty for none.

    The tag knows which activation its weights were trained with; the architecture's name need not repeat it.
    """
    said = get_pretrained_cfg(arch, tag)
    architecture: dict[str, Any] = {"model_cfg": get_model_config(arch)}
    if said:
        architecture["model_cfg"]["quick_gelu"] = bool(said.get("quick_gelu", False))
    if "mean" in said and "std" in said:
        architecture["preprocess_cfg"] = {"mean": list(said["mean"]), "std": list(said["std"])}
    return architecture, said


def _load_architecture(name: str) -> CLIP:
    arch, rest = name.split("/", 1)
    architecture, tag = _tagged(arch, rest)
    if tag:
        check_architecture(architecture, name)
        return _filled(architecture, name, _download_tag(name, tag))
    path = local(rest) or Path()
    if not path.is_file():
        tags = list_pretrained_tags_by_model(arch)
        near = difflib.get_close_matches(rest, tags, n=3, cutoff=0.3) or tags[:5]
        known = f"known tags: {', '.join(near)}" if near else "no tag of it is known"
        raise LexisegError(
            f"'{shorten(rest)}' is neither a file nor pretrained weights of {arch}; {known}, or give a "
            ".safetensors file."
        )
    state = read_safetensors(path)
    clip = build_clip(architecture, name=name)
    fill(clip, state, path)
    return clip


def random_clip(name: str) -> CLIP:
    """What `load_clip` would give for an architecture and tag such as ``"ViT-B-16/openai"``, with random weights.

    It is for counting and timing; a name whose architecture is not known without its weights is a `LexisegError`.
    """
    arch, _, tag = str(name).partition("/")
    # Asked first, because open_clip looks for an unknown name on the hub.
    architecture, said = _tagged(arch, tag) if arch in open_clip.list_models() else ({}, {})
    if not said:
        raise LexisegError(
            f"The architecture of '{name}' is not known without its weights; give a name such as 'ViT-B-16/openai'."
        )
    return build_clip(architecture, name=str(name)).eval()


def _load_hub(name: str) -> CLIP:
    repository = name.removeprefix("hf-hub:")
    if repository.count("/") != 1:
        raise LexisegError(f"'{name}' is not a hub repository; write hf-hub:OWNER/NAME.")
    architecture = read_json(download(repository, (CONFIG_NAME,), name))
    check_architecture(architecture, name)
    return _filled(architecture, name, download(repository, _HUB_WEIGHTS, name))


def _filled(architecture: dict[str, Any], name: str, path: Path) -> CLIP:
    """A CLIP with the weights of a file of any kind that open_clip reads."""
    clip = build_clip(architecture, name=name)
    fill(clip, convert_state_dict(clip.model, load_state_dict(str(path), weights_only=True)), path)
    return clip


def _download_tag(name: str, tag: dict[str, Any]) -> Path:
    repository = str(tag.get("hf_hub", ""))
    if not repository:
        raise LexisegError(
            f"The weights of '{name}' are not on the Hugging Face hub; download {tag.get('url', 'them')} yourself, "
            "turn them into a folder with `lexiseg convert`, and give that folder."
        )
    repository, filename = repository.rsplit("/", 1)
    names = (filename,) if filename else _HUB_WEIGHTS
    if filename.endswith((".bin", ".pt")):
        names = (f"{filename.rsplit('.', 1)[0]}.safetensors", filename)
    # A file does not say which activation it wants, so the name that is given with it has to.
    arch = name.split("/", 1)[0].removesuffix("-quickgelu") + ("-quickgelu" if tag.get("quick_gelu") else "")
    return download(repository, names, name, then=f"give {arch}/PATH/{names[0]} instead of the name")


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file as float32 tensors.

    Another kind of file (a pickle is never opened here) or a damaged one is a `LexisegError`.
    """
    if path.suffix != ".safetensors":
        raise LexisegError(
            f"'{path}' is not a .safetensors file; turn a .pt or .pth file into a folder with "
            f"`lexiseg convert {path} -o FOLDER` first."
        )
    try:
        with utf8_path(path) as place:
            tensors = load_file(place)
        return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    except Exception as error:  # a header of noise makes it raise almost anything; not all types can be converted
        raise LexisegError(
            f"'{path}' is not a readable safetensors file ({first_line(error)}); download or convert it again."
        ) from error


def fill(clip: CLIP, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copy a complete state dict into ``clip``, as `fitted` makes it."""
    clip.model.load_state_dict({name: tensor.float() for name, tensor in fitted(clip, state, path).items()})


def fitted(clip: CLIP, state: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a complete state dict as ``clip`` wants them; the position table is resized as open_clip does.

    Tensors that are missing, left over, of another shape or not finite are a `LexisegError`.
    """
    shapes, found = shapes_of(clip.model), dict(state)
    key = "visual.positional_embedding"
    if key in found and key in shapes and tuple(found[key].shape) != shapes[key]:
        grid = tuple(clip.visual.grid_size)
        if not 0 < math.prod(grid) <= _MOST_PATCHES or found[key].dim() != 2 or len(found[key]) < 2:
            raise LexisegError(
                f"'{path}' does not fit a CLIP of {' x '.join(map(str, grid))} patches; check the architecture."
            )
        found[key] = resize_positions(found[key], grid, interpolation="bicubic-antialias")
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in found and scalar in shapes and found[scalar].numel() == 1:
            found[scalar] = found[scalar].reshape(shapes[scalar])
    # How many batches a norm has seen means nothing to a tower that is not trained on; not every file has it.
    for name in shapes:
        if name.endswith("num_batches_tracked"):
            found.setdefault(name, torch.tensor(0))
    check_state(found, shapes, f"'{path}'")
    return found


M = TypeVar("M", bound=torch.nn.Module)


def sketch(build: Callable[[], M], num_tensors: int, what: str) -> M:
    """Build a module without memory for its values, to see whether a file's tensors fit before it is built in earnest.

    A configuration may ask for a million blocks: a module of many more tensors than the file's ``num_tensors`` is given
    up early, with a `LexisegError` that begins with ``what``.
    """
    thread, made = threading.get_ident(), 0

    def count(*_: Any) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > 4 * num_tensors + 1000:
            raise LexisegError(
                f"{what} belongs to a model with far more tensors than the {num_tensors} in the file; check that both "
                "belong together."
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return build()
    finally:
        hook.remove()


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's tensors by their names."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def count_parameters(module: torch.nn.Module, *, trainable: bool = False) -> int:
    """Number of a module's parameters, all or only those that ask for gradients."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trainable)


def check_state(
    state: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    what: str,
    *,
    optional: Collection[str] = (),
    advice: str = "",
) -> None:
    """See that tensors are those a model expects, and numbers.

    Args:
        state: what there is.
        shapes: what is to be filled, by the same names.
        what: whose tensors they are, for the message.
        optional: names that may be missing.
        advice: what to do where they do not fit.

    Raises LexisegError if tensors are missing, left over, of another shape, no plain numbers, or not finite.
    """
    odd = next((key for key, value in state.items() if not _plain(value)), None)
    if odd is not None:
        raise LexisegError(
            f"{what} has a tensor that is not a plain array of real numbers ({_listed([odd])}); save it as one."
        )
    wrong = [
        f"{key} is {tuple(value.shape)} instead of {shapes[key]}"
        for key, value in state.items()
        if key in shapes and tuple(value.shape) != shapes[key]
    ]
    problems = (
        ("missing", sorted(shapes.keys() - state.keys() - set(optional))),
        ("left over", sorted(state.keys() - shapes.keys())),
        ("of another shape", wrong),
    )
    said = "; ".join(f"{label}: {_listed(items)}" for label, items in problems if items)
    if said:
        raise LexisegError(f"{what} does not fit; {said}{advice and f'; {advice}'}.")
    # A sum is cheap and holds whatever is not finite; it may overflow by itself, so that it only points.
    for key, value in state.items():
        if value.is_floating_point() and not value.sum().isfinite() and not value.isfinite().all():
            raise LexisegError(
                f"{what} has values that are not finite in {_listed([key])}; take an earlier checkpoint."
            )


def _plain(value: torch.Tensor) -> bool:
    return not (value.is_meta or value.is_nested or value.is_quantized or value.is_complex()) and (
        value.layout is torch.strided
    )


def _listed(items: Sequence[str], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(printable(shorten(item, 120)) for item in items[:most]) + more
