"""A golden case: its tensors, what was compared, and what was not."""

from __future__ import annotations

import json
import re
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
TIE = 1e-5


_DEAD = "a dead computation of the authors' code, which lexiseg leaves out"
_LEGACY = "a mask argument that no system of theirs uses; it hides the wrong tokens, being off by one"
_DEAD_WEIGHTS = r"self_attn\..*|norm1\..*|multihead_attn\.(v|proj)\..*|linear[12]\..*|norm[23]\..*"
EXCEPTIONS: tuple[tuple[str, str], ...] = (
    (r"(decoder_1|cascade_\d+)_layer\d+_query_out", _DEAD),
    (rf"final_param/decode_head\.(decoder_1|cascade_decoders\.\d+)\.layers\.\d+\.({_DEAD_WEIGHTS})", _DEAD),
    (r"released_key_padding/.*|legacy_key_padding/.*", _LEGACY),
    (r"encode_text_ids", "it is the input of encode_text_raw"),
    (r"as_released/patches", "a bug of the authors' code, which takes the height of a grid for its width"),
    (r"confusion", "lexiseg keeps three sums of it, which are compared"),
)
"""Expected tensors that may be left out, and why: what has no counterpart in lexiseg. Any other must be compared."""

_TOLD = re.compile(
    # Where the case comes from, and what is said in words.
    r"tensors/.*|method|source_files|shims|image_seed|smallest_[a-z_]+|authors_call|tokenizer|positions|vfm/(kind|repo|commit|file|remarks)|"
    r"case|repo|commit|source|source_patches|torch|mmcv|mmseg|dtype|device|threads|seed|tolerance|sha256|"
    r"what|notes?|mode|output|dropout|columns|(test|train)_columns|dataset_class|allow_nonfinite|stem|resnet|assert_kept|vitL|resize|clip_logit_scale|"
    r"modes/[^/]+/(note|final_masks)|normalisation/order|"
    # Settings of the authors' framework that no number of the case depends on.
    r"model_config/(type|pretrained|pretrained_text|context_length|train_cfg|load_text_embedding)|"
    r"(model_config/backbone|backbone_config)/(type|get_embeddings|drop_path_rate|style)|"
    r"model_config/(text_encoder|decode_head|decode_head/loss_decode)/(type|style)|optimizer/type"
)


class Watched(dict[str, Any]):
    """A JSON object that remembers which of its values were read, by their paths."""

    def __init__(self, values: Mapping[str, Any], read: set[str], path: str = "") -> None:
        super().__init__(
            {key: Watched(v, read, f"{path}{key}/") if isinstance(v, dict) else v for key, v in values.items()}
        )
        self._read, self._path = read, path

    def _seen(self, key: str) -> None:
        value = super().get(key)
        if not isinstance(value, Watched) or not value:
            self._read.add(f"{self._path}{key}")

    def __getitem__(self, key: str) -> Any:
        self._seen(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # with one of its own, ``{**watched}`` reads values by their keys

    def get(self, key: str, default: Any = None) -> Any:
        """See `dict.get`."""
        self._seen(key)
        return super().get(key, default)

    def items(self) -> ItemsView[str, Any]:
        """See `dict.items`."""
        for key in self:
            self._seen(key)
        return super().items()

    def values(self) -> ValuesView[Any]:
        """See `dict.values`."""
        for key in self:
            self._seen(key)
        return super().values()

    def paths(self) -> Iterator[str]:
        """The paths of all values that are no objects."""
        for key, value in super().items():
            if isinstance(value, Watched) and value:
                yield from value.paths()
            else:
                yield f"{self._path}{key}"


class UnsupportedError(Exception):
    """The case is of a system, or asks for a thing, that lexiseg does not have; the message says which."""


@dataclass
class Case:
    """A golden case and what came of comparing it.

    Attributes:
        name: file name without suffix.
        config: the contents of the JSON.
        tensors: the tensors by key; floats of half precision are kept.
        compared: (key, absolute error, relative error) of each tensor compared.
        problems: what went wrong, a sentence each.
        skipped: keys that were not compared, with the reason.
        notes: remarks for the reader, such as ties.
        touched: keys of the expected tensors that were looked at.
        read: paths of the values of the JSON that were used or compared.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    compared: list[tuple[str, float, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not isinstance(self.config, Watched):
            self.config = Watched(self.config, self.read)

    def params(self) -> dict[str, Tensor]:
        """The ``param/`` tensors by the authors' keys; tables kept as ``param_rows/`` are filled up with zero rows."""
        found = {key.removeprefix("param/"): value for key, value in self.tensors.items() if key.startswith("param/")}
        for key in self.tensors:
            if key.startswith("param_rows/") and key.endswith("/ids"):
                stem = key.removesuffix("/ids")
                values = self.tensors[f"{stem}/values"]
                table = values.new_zeros(int(self.tensors[f"{stem}/num_rows"]), *values.shape[1:])
                table[self.tensors[key]] = values
                found[stem.removeprefix("param_rows/")] = table
        return found

    def input(self, name: str) -> Tensor:
        """The tensor ``input/name``."""
        key = f"input/{name}"
        if key not in self.tensors:
            raise UnsupportedError(f"the case has no {key}")
        return self.tensors[key]

    def has(self, name: str) -> bool:
        """Whether there is a tensor ``expected/name``."""
        return f"expected/{name}" in self.tensors

    def numbered(self, prefix: str) -> int:
        """How many inputs are called ``prefix`` with a number behind it."""
        start = f"input/{prefix}"
        return sum(key.startswith(start) and key.removeprefix(start).isdigit() for key in self.tensors)

    def expected_names(self, prefix: str = "") -> list[str]:
        """Names of the ``expected/`` tensors that begin with ``prefix``."""
        start = f"expected/{prefix}"
        return sorted(key.removeprefix("expected/") for key in self.tensors if key.startswith(start))

    def check(self, name: str, actual: Tensor, *, tolerance: float | None = None, zero_below: float = 0.0) -> None:
        """Compare with ``expected/name`` if the case has it.

        Args:
            name: the key without ``expected/``.
            actual: ours; integers must be equal, floats within the tolerance.
            tolerance: of the largest magnitude; None takes the usual one.
            zero_below: a tensor whose values are all below this is rounding around zero: ours must be so as well.
        """
        key = f"expected/{name}"
        if key not in self.tensors:
            return
        self.touched.add(key)
        expected = self.tensors[key]
        actual = actual.detach().cpu()
        if expected.squeeze().shape == actual.squeeze().shape:  # the authors' code drops an axis of one region
            actual = actual.reshape(expected.shape)
        if actual.shape != expected.shape:
            self.problems.append(f"{name}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
            return
        if not expected.is_floating_point():
            wrong = int((actual.long() != expected.long()).sum())
            self.compared.append((name, float(wrong > 0), float(wrong > 0)))
            if wrong:
                self.problems.append(f"{name}: {wrong} of {expected.numel()} values differ")
            return
        a, e = actual.double(), expected.double()
        if not torch.equal(torch.isnan(a), torch.isnan(e)):
            self.problems.append(f"{name}: not a number at other places")
            return
        a, e = torch.nan_to_num(a, nan=0.0), torch.nan_to_num(e, nan=0.0)
        absolute = float((a - e).abs().max()) if e.numel() else 0.0
        scale = float(e.abs().max()) if e.numel() else 0.0
        relative = absolute / scale if scale else absolute
        if scale < zero_below:
            relative = 0.0 if float(a.abs().max()) < zero_below else relative
            self.notes.append(f"{name}: zero but for rounding ({scale:.0e}), and so is ours")
        self.compared.append((name, absolute, relative))
        limit = tolerance or (GRADIENT_TOLERANCE if "grad" in name else TOLERANCE)
        if not relative <= limit:
            self.problems.append(f"{name}: relative error {relative:.2e} is over {limit:.0e}")

    def check_labels(self, name: str, actual: Tensor, scores: Tensor) -> None:
        """Compare a label map exactly, but where the two best expected scores (B, C, H, W) are within `TIE`."""
        key = f"expected/{name}"
        if key not in self.tensors:
            return
        self.touched.add(key)
        expected = self.tensors[key].long()
        differ = actual.long().cpu() != expected
        best = scores.topk(min(2, scores.shape[1]), dim=1).values
        tie = (best[:, 0] - best[:, -1]) <= TIE
        wrong = int((differ & ~tie).sum())
        self.compared.append((name, float(wrong > 0), float(wrong > 0)))
        if wrong:
            self.problems.append(f"{name}: {wrong} of {expected.numel()} labels differ")
        if bool((differ & tie).any()):
            self.notes.append(f"{name}: {int((differ & tie).sum())} labels differ at ties")

    def check_numbers(self, name: str, actual: Mapping[str, float] | list[float], expected: list[float]) -> None:
        """Compare numbers that are in the JSON."""
        values = torch.tensor(list(actual.values()) if isinstance(actual, Mapping) else actual, dtype=torch.float64)
        self.tensors[f"expected/{name}"] = torch.tensor(expected, dtype=torch.float64)
        self.check(name, values)

    def check_that(self, name: str, fact: bool, sentence: str) -> None:
        """Record a check that is no tensor."""
        self.compared.append((name, 0.0, 0.0) if fact else (name, 1.0, 1.0))
        if not fact:
            self.problems.append(f"{name}: {sentence}")

    def check_stated(self, what: str, stated: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Compare values of the JSON, as far as it has them, with what the tensors or the model say.

        That makes a case consistent, not compared: it is not counted as a comparison.
        """
        known = [key for key in found if key in stated]
        wrong = [f"{key} is {found[key]} and not {stated[key]}" for key in known if not _same(found[key], stated[key])]
        self.problems += [f"{what}: {sentence}" for sentence in wrong[:3]]

    def skip(self, name: str) -> None:
        """Leave out ``expected/name``, which has to be one of the `EXCEPTIONS`."""
        reason = next((why for pattern, why in EXCEPTIONS if re.fullmatch(pattern, name)), None)
        if self.has(name) and reason is not None:
            self.touched.add(f"expected/{name}")
            self.skipped[name] = reason

    def settle(self) -> None:
        """Make a problem of every expected tensor that was neither compared nor left out with a reason."""
        for name in self.expected_names():
            if f"expected/{name}" not in self.touched:
                self.problems.append(f"{name}: nothing of lexiseg's was compared with it")

    def unread(self) -> list[str]:
        """Values of the JSON that were neither used nor compared, but for where the case comes from and prose."""
        paths = self.config.paths() if isinstance(self.config, Watched) else ()
        return [path for path in paths if path not in self.read and not _TOLD.fullmatch(path)]

    @property
    def passed(self) -> bool:
        """Whether everything compared agrees and something was."""
        return bool(self.compared) and not self.problems


def _same(found: Any, stated: Any) -> bool:
    if isinstance(found, (list, tuple)) and isinstance(stated, (list, tuple)):
        if all(isinstance(one, str) for one in (*found, *stated)):
            return sorted(found) == sorted(stated)  # names, in any order
        return len(found) == len(stated) and all(map(_same, found, stated))
    if isinstance(found, float) and isinstance(stated, (int, float)):
        return abs(found - stated) <= TOLERANCE * max(abs(stated), 1e-12)
    return bool(found == stated)


def load_case(path: Path) -> Case:
    """Read ``NAME.json`` and, if it is there, ``NAME.safetensors``."""
    config = json.loads(path.read_text("utf-8"))
    weights = path.with_suffix(".safetensors")
    tensors = load_file(weights) if weights.is_file() else {}
    if not tensors and config.get("tensors"):
        raise UnsupportedError(f"{weights.name} is missing")
    case = Case(path.stem, config, tensors)
    check_listed(case)
    return case


def _stated_shape(said: Any) -> list[int] | None:
    """The shape among what a JSON says of a tensor, a list or a mapping."""
    if isinstance(said, dict):
        return said["shape"]
    return next((part for part in said if isinstance(part, list)), None)


def check_listed(case: Case) -> None:
    """Compare what the JSON says of the tensors with the tensors: one that got lost would be compared by nobody."""
    listed = case.config.get("tensors")
    case.check_stated("n_param_tensors", case.config, {"n_param_tensors": len(case.params())})
    if isinstance(listed, dict):
        stated = {key: _stated_shape(said) for key, said in listed.items()}
        found = {key: list(value.shape) for key, value in case.tensors.items()}
        lost = sorted(key for key, shape in stated.items() if found.get(key) != shape)
        case.problems += [f"{key}: the JSON lists it with the shape {stated[key]}, and it is not there" for key in lost]
    elif listed is not None and listed != len(case.tensors):
        case.problems.append(f"there are {len(case.tensors)} tensors and not {listed}")
