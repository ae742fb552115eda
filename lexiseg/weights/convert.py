"""Turning checkpoints of other programs into folders that lexiseg loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexiseg.clip.load import count_parameters, load_clip
from lexiseg.clip.model import save_clip
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS, CascadeCLIP, SegmentationModel
from lexiseg.vocabulary import PAPER_TEMPLATES, SINGLE_TEMPLATE
from lexiseg.weights.cat_seg_checkpoint import is_cat_seg, read_cat_seg
from lexiseg.weights.checkpoint import Checkpoint, read_checkpoint
from lexiseg.weights.clip_state import (
    clip_from_state,
    drop_constants,
    infer_vit_architecture,
    is_openai,
    is_transformers,
    transformers_architecture,
    transformers_source,
)
from lexiseg.weights.decoupled_checkpoints import DECOUPLED_NAMES, read_decoupled
from lexiseg.weights.detectron_checkpoint import recognise_detectron
from lexiseg.weights.folder import CONFIG_NAME, save_model
from lexiseg.weights.one_stage_checkpoint import NAMES, read_one_stage, recognise
from lexiseg.weights.sam_checkpoint import convert_sam, recognise_sam
from lexiseg.words import printable, shorten

# Prompts a block of the papers' VOC and Context models.
_VOC_PROMPTS, _CONTEXT_PROMPTS = 10, 35
# What OpenAI's own state dict holds beside its tensors; their presence also tells that it is OpenAI's.
_MODELS = {**NAMES, "cat-seg": "CAT-Seg", **DECOUPLED_NAMES}
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
        names = {**_MODELS, "sam": "Segment Anything"}
        lines = [
            f"Found a {f'{names[self.kind]} model' if self.kind in names else 'CLIP'}: {self.num_tensors} tensors, "
            f"{self.num_parameters / 1e6:.1f} M parameters.",
        ]
        if self.unused:
            lines.append(f"{len(self.unused)} tensors that no computation uses were left out, {self.unused[0]} first.")
        return "\n".join([*lines, *self.notes, f"Wrote {self.folder}."])


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
    ema: bool | None = None,
    dtype: torch.dtype | None = None,
) -> ConversionReport:
    """Convert a checkpoint into a folder.

    A checkpoint of ZegCLIP, Cascade-CLIP, SPT-SEG, CAT-Seg or of a decoupled system (see
    `lexiseg.weights.decoupled_checkpoints`) in its authors' layout becomes a model folder for `lexiseg.load`; the state
    dict of a ViT of OpenAI, open_clip or `transformers` a CLIP folder for ``METHOD/FOLDER``; a Segment Anything a
    folder of `transformers` for the option ``proposals.weights``. Which it is shows in the keys, whatever stands in
    front of them. Nothing in a pickle is executed: what is neither tensor, plain value nor harmless is refused.

    Args:
        path: a .pth, .pt, .ckpt, .bin, .safetensors or detectron2's .pkl file, or the folder of a ``CLIPModel``.
        folder: where to write; made if missing.
        class_names: segmentation systems: the classes it was trained on, which the file does not hold. Without them no
            class counts as seen and the score offset of seen classes is not applied.
        templates: segmentation systems: the templates its text embeddings were made with; None takes the single one
            when the checkpoint has as many prompts as the papers' VOC models (10) or fewer, else the papers' 15.
        transductive: one-stage systems and ZegFormer: trained with self-training, so seen classes have no offset.
        quick_gelu: CLIP: which activation the towers use; None is what a ``config.json`` says, else True for OpenAI's
            files and those of `transformers`, False for others.
        heads: attention heads of the image tower; None is one a 64 channels, as in all released CLIPs.
        text_heads: attention heads of the text tower; None likewise.
        clip: files without a CLIP in them (ZegFormer's training checkpoints): the one they were trained with.
        ema: take the moving average of the weights or not; None takes the weights where a file has both, and says so.
        dtype: what to store the weights in; None is float32. (A Segment Anything is always stored in it.)

    Raises:
        LexisegError: the file cannot be read, is of no known kind, or lacks tensors or has some left over, with a list.
    """
    found = read_checkpoint(path, _known, ema=ema)
    if found.metadata.get("system") in SYSTEMS:
        raise LexisegError(
            f"'{path}' is already part of a lexiseg model ({found.metadata['system']}); give its folder "
            f"'{found.path.parent}' to --model or lexiseg.load."
        )
    state = found.state
    given = {"class_names": bool(class_names), "templates": bool(templates), "transductive": transductive}
    given |= {"quick_gelu": quick_gelu is not None, "clip": clip is not None, "dtype": dtype is not None}
    sizes: dict[str, Any] = {"heads": heads, "text_heads": text_heads}
    idle: set[str] = set()  # arguments that make no difference
    if (
        model := _read_model(found, {**sizes, "class_names": class_names, "clip": clip}, transductive, idle)
    ) is not None:
        kind, segmenter, unused, notes = model
        segmenter.seen_names = tuple(class_names or ())
        segmenter.default_templates = tuple(templates or segmenter.default_templates)
        description = f"{_MODELS[kind]} converted from the authors' checkpoint"
        segmenter.metadata = {"description": description, "source": found.path.name}
        save_model(segmenter, folder, dtype=dtype)
        counts = len(state), segmenter.num_parameters()
        report = ConversionReport(kind, Path(folder), *counts, tuple(unused), tuple(notes))
    elif is_openai(state) or is_transformers(state):
        report = _convert_clip(found, folder, quick_gelu, sizes, dtype)
        idle = {"class_names", "templates", "transductive", "clip"}
    elif recognise_sam(state):
        parameters = convert_sam(state, folder, name=f"'{path}'")
        note = "It makes proposals and is not a model by itself; give the folder as the option proposals.weights."
        report = ConversionReport("sam", Path(folder), len(state), parameters, notes=(note,))
        idle = set(given)
    else:
        raise _unknown(state, path)
    ignored = tuple(name for name, there in given.items() if there and name in idle)
    return replace(report, notes=(*found.notes, *report.notes), ignored=ignored)


def _read_model(
    found: Checkpoint, given: dict[str, Any], transductive: bool, idle: set[str]
) -> tuple[str, SegmentationModel, list[str], list[str]] | None:
    """The kind, model, unused keys and notes of a segmentation system's file; None where it is none."""
    state, name = found.state, f"'{found.path}'"
    sizes = {key: given[key] for key in ("heads", "text_heads")}
    seen_known = bool(given["class_names"])
    kind = recognise(state)
    system = recognise_detectron(state)
    idle.add("quick_gelu")
    if system is None or any(".clip_model." in key for key in state):
        given["clip"] = None
        idle.add("clip")
    if is_cat_seg(state):
        idle.add("transductive")
        return ("cat-seg", *_read_cat_seg(state, sizes, name))
    if kind is not None:
        return (kind, *_read_one_stage(state, kind, seen_known, transductive, sizes, name))
    if system is None:
        return None
    if system != "zegformer":
        idle.add("transductive")
    clip = None if given["clip"] is None else load_clip(str(given["clip"]))
    how: dict[str, Any] = {**sizes, "clip": clip, "seen_known": seen_known, "transductive": transductive, "name": name}
    return (system, *read_decoupled(system, state, **how))


def _known(state: Mapping[str, Any]) -> bool:
    checks = (is_cat_seg, recognise, recognise_detectron, is_openai, is_transformers, recognise_sam)
    return any(check(state) for check in checks)


def _unknown(state: Mapping[str, Tensor], path: str | Path) -> LexisegError:
    first = ", ".join(printable(shorten(key)) for key in sorted(state)[:3])
    known = ", ".join(_MODELS.values())
    return LexisegError(
        f"'{path}' is neither a checkpoint of {known} or Segment Anything nor a CLIP with a vision transformer (its "
        f"keys begin with {first}); lexiseg converts only those."
    )


def _read_one_stage(
    state: dict[str, Tensor], kind: str, seen_known: bool, transductive: bool, sizes: dict[str, Any], name: str
) -> tuple[SegmentationModel, list[str], list[str]]:
    options = {"seen_offset": 0.0} if transductive else {}
    model, unused = read_one_stage(state, **sizes, options=options, name=name)
    model.default_templates = SINGLE_TEMPLATE if model.options.num_prompts <= _VOC_PROMPTS else PAPER_TEMPLATES
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
    if not seen_known and not transductive:
        notes.append(
            "The classes it was trained on are not in the file: none counts as seen, and no score offset applies."
        )
    return model, unused, notes


def _read_cat_seg(
    state: dict[str, Tensor], sizes: dict[str, Any], name: str
) -> tuple[SegmentationModel, list[str], list[str]]:
    model, unused = read_cat_seg(state, **sizes, name=name)
    notes = [
        "It predicts as the released code does, for the published figures: of more than "
        f"{model.options.padding} classes a window sees that many; the option released: false in {CONFIG_NAME} lifts "
        "that limit."
    ]
    if not any(key.endswith("attn_mask") for key in state):
        notes.append("The side of its attention windows is not in the file; it is taken to be 12 patches, as released.")
    return model, unused, notes


def _convert_clip(
    found: Checkpoint,
    folder: str | Path,
    quick_gelu: bool | None,
    sizes: dict[str, Any],
    dtype: torch.dtype | None,
) -> ConversionReport:
    what = f"'{found.path}'"
    openai = bool(_OPENAI_NOTES & found.state.keys())
    state, unused = drop_constants(found.state)
    unused += sorted((_OPENAI_NOTES | {"attn_mask"}) & state.keys())
    state = {key: value for key, value in state.items() if key not in unused}
    theirs = is_transformers(state)
    if theirs:
        architecture = transformers_architecture(state, found.config, what)
        clip = clip_from_state(state, transformers_source, architecture=architecture, quick_gelu=quick_gelu, name=what)
    else:
        architecture = infer_vit_architecture(
            state, heads=sizes["heads"], text_heads=sizes["text_heads"], quick_gelu=openai, name=what
        )
        clip = clip_from_state(state, architecture=architecture, quick_gelu=quick_gelu, name=what)
    quick = clip.architecture["model_cfg"]["quick_gelu"]
    save_clip(clip, folder, dtype=dtype)
    said = "its config.json says" if theirs and found.config else "OpenAI files have" if quick else "most others have"
    note = f"Its activation is taken to be {'QuickGELU' if quick else 'GELU'}, as {said}."
    if quick_gelu is not None:
        note = f"Its activation is {'QuickGELU' if quick else 'GELU'}, as given."
    return ConversionReport("clip", Path(folder), len(found.state), count_parameters(clip), tuple(unused), (note,))
