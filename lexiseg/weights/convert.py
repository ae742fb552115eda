"""Turning checkpoints of other programs into folders that lexiseg loads."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lexiseg.clip.load import count_parameters, load_clip
from lexiseg.clip.model import build_clip, save_clip
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS, SegmentationModel
from lexiseg.weights.cat_seg_checkpoint import cat_seg_notes, read_cat_seg, recognise_cat_seg
from lexiseg.weights.checkpoint import Checkpoint, read_checkpoint
from lexiseg.weights.clip_state import (
    infer_vit_architecture,
    is_openai,
    is_transformers,
    transformers_architecture,
    transformers_source,
)
from lexiseg.weights.decoupled_checkpoints import DECOUPLED_NAMES, decoupled_notes, read_parts
from lexiseg.weights.detectron_checkpoint import recognise_detectron
from lexiseg.weights.filling import filled, key_map
from lexiseg.weights.folder import save_model
from lexiseg.weights.one_stage_checkpoint import NAMES, one_stage_notes, read_one_stage, recognise
from lexiseg.weights.sam_checkpoint import convert_sam, recognise_sam
from lexiseg.words import counted, printable, shorten

_TOWER = 8  # weights of two blocks
# What OpenAI's own state dict holds beside its tensors; their presence also tells that it is OpenAI's.
_OPENAI_NOTES = frozenset({"input_resolution", "context_length", "vocab_size"})


class _Layout(NamedTuple):
    """How authors lay out their checkpoints."""

    names: Mapping[str, str]  # of the systems, by what `recognise` calls them
    recognise: Callable[[Mapping[str, Any]], str | None]  # which of them a checkpoint's keys are of
    read: Callable[..., tuple[SegmentationModel, list[str]]]  # the model of such a file, and its unused keys
    notes: Callable[..., list[str]]  # what was assumed of the model, given the file and `convert`'s arguments


_LAYOUTS = (
    _Layout({"cat-seg": "CAT-Seg"}, recognise_cat_seg, read_cat_seg, cat_seg_notes),
    _Layout(NAMES, recognise, read_one_stage, one_stage_notes),
    _Layout(DECOUPLED_NAMES, recognise_detectron, read_parts, decoupled_notes),
)
_MODELS = {kind: name for layout in _LAYOUTS for kind, name in layout.names.items()}


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` found and wrote."""

    kind: str  # "zegclip", "cascade-clip", "spt-seg", "cat-seg", a decoupled system's name, "sam", or "clip"
    folder: Path  # where the result is
    num_tensors: int  # tensors read from the checkpoint
    num_parameters: int  # parameters of the result
    unused: tuple[str, ...] = ()  # keys that were recognised but take part in no computation, and were left out
    notes: tuple[str, ...] = ()  # what could not be read off the file and was assumed, a sentence each
    ignored: tuple[str, ...] = ()  # arguments of `convert` that were given and make no difference to such a file

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes, and what was left out, one sentence each."""
        if not self.unused:
            return self.notes
        count = counted(len(self.unused), "tensor")
        return (f"Left out, as no computation uses it: {count}, {self.unused[0]} first.", *self.notes)


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
    folder of `transformers` for the option ``proposals.weights``. The kind is detected from the keys, whatever
    their prefix. Nothing in a pickle is executed: objects other than tensors and harmless values are refused.

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
        heads: attention heads of the image tower; None is what all released CLIPs of that width have.
        text_heads: attention heads of the text tower; None likewise.
        clip: files without a CLIP in them (ZegFormer's training checkpoints): the one they were trained with.
        ema: take the moving average of the weights or not; None takes the weights where a file has both, and says so.
        dtype: what to store the weights in; None is float32. (A Segment Anything is always stored in it.)

    Raises LexisegError if the file cannot be read, is of no known kind, or lacks tensors or has others; all are listed.
    """
    found = read_checkpoint(path, lambda state: _kind(state) is not None, ema=ema)
    if found.metadata.get("system") in SYSTEMS:
        raise LexisegError(
            f"'{path}' is already part of a lexiseg model ({found.metadata['system']}); give its folder "
            f"'{found.path if found.path.is_dir() else found.path.parent}' to --model or lexiseg.load."
        )
    state, kind = found.state, _kind(found.state)
    if kind is None:
        raise _unknown(state, path)
    empty = _zeros(state, path, "take the file's moving average with --ema" if found.spare else "get the file again")
    given: dict[str, Any] = {"class_names": class_names or None, "templates": templates or None}
    given |= {"transductive": transductive or None, "quick_gelu": quick_gelu, "clip": clip, "dtype": dtype}
    sizes: dict[str, Any] = {"heads": heads, "text_heads": text_heads}
    if kind == "sam":
        uses: set[str] = set()
        parameters = convert_sam(state, folder, name=f"'{path}'")
        note = "It makes proposals and is not a model by itself; give the folder as the option proposals.weights."
        report = ConversionReport("sam", Path(folder), len(state), parameters, notes=(note,))
    elif kind == "clip":
        uses = {"quick_gelu", "dtype"}
        report = _convert_clip(found, folder, quick_gelu, sizes, dtype)
    else:
        uses = {"class_names", "templates", "dtype"}
        # Only files in detectron2's layout may lack a CLIP.
        uses |= {"clip"} if kind in DECOUPLED_NAMES and not any(".clip_model." in key for key in state) else set()
        tower = {"clip": load_clip(str(clip))} if clip is not None and "clip" in uses else {}
        layout = next(layout for layout in _LAYOUTS if kind in layout.names)
        model, unused = layout.read(state, name=f"'{found.path}'", **sizes, **tower)
        if transductive and getattr(model.options, "seen_offset", None):
            uses.add("transductive")
            model.options = model.options.model_copy(update={"seen_offset": 0.0})
        notes = layout.notes(model, state, seen_known=bool(class_names), transductive=transductive)
        model.seen_names = tuple(class_names or ())
        model.default_templates = tuple(templates or model.default_templates)
        description = f"{_MODELS[kind]} converted from the authors' checkpoint"
        model.metadata = {"description": description, "source": found.path.name}
        save_model(model, folder, dtype=dtype)
        report = ConversionReport(kind, Path(folder), len(state), model.num_parameters(), tuple(unused), tuple(notes))
    ignored = tuple(key for key, value in given.items() if value is not None and key not in uses)
    return replace(report, notes=(*found.notes, *empty, *report.notes), ignored=ignored)


def _kind(state: Mapping[str, Any]) -> str | None:
    """What a checkpoint is of, by its keys; None if it is of nothing that can be converted."""
    for layout in _LAYOUTS:
        if (kind := layout.recognise(state)) is not None:
            return kind
    return "clip" if is_openai(state) or is_transformers(state) else "sam" if recognise_sam(state) else None


def _zeros(state: Mapping[str, Tensor], path: str | Path, advice: str) -> list[str]:
    """A note on weights that are zero throughout, as the last layer of an untrained branch may be.

    Raises LexisegError if a part of `_TOWER` weights or more holds nothing else, with ``advice``, or weights are
    quantised.
    """
    for key, tensor in state.items():
        # A mask of attention may be of bools; no authors' weights are, and ours would be zeros and ones.
        if tensor.ndim > 1 and tensor.dtype.itemsize == 1 and not key.endswith("attn_mask"):
            raise LexisegError(
                f"'{printable(shorten(key))}' in '{path}' is quantised ({str(tensor.dtype).removeprefix('torch.')}); "
                "get the checkpoint in 16 or 32 bits."
            )
    weights = {key: tensor for key, tensor in state.items() if tensor.is_floating_point() and tensor.ndim > 1}
    zero = [key for key, tensor in weights.items() if not tensor.float().any()]
    all_of, zero_of = (
        Counter(part for key in keys for part in accumulate(key.split("."), "{}.{}".format)) for keys in (weights, zero)
    )
    for part, count in zero_of.items():
        if count == all_of[part] >= _TOWER:
            raise LexisegError(
                f"All {count} weights of '{printable(part)}' in '{path}' are zero, as in a placeholder or after a "
                f"broken download; {advice}."
            )
    if not zero:
        return []
    return [f"Zero throughout, as if never trained: {counted(len(zero), 'weight')}, {printable(zero[0])} first."]


def _unknown(state: Mapping[str, Tensor], path: str | Path) -> LexisegError:
    first = ", ".join(printable(shorten(key)) for key in sorted(state)[:3])
    known = ", ".join(_MODELS.values())
    return LexisegError(
        f"'{path}' is neither a checkpoint of {known} or Segment Anything nor a CLIP with a vision transformer (its "
        f"keys begin with {first}); lexiseg converts nothing else."
    )


def _convert_clip(
    found: Checkpoint, folder: str | Path, quick_gelu: bool | None, sizes: dict[str, Any], dtype: torch.dtype | None
) -> ConversionReport:
    what = f"'{found.path}'"
    openai = bool(_OPENAI_NOTES & found.state.keys())
    unused = [key for key in found.state if key.endswith("embeddings.position_ids")]
    unused += sorted((_OPENAI_NOTES | {"attn_mask"}) & found.state.keys())
    state = {key: value for key, value in found.state.items() if key not in unused}
    theirs = is_transformers(state)
    if theirs:
        architecture, source_of = transformers_architecture(state, found.config, what, **sizes), transformers_source
    else:
        source_of = key_map()  # OpenAI's and open_clip's names are ours
        architecture = infer_vit_architecture(state, source_of, **sizes, quick_gelu=openai, name=what)
    quick = architecture["model_cfg"]["quick_gelu"] if quick_gelu is None else quick_gelu
    architecture["model_cfg"]["quick_gelu"] = quick
    clip, _ = filled(
        lambda: build_clip(architecture, name="clip"),
        lambda name: source_of(name.removeprefix("model.")),
        state,
        f"The CLIP in {what}",
        optional=("logit_scale",),  # which nothing converted uses
    )
    save_clip(clip, folder, dtype=dtype)
    said = "its config.json says" if theirs and found.config else "OpenAI files have" if quick else "most others have"
    note = f"Its activation is assumed to be {'QuickGELU' if quick else 'GELU'}, as {said}."
    if quick_gelu is not None:
        note = f"Its activation is {'QuickGELU' if quick else 'GELU'}, as given."
    return ConversionReport("clip", Path(folder), len(found.state), count_parameters(clip), tuple(unused), (note,))
