"""Finding the weights in a checkpoint: how the file is read, which of its entries they are, and what their keys carry.

Programs wrap a state dict in their own ways: under ``state_dict``, ``model`` or ``net``, beside an optimizer and a
moving average, with ``module.``, ``model.`` or ``_orig_mod.`` in front of every key. All of that is undone here.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.files import read_json, utf8_path
from lexiseg.weights.pickles import PickledFile, entries, is_tensor, unreadable
from lexiseg.words import counted, kind, shorten

Reader = Callable[[], Tensor]
"""Reads one tensor of a file, which is not done before it is wanted: optimizers are twice as large as models."""

# Entries and prefixes that hold weights; what such have in their names that hold their moving average.
_PLAIN = (
    *("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights"),
    *("params", "student", "clip", "clip_model", "backbone", "encoder", "segmentor"),
)
_AVERAGE = re.compile(r"(?:^|_)(?:ema|swa|averaged|shadow|teacher)(?:_|$)", re.IGNORECASE)
# What compilers and sharding put into keys, at any place.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_DEPTH = 4
_MAX_TENSORS = 50_000
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file."""

    path: Path  # the file, or the folder that was given
    state: dict[str, Tensor]  # tensors by the keys of the format that was recognised
    config: dict[str, Any]  # the ``config.json`` beside the weights, {} where there is none
    metadata: dict[str, str]  # what a safetensors file notes of itself
    notes: tuple[str, ...]  # what was chosen and what was left out, a sentence each
    spare: bool = False  # whether the file has a moving average as well, which was not taken


def read_checkpoint(
    path: str | Path, known: Callable[[Mapping[str, Any]], bool], *, ema: bool | None = None
) -> Checkpoint:
    """Read the weights of a checkpoint; nothing in a pickle is ever executed.

    ``path``: a .pth, .pt, .ckpt, .bin, .pkl or .safetensors file, or a folder of `transformers`. ``known``: says of a
    state dict, by its keys, whether it is of a format that can be converted. ``ema``: take the moving average of the
    weights, or not; None takes the weights where a file has both. Raises LexisegError if the file is missing or
    damaged, holds objects that are not read, holds no weights, or has no moving average (or only that) where the other
    is asked for.
    """
    path = Path(path)
    choice = _Choice(path, ema)
    found: dict[str, Reader] = {}
    metadata: dict[str, str] = {}
    try:
        files, beside = (_folder_files(path), path) if path.is_dir() else ([path], path.parent)
        config = read_json(beside / "config.json") if (beside / "config.json").is_file() else {}
        for file in files:
            if not file.is_file():
                raise LexisegError(f"There is no file '{file}'; check the path.")
            if _is_safetensors(file):
                readers, metadata = _safetensors(file)
            else:
                readers = _pickled(file, choice)
            found |= readers
    except OSError as error:  # an over-long name, or a file that only others may read
        raise LexisegError(f"'{shorten(str(path), 200)}' cannot be read ({error.strerror}); check the path.") from error
    if len(found) > _MAX_TENSORS:
        raise LexisegError(f"'{path}' holds {len(found)} tensors, more than any model; give another file.")
    keys = _unwrapped(list(found), known, choice)
    if ema and not choice.seen:
        raise LexisegError(f"'{path}' holds no moving average (EMA) of its weights; leave --ema out.")
    state = {key: found[old]() for key, old in keys.items()}
    return Checkpoint(path, state, config, metadata, tuple(choice.notes), choice.spare)


@dataclass
class _Choice:
    """The choice between weights and their moving average, wherever a file offers it."""

    path: Path  # the file
    ema: bool | None  # what was asked for
    seen: bool = False  # whether there was an average at all
    spare: bool = False  # whether there was one that was not taken
    notes: list[str] = field(default_factory=list)  # what was chosen, a sentence each

    def of(self, plain: list[str], averages: list[str]) -> str:
        """The name that is meant; each list's first counts, and one may be empty."""
        if not averages:
            return plain[0]
        self.seen = True
        name, other = (names[0].rstrip(".") or "the others" if names else "" for names in (averages, plain))
        if not plain:
            if self.ema is False:
                raise LexisegError(
                    f"'{self.path}' holds only a moving average of weights ('{name}'); leave out --no-ema."
                )
            self.notes.append(f"The weights are a moving average (EMA), '{name}'; the file holds no others.")
        elif self.ema:
            self.notes.append(f"The moving average (EMA) of the weights, '{name}', is used, not '{other}'.")
        else:
            self.spare = True
            self.notes.append(
                f"The file holds a moving average (EMA) of the weights, '{name}', as well; '{other}' is "
                "used, --ema uses the average."
            )
        return averages[0] if self.ema or not plain else plain[0]


def _folder_files(folder: Path) -> list[Path]:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise LexisegError(f"'{index}' has no weight_map; copy the original again.")
            return sorted({folder / Path(shard).name for shard in shards.values()})
    raise LexisegError(f"The folder '{folder}' has neither {' nor '.join(_WEIGHT_FILES)}; give a checkpoint file.")


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(10)[8:] == b'{"'


def _safetensors(path: Path) -> tuple[dict[str, Reader], dict[str, str]]:
    try:
        with utf8_path(path) as place:
            file = safe_open(place, framework="pt")
    except Exception as error:
        raise unreadable(path) from error
    return {key: partial(file.get_tensor, key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _pickled(path: Path, choice: _Choice) -> dict[str, Reader]:
    file = PickledFile(path)
    content, where = file.content, ""
    for _ in range(_DEPTH):
        inside = entries(content)
        if inside is None:
            what = kind(content) if isinstance(content, list | tuple | str | int | None) else "a single object"
            raise LexisegError(f"'{path}' holds {what}, not a state dict; save its state dict alone.")
        holders = [key for key, value in inside.items() if "optim" not in key.lower() and _has_tensors(value, 2)]
        averages = [key for key in holders if _AVERAGE.search(key)]
        others = [key for key in holders if key not in averages]
        known = (*_PLAIN, *(_AVERAGE.sub("", key) for key in averages))
        plain = [key for key in known if key in others]
        if not plain and not averages and not any(map(is_tensor, inside.values())):
            plain = others
        if not plain and not averages:
            break
        where = choice.of(plain, averages)
        content = inside[where]
        if left := ", ".join(f"'{shorten(key)}'" for key in others if key != where):
            choice.notes.append(f"Left out: what the file holds under {left}.")
    state = {key: value for key, value in (entries(content) or {}).items() if is_tensor(value)}
    if not state:
        inside_what = f" under '{where}'" if where else ""
        raise LexisegError(f"'{path}' holds no tensors by name{inside_what}; give a checkpoint.")
    return {key: partial(file.tensor, value, key) for key, value in state.items()}


def _has_tensors(value: Any, depth: int, seen: set[int] | None = None) -> bool:
    seen = set() if seen is None else seen  # an entry may lie at a million places
    inside = [item for item in (entries(value) or {}).values() if id(item) not in seen]
    seen.update(map(id, inside))
    return any(map(is_tensor, inside)) or bool(depth and any(_has_tensors(item, depth - 1, seen) for item in inside))


def _unwrapped(keys: list[str], known: Callable[[Mapping[str, Any]], bool], choice: _Choice) -> dict[str, str]:
    """The keys of a known format, and what each is in the file; all keys where no format is known."""
    clean = {_WRAPPERS.sub("", key): key for key in keys}
    if len(clean) < len(keys):
        raise LexisegError(
            f"'{choice.path}' has tensors whose keys differ only in what a compiler adds; save it again."
        )
    # mmcv's EMAHook keeps the average among the model's own buffers, whose names may hold no dot.
    buffers = {name: key for key in clean if (name := f"ema_{key.replace('.', '_')}") in clean}
    if buffers:
        average = {key: clean.pop(name) for name, key in buffers.items()}
        clean |= average if choice.of([""], ["ema_"]) else {}
    found: dict[str, dict[str, str]] = {}
    level = {"": clean}
    for _ in range(_DEPTH + 1):
        found |= {prefix: state for prefix, state in level.items() if known(state)}
        level = {
            f"{prefix}{part}.": inner
            for prefix, state in level.items()
            if prefix not in found
            for part in _wrappings(state)
            if (inner := {key[len(part) + 1 :]: old for key, old in state.items() if key.startswith(f"{part}.")})
        }
    if not found:
        return clean
    averages = [prefix for prefix in found if any(map(_AVERAGE.search, prefix.split(".")))]
    prefix = choice.of([prefix for prefix in found if prefix not in averages], averages)
    if left := len(clean) - sum(map(len, found.values())):
        choice.notes.append(f"Left out: {counted(left, 'tensor')} whose keys do not begin with '{prefix}'.")
    return found[prefix]


def _wrappings(keys: Iterable[str]) -> list[str]:
    """What keys begin with that may be wrapped around a state dict: what all begin with, or known names."""
    heads = dict.fromkeys(key.partition(".")[0] for key in keys)
    known = (*(part for part in _PLAIN if part in heads), *filter(_AVERAGE.search, heads))
    return [*heads] if len(heads) == 1 else [*known]
