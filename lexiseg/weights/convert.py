"""Turning checkpoints of other programs into folders that lexiseg loads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lexiseg.clip.load import fill, load_clip
from lexiseg.clip.model import build_clip, save_clip
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS, CascadeCLIP
from lexiseg.vocabulary import PAPER_TEMPLATES, SINGLE_TEMPLATE
from lexiseg.weights.cat_seg_checkpoint import is_cat_seg, read_cat_seg
from lexiseg.weights.clip_state import infer_vit_architecture
from lexiseg.weights.decoupled_checkpoints import DECOUPLED_NAMES, read_decoupled
from lexiseg.weights.detectron_checkpoint import System, recognise_detectron
from lexiseg.weights.folder import CONFIG_NAME, save_model
from lexiseg.weights.one_stage_checkpoint import NAMES, read_one_stage, recognise
from lexiseg.weights.sam_checkpoint import convert_sam, recognise_sam

# Prompts a block of the papers' VOC and Context models.
_VOC_PROMPTS, _CONTEXT_PROMPTS = 10, 35
# What OpenAI's own state dict holds beside its tensors; their presence also tells that it is OpenAI's.
_OPENAI_NOTES = frozenset({"input_resolution", "context_length", "vocab_size"})


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` found and wrote.

    Attributes:
        kind: "zegclip", "cascade-clip", "spt-seg", "cat-seg", a decoupled system's name, "sam", or "clip".
        folder: where the result is.
        num_tensors: tensors read from the checkpoint.
        num_parameters: parameters of the result.
        unused: keys that were recognised but take part in no computation, and were left out.
        notes: what could not be read off the file and was assumed, a sentence each.
        ignored: arguments of `convert` that were given and make no difference to a file of this kind.
    """

    kind: str
    folder: Path
    num_tensors: int
    num_parameters: int
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = {**NAMES, **DECOUPLED_NAMES, "cat-seg": "CAT-Seg", "sam": "Segment Anything"}
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
        LexisegError: the file is missing, damaged, holds more than tensors and plain values, or is a part of a model
            folder of lexiseg's own.
    """
    path = Path(path)
    if not path.is_file():
        raise LexisegError(f"There is no file '{path}' to convert; check the path.")
    own = ""
    content: Any = None
    try:
        if path.suffix == ".safetensors":
            own = _own_system(path)
            content = {} if own else load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of TorchScript files, which the error below speaks of
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of noise makes the unpickler raise almost anything
        if "torchscript" in str(error).lower():
            raise LexisegError(
                f"'{path}' is a TorchScript program, which lexiseg does not run; take the same weights as "
                "safetensors from the hub (for OpenAI's ViT-B/16: timm/vit_base_patch16_clip_224.openai)."
            ) from error
        raise LexisegError(
            f"'{path}' cannot be read as weights only (it is damaged, no checkpoint, or holds other objects than "
            "tensors); download it again, or save its state dict alone."
        ) from error
    if own:
        raise LexisegError(
            f"'{path}' is a part of a lexiseg model already ({own}); give its folder '{path.parent}' to --model or "
            "lexiseg.load."
        )
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


def _own_system(path: Path) -> str:
    """The system that `lexiseg.weights.save_model` noted in a safetensors file; "" in files of others."""
    with safe_open(path, framework="pt") as file:
        noted = str((file.metadata() or {}).get("system", ""))
    return noted if noted in SYSTEMS else ""


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

    A checkpoint of ZegCLIP, Cascade-CLIP, SPT-SEG, CAT-Seg or of a decoupled system (see
    `lexiseg.weights.decoupled_checkpoints`) in its authors' layout becomes a model folder for `lexiseg.load`; the state
    dict of an OpenAI or open_clip ViT becomes a CLIP folder for ``dense-clip/FOLDER``; a Segment Anything becomes a
    folder of `transformers` for the option ``proposals.weights``. Which it is shows in the keys.

    Args:
        path: the checkpoint.
        folder: where to write; made if missing.
        class_names: segmentation systems: names of the classes it was trained on, which the file does not hold.
            Without them no class counts as seen and the score offset of seen classes is not applied.
        templates: segmentation systems: the templates its text embeddings were made with; None takes the single one
            when the checkpoint has as many prompts as the papers' VOC models (10) or fewer, else the papers' 15.
        transductive: one-stage systems and ZegFormer, which lower the scores of seen classes: it was trained with
            self-training, where they do not.
        quick_gelu: CLIP: which activation the towers use; None is True for OpenAI's own files and False for others.
            (Those of the segmentation systems are always OpenAI's.)
        heads: attention heads of the image tower; None is one a 64 channels, as in all released CLIPs.
        text_heads: attention heads of the text tower; None likewise.
        clip: decoupled systems whose file has no CLIP in it (ZegFormer's training checkpoints): the one they were
            trained with, by any name `load_clip` takes.
        dtype: what to store the weights in; None is float32. (A Segment Anything is always stored in it.)

    Raises:
        LexisegError: the file cannot be read, is of no known kind, or lacks tensors or has some left over; they are
            listed.
    """
    state = read_checkpoint(path)
    given = {
        "class_names": bool(class_names),
        "templates": bool(templates),
        "transductive": transductive,
        "quick_gelu": quick_gelu is not None,
        "clip": clip is not None,
        "dtype": dtype is not None,
    }
    kind = recognise(state)
    system = recognise_detectron(state)
    if is_cat_seg(state):
        report = _convert_cat_seg(state, path, folder, class_names, templates, heads, text_heads, dtype)
        idle = {"transductive", "quick_gelu", "clip"}
    elif kind is not None:
        report = _convert_one_stage(
            state, kind, path, folder, class_names, templates, transductive, heads, text_heads, dtype
        )
        idle = {"quick_gelu", "clip"}
    elif system is not None:
        idle = {"quick_gelu"}
        if any(".clip_model." in key for key in state):
            clip = None
            idle.add("clip")
        if system != "zegformer":
            idle.add("transductive")
        report = _convert_decoupled(
            state, system, path, folder, class_names, templates, transductive, heads, text_heads, clip, dtype
        )
    elif "visual.conv1.weight" in state and "token_embedding.weight" in state:
        report = _convert_clip(state, path, folder, quick_gelu, heads, text_heads, dtype)
        idle = {"class_names", "templates", "transductive", "clip"}
    elif recognise_sam(state):
        parameters = convert_sam(state, folder, name=f"'{path}'")
        note = "It makes proposals and is no model by itself: give the folder as the option proposals.weights."
        report = ConversionReport("sam", Path(folder), len(state), parameters, notes=(note,))
        idle = set(given)
    else:
        raise _unknown(state, path)
    return replace(report, ignored=tuple(name for name, there in given.items() if there and name in idle))


def _unknown(state: Mapping[str, Tensor], path: str | Path) -> LexisegError:
    first = ", ".join(sorted(state)[:3])
    known = ", ".join([*NAMES.values(), "CAT-Seg", *DECOUPLED_NAMES.values()])
    return LexisegError(
        f"'{path}' is neither a checkpoint of {known} or Segment Anything nor a CLIP with a vision transformer (its "
        f"keys begin with {first}); lexiseg converts only those."
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


def _convert_cat_seg(
    state: dict[str, Tensor],
    path: str | Path,
    folder: str | Path,
    class_names: Sequence[str] | None,
    templates: Sequence[str] | None,
    heads: int | None,
    text_heads: int | None,
    dtype: torch.dtype | None,
) -> ConversionReport:
    model, unused = read_cat_seg(state, heads=heads, text_heads=text_heads, name=f"'{path}'")
    model.seen_names = tuple(class_names or ())
    model.default_templates = tuple(templates or model.default_templates)
    model.metadata = {"description": "CAT-Seg converted from the authors' checkpoint", "source": Path(path).name}
    notes = [
        "It predicts as the released code does, for the published figures: of more than "
        f"{model.options.padding} classes a window sees that many, and of a class's words the first; the option "
        f"released: false in {CONFIG_NAME} lifts both limits."
    ]
    if not any(key.endswith("attn_mask") for key in state):
        notes.append("The side of its attention windows is not in the file; it is taken to be 12 patches, as released.")
    save_model(model, folder, dtype=dtype)
    return ConversionReport(model.system, Path(folder), len(state), model.num_parameters(), tuple(unused), tuple(notes))


def _convert_decoupled(
    state: dict[str, Tensor],
    system: System,
    path: str | Path,
    folder: str | Path,
    class_names: Sequence[str] | None,
    templates: Sequence[str] | None,
    transductive: bool,
    heads: int | None,
    text_heads: int | None,
    clip: str | Path | None,
    dtype: torch.dtype | None,
) -> ConversionReport:
    given = None if clip is None else load_clip(str(clip))
    found = read_decoupled(
        system,
        state,
        heads=heads,
        text_heads=text_heads,
        clip=given,
        seen_known=bool(class_names),
        transductive=transductive,
        name=f"'{path}'",
    )
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
    architecture = infer_vit_architecture(state, heads=heads, text_heads=text_heads, quick_gelu=quick, name=f"'{path}'")
    clip = build_clip(architecture, name=str(path))
    fill(clip, state, Path(path))
    save_clip(clip, folder, dtype=dtype)
    note = f"Its activation is taken to be {'QuickGELU, as in OpenAI files' if quick else 'GELU'}."
    parameters = sum(parameter.numel() for parameter in clip.parameters())
    return ConversionReport("clip", Path(folder), num_tensors, parameters, unused, (note,))
