"""A model as a folder: ``config.json`` and ``model.safetensors``; and finding such a folder by name."""

import copy
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from lexiseg.catalog import CONFIG_NAME, list_models, packaged_clips, packaged_models
from lexiseg.clip.foreign import TIMM, TRANSFORMERS
from lexiseg.clip.load import check_state, load_clip, read_safetensors, shapes_of, sketch
from lexiseg.clip.model import CLIP, build_clip, write_tensors
from lexiseg.errors import LexisegError
from lexiseg.files import local, make_folder, read_json, write_json
from lexiseg.hub import download
from lexiseg.models import SYSTEMS, SegmentationModel
from lexiseg.renames import renamed_options
from lexiseg.weights import runs
from lexiseg.weights.auto import AUTO, pick_auto
from lexiseg.weights.training_free import TRAINING_FREE, load_training_free
from lexiseg.words import describe, near_names, shorten

FORMAT = 1
WEIGHTS_NAME = "model.safetensors"

_CLIP_PREFIX = "clip."
_COPY_AGAIN = "copy the original folder again"


def save_model(model: SegmentationModel, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a model as a folder that `load_model` reads.

    The CLIP goes into the folder as well, unless it came with lexiseg: then the configuration names it and its
    fingerprint, and the folder holds what training changed.

    ``dtype``: what to store the weights in, for example ``torch.float16``; None keeps them as they are. Raises
    LexisegError if the folder cannot be written, or the system is another library's and has nothing to save.
    """
    if model.system not in SYSTEMS:
        raise LexisegError(
            f"'{model.system}' has no weights of its own to save; load it by its name, {model.clip.name}."
        )
    clip = model.clip
    tensors, options = model.state_dict(), model.options.model_dump(mode="json")
    reference: dict[str, Any] = {"name": clip.name}
    if clip.packaged:
        with torch.random.fork_rng(devices=[]):
            base = load_clip(clip.name)
            reference["fingerprint"] = base.fingerprint()
            new = SYSTEMS[model.system].build(base, options, seen_names=model.seen_names).state_dict()
        tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if not name.startswith(_CLIP_PREFIX) or not torch.equal(tensor.to(new[name]), new[name])
        }
    else:
        reference["architecture"] = clip.architecture
    config = {
        "format": FORMAT,
        "system": model.system,
        "clip": reference,
        "options": options,
        "seen_names": list(model.seen_names),
        "templates": list(model.default_templates),
        "metadata": model.metadata,
    }
    folder = make_folder(folder)
    write_tensors(folder / WEIGHTS_NAME, tensors, dtype=dtype, metadata={"format": "pt", "system": model.system})
    write_json(folder / CONFIG_NAME, config)
    return folder


def load_model(name: str | Path) -> SegmentationModel:
    """Load a model by name, in evaluation mode.

    ``name`` is one of:

    - a model that comes with lexiseg, see `list_models`;
    - a folder written by `save_model`, or a hub repository ``"owner/name"`` with its two files;
    - the folder of a training, whose model is taken, or where there is none yet its newest checkpoint; or one of its
      checkpoints;
    - ``"METHOD/NAME"``, a training-free method and any name `lexiseg.clip.load.load_clip` takes, for example
      ``"naclip/ViT-B-16/openai"``, see `lexiseg.weights.training_free`;
    - ``"auto"``, the best weights this machine can get, see `lexiseg.weights.auto`.

    Raises LexisegError if there is no such model (near names are listed), a file is damaged or of another kind, or the
    weights do not fit the configuration (the first tensor that differs is named with both shapes).
    """
    text = str(name)
    if text == AUTO:
        text = pick_auto()
    packaged = packaged_models()
    if text in packaged:
        model = _load_folder(packaged[text])
    elif text.partition("/")[0] in TRAINING_FREE:
        model = load_training_free(text)
    elif (path := local(text)) is not None:
        if not path.is_dir():
            raise LexisegError(_not_a_folder(path))
        model = _load_folder(path)
    elif re.fullmatch(r"(hf-hub:)?[\w.-]+/[\w.-]+", text) and not text.startswith("."):
        model = _load_hub(text.removeprefix("hf-hub:"))
    else:
        raise LexisegError(_unknown(text))
    return model.eval()


def _not_a_folder(path: Path) -> str:
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return f"'{path}' is a checkpoint, not a model folder; run `lexiseg convert {path} -o FOLDER` and load FOLDER."
    return f"'{path}' is a file, not a model folder; give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}."


def _unknown(name: str) -> str:
    known = [entry.name for entry in list_models()] + ["naclip/ViT-B-16/openai", "auto"]
    return f"No model is called '{shorten(name)}' and there is no such folder; {near_names(name, known)}"


def _load_hub(repository: str) -> SegmentationModel:
    if get_close_matches(repository, [entry.name for entry in list_models()], n=1, cutoff=0.7):
        raise LexisegError(_unknown(repository))
    config = download(repository, (CONFIG_NAME,), repository)
    download(repository, (WEIGHTS_NAME,), repository)
    return _load_folder(config.parent)


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a model folder; a `LexisegError` if it is damaged, or a file is missing."""
    path = folder / CONFIG_NAME
    if local(path) is None:
        others = {
            "open_clip_config.json": " It is a CLIP: write 'naclip/' before it.",
            "prompts.json": " It holds learned text prompts: name it as 'prompts_from' of a recipe.",
        }
        other = next((said for name, said in others.items() if local(folder / name)), "")
        raise LexisegError(
            f"The folder '{folder}' has no {CONFIG_NAME}, so it is not a lexiseg model; give one that "
            f"`lexiseg train` or `lexiseg convert` wrote.{other}"
        )
    config = read_json(path, _COPY_AGAIN)
    if not {"format", "system", "clip", "options"} <= config.keys():
        raise LexisegError(f"'{path}' is not a lexiseg configuration; give a folder that lexiseg wrote.")
    if config["format"] != FORMAT:
        raise LexisegError(
            f"'{path}' has format {describe(config['format'])} and this lexiseg reads {FORMAT}; update lexiseg."
        )
    if not isinstance(config["system"], str) or config["system"] not in SYSTEMS:
        raise LexisegError(
            f"'{path}' is of the system '{describe(config['system'])}', which this lexiseg does not have; "
            f"it has {', '.join(SYSTEMS)}."
        )
    for key in ("clip", "options", "metadata"):
        if not isinstance(config.get(key, {}), dict):
            raise LexisegError(f"'{path}' is damaged: its {key} must be a mapping; {_COPY_AGAIN}.")
    for key in ("seen_names", "templates"):
        names = config.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise LexisegError(f"'{path}' is damaged: its {key} must be a list of texts; {_COPY_AGAIN}.")
    if not (folder / WEIGHTS_NAME).is_file():
        raise LexisegError(f"The folder '{folder}' has no {WEIGHTS_NAME}; copy the whole folder.")
    return config


def _load_folder(folder: Path) -> SegmentationModel:
    if not (folder / CONFIG_NAME).exists():
        if (folder / runs.STATE).is_file():
            return _load_checkpoint(folder)
        if (folder / "model" / CONFIG_NAME).is_file():
            return _load_folder(folder / "model")
        if found := runs.find_checkpoints(folder / "checkpoints") or runs.find_checkpoints(folder):
            return _load_checkpoint(found[-1])
    config = read_config(folder)
    weights = folder / WEIGHTS_NAME
    system = SYSTEMS[config["system"]]
    where = f"'{folder / CONFIG_NAME}'"
    options = renamed_options(system.system, config["options"], where)
    reference = config["clip"]
    own_clip = "architecture" in reference
    clip = None if own_clip else _packaged_clip(reference, folder)
    state = read_safetensors(weights)

    def build(clip: CLIP | None) -> SegmentationModel:
        if clip is None:
            clip = build_clip(reference["architecture"], name=str(reference.get("name", "clip")))
        return system.build(clip, options, seen_names=tuple(config.get("seen_names", ())))

    def check(model: SegmentationModel) -> None:
        shapes = shapes_of(model)
        if not own_clip:
            shapes = {key: shape for key, shape in shapes.items() if key in state or not key.startswith(_CLIP_PREFIX)}
        check_state(state, shapes, f"'{weights}'")

    if folder not in packaged_models().values():  # a stranger's configuration may ask for a model of any size
        check(sketch(lambda: build(clip if clip is None else copy.deepcopy(clip).to("meta")), len(state), where))
    model = build(clip)
    check(model)
    model.load_state_dict(state, strict=False)
    if config.get("templates"):
        model.default_templates = tuple(config["templates"])
    model.metadata = dict(config.get("metadata", {}))
    return model


def _load_checkpoint(folder: Path) -> SegmentationModel:
    """The model of a training's checkpoint: that of the run's beginning, with the tensors that training changed."""
    state = runs.read_state(folder)
    base = folder.parent / runs.BASE
    if not (base / CONFIG_NAME).is_file():
        if (made := folder.parent.parent / "model").is_dir():
            read_config(made)  # which says what else the run has trained
        raise LexisegError(
            f"The checkpoint '{folder}' holds the trained tensors alone, and the rest of the model should be in "
            f"'{base}'; copy the whole folder '{folder.parent}'."
        )
    model, tensors = _load_folder(base), runs.read_tensors(folder / runs.TENSORS)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name in tensors}
    check_state(tensors, shapes, f"'{folder / runs.TENSORS}'")
    model.load_state_dict(tensors, strict=False)
    model.metadata["steps"] = state["step"]
    return model


def _packaged_clip(reference: dict[str, Any], folder: Path) -> CLIP:
    """The CLIP of this package, or the towers of another library, that a configuration names and does not hold."""
    name = str(reference.get("name", "clip"))
    if name not in packaged_clips() and not name.startswith((TRANSFORMERS, TIMM)):
        raise LexisegError(
            f"No CLIP is called '{shorten(name)}', which the model in '{folder}' asks for; {_COPY_AGAIN}."
        )
    clip = load_clip(name)
    # Those that come with this lexiseg fit each other, which takes a hash of all weights to see.
    if folder not in packaged_models().values() and clip.fingerprint() != reference.get("fingerprint"):
        raise LexisegError(
            f"The model in '{folder}' was trained with another version of '{name}' than this lexiseg has; "
            "install the lexiseg it was made with, or train it again."
        )
    return clip
