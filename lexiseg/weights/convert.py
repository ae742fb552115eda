"""Turning checkpoints of other programs into folders that lexiseg loads."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lexiseg.clip import build_clip, load_clip, save_clip
from lexiseg.clip.load import fill
from lexiseg.errors import LexisegError
from lexiseg.models import CascadeCLIP
from lexiseg.vocabulary import PAPER_TEMPLATES, SINGLE_TEMPLATE
from lexiseg.weights.decoupled_checkpoints import DECOUPLED_NAMES, read_decoupled
from lexiseg.weights.detectron_checkpoint import System, recognise_detectron
from lexiseg.weights.folder import save_model
from lexiseg.weights.one_stage_checkpoint import NAMES, read_one_stage, recognise

# Prompts a block of the papers' VOC and Context models.
_VOC_PROMPTS, _CONTEXT_PROMPTS = 10, 35
# What OpenAI's own state dict holds beside its tensors; their presence also tells that it is OpenAI's.
_OPENAI_NOTES = frozenset({"input_resolution", "context_length", "vocab_size"})


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` found and wrote.

    Attributes:
        kind: "zegclip", "cascade-clip", "spt-seg", a decoupled system's name, or "clip".
        folder: where the result is.
        num_tensors: tensors read from the checkpoint.
        num_parameters: parameters of the result.
        unused: keys that were recognised but take part in no computation, and were left out.
        notes: what could not be read off the file and was assumed, a sentence each.
    """

    kind: str
    folder: Path
    num_tensors: int
    num_parameters: int
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        names = {**NAMES, **DECOUPLED_NAMES}
        lines = [
            f"Found a {f'{names[self.kind]} model' if self.kind in names else 'CLIP'}: {self.num_tensors} tensors, "
            f"{self.num_parameters / 1e6:.1f} M parameters.",
        ]
        if self.unused:
            lines.append(f"{len(self.unused)} tensors that no computation uses were left out, {self.unused[0]} first.")
        return "\n".join([*lines, *self.notes, f"Wrote {self.folder}."])


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a .pth, .pt or .safetensors file; nothing in a pickle is ever executed.

    Raises:
        LexisegError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise LexisegError(f"There is no file '{path}' to convert; check the path.")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else None
        if content is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of TorchScript files, which the error below speaks of
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        if "torchscript" in str(error).lower():
            raise LexisegError(
                f"'{path}' is a TorchScript program, which lexiseg does not run; take the same weights as "
                "safetensors from the hub (for OpenAI's ViT-B/16: timm/vit_base_patch16_clip_224.openai)."
            ) from error
        raise LexisegError(
            f"'{path}' cannot be read as weights only (it is damaged, no checkpoint, or holds other objects than "
            "tensors); download it again, or save its state dict alone."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise LexisegError(f"'{path}' holds a {type(content).__name__}, not a state dict; save its state dict alone.")
    state = {str(key).removeprefix("module."): value for key, value in content.items()}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise LexisegError(f"'{path}' holds no tensors; give a checkpoint.")
    return tensors


def convert(
    path: str | Path,
    folder: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    transductive: bool = False,
    quick_gelu: bool | None = None,
    heads: int | None = None,
    text_heads: int | None = None,
    clip: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> ConversionReport:
    """Convert a checkpoint into a folder.

    A checkpoint of ZegCLIP, Cascade-CLIP, SPT-SEG or of a decoupled system (see
    `lexiseg.weights.decoupled_checkpoints`) in its authors' layout becomes a model folder for `lexiseg.load`; the state
    dict of an OpenAI or open_clip ViT becomes a CLIP folder for ``dense-clip/FOLDER``. Which it is shows in the keys.

    Args:
        path: the checkpoint.
        folder: where to write; made if missing.
        class_names: segmentation systems: names of the classes it was trained on, which the file does not hold.
            Without them no class counts as seen and the score offset of seen classes is not applied.
        templates: segmentation systems: the templates its text embeddings were made with; None takes the single one
            when the checkpoint has as many prompts as the papers' VOC models (10) or fewer, else the papers' 15.
        transductive: segmentation systems: it was trained with self-training, so that seen classes have no score
            offset.
        quick_gelu: CLIP: which activation the towers use; None is True for OpenAI's own files and False for others.
            (Those of the segmentation systems are always OpenAI's.)
        heads: attention heads of the image tower; None is one a 64 channels, as in all released CLIPs.
        text_heads: attention heads of the text tower; None likewise.
        clip: decoupled systems whose file has no CLIP in it (ZegFormer's training checkpoints): the one they were
            trained with, by any name `load_clip` takes.
        dtype: what to store the weights in; None is float32.

    Raises:
        LexisegError: the file cannot be read, is of no known kind, or lacks tensors or has some left over; they are
            listed.
    """
    state = read_checkpoint(path)
    kind = recognise(state)
    if kind is not None:
        return _convert_one_stage(
            state, kind, path, folder, class_names, templates, transductive, heads, text_heads, dtype
        )
    system = recognise_detectron(state)
    if system is not None:
        return _convert_decoupled(state, system, path, folder, class_names, templates, heads, text_heads, clip, dtype)
    if "visual.conv1.weight" in state and "token_embedding.weight" in state:
        return _convert_clip(state, path, folder, quick_gelu, heads, text_heads, dtype)
    first = ", ".join(sorted(state)[:3])
    known = ", ".join([*NAMES.values(), *DECOUPLED_NAMES.values()])
    raise LexisegError(
        f"'{path}' is neither a checkpoint of {known} nor a CLIP with a vision transformer (its keys begin with "
        f"{first}); lexiseg converts only those."
    )


def _convert_one_stage(
    state: dict[str, Tensor],
    kind: str,
    path: str | Path,
    folder: str | Path,
    class_names: Sequence[str] | None,
    templates: Sequence[str] | None,
    transductive: bool,
    heads: int | None,
    text_heads: int | None,
    dtype: torch.dtype | None,
) -> ConversionReport:
    options = {"seen_offset": 0.0} if transductive else {}
    model, unused = read_one_stage(state, heads=heads, text_heads=text_heads, options=options, name=f"'{path}'")
    model.seen_names = tuple(class_names or ())
    if templates is None:
        templates = SINGLE_TEMPLATE if model.options.num_prompts <= _VOC_PROMPTS else PAPER_TEMPLATES
    model.default_templates = tuple(templates)
    model.metadata = {
        "description": f"{NAMES[kind]} converted from the authors' checkpoint",
        "source": Path(path).name,
    }
    notes = ["logit_scale is not in such a checkpoint and nothing here uses it; it has its initial value."]
    if isinstance(model, CascadeCLIP):
        notes.append(
            f"Which blocks its groups hold is not in the file; {model.options.groups} fits its shapes and is what the "
            "released models have."
        )
        if model.options.num_prompts == _CONTEXT_PROMPTS:
            # The ids in the authors' configuration belong to another order of the classes than their labels'.
            notes.append(
                "With 35 prompts it looks like the PASCAL Context model, whose unseen classes in the authors' "
                "configuration are aeroplane, bed, bedclothes, boat, bottle, car, cloth, cow, keyboard and plate, not "
                "the papers' ten."
            )
    if not class_names and not transductive:
        notes.append("The classes it was trained on are not in the file: none counts as seen, no score offset applies.")
    save_model(model, folder, dtype=dtype)
    return ConversionReport(kind, Path(folder), len(state), model.num_parameters(), tuple(unused), tuple(notes))


def _convert_decoupled(
    state: dict[str, Tensor],
    system: System,
    path: str | Path,
    folder: str | Path,
    class_names: Sequence[str] | None,
    templates: Sequence[str] | None,
    heads: int | None,
    text_heads: int | None,
    clip: str | Path | None,
    dtype: torch.dtype | None,
) -> ConversionReport:
    given = None if clip is None else load_clip(str(clip))
    found = read_decoupled(system, state, heads=heads, text_heads=text_heads, clip=given, name=f"'{path}'")
    model = found.model
    model.seen_names = tuple(class_names or ())
    if templates is not None:
        model.default_templates = tuple(templates)
    description = f"{DECOUPLED_NAMES[system]} converted from the authors' checkpoint"
    model.metadata = {"description": description, "source": Path(path).name}
    save_model(model, folder, dtype=dtype)
    parameters = model.num_parameters()
    return ConversionReport(system, Path(folder), len(state), parameters, tuple(found.unused), found.notes)


def _convert_clip(
    state: dict[str, Tensor],
    path: str | Path,
    folder: str | Path,
    quick_gelu: bool | None,
    heads: int | None,
    text_heads: int | None,
    dtype: torch.dtype | None,
) -> ConversionReport:
    unused = tuple(sorted((_OPENAI_NOTES | {"attn_mask"}) & state.keys()))
    openai = bool(_OPENAI_NOTES & state.keys())
    quick = openai if quick_gelu is None else quick_gelu
    num_tensors = len(state)
    state = {key: value for key, value in state.items() if key not in unused}
    conv, positions = state["visual.conv1.weight"], state["visual.positional_embedding"]
    width, patch = conv.shape[0], conv.shape[-1]
    text_width = state["ln_final.weight"].shape[0]
    architecture = {
        "model_cfg": {
            "embed_dim": state["text_projection"].shape[1],
            "quick_gelu": quick,
            "vision_cfg": {
                "image_size": math.isqrt(positions.shape[0] - 1) * patch,
                "patch_size": patch,
                "width": width,
                "layers": _count(state, "visual.transformer.resblocks."),
                "head_width": width // heads if heads else min(64, width),
                "mlp_ratio": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
            },
            "text_cfg": {
                "context_length": state["positional_embedding"].shape[0],
                "vocab_size": state["token_embedding.weight"].shape[0],
                "width": text_width,
                "heads": text_heads or max(text_width // 64, 1),
                "layers": _count(state, "transformer.resblocks."),
                "mlp_ratio": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / text_width,
            },
        }
    }
    clip = build_clip(architecture, name=str(path))
    fill(clip, state, Path(path))
    save_clip(clip, folder, dtype=dtype)
    note = f"Its activation is taken to be {'QuickGELU, as in OpenAI files' if quick else 'GELU'}."
    parameters = sum(parameter.numel() for parameter in clip.parameters())
    return ConversionReport("clip", Path(folder), num_tensors, parameters, unused, (note,))


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return max(int(key[len(prefix) :].split(".", 1)[0]) for key in state if key.startswith(prefix)) + 1
