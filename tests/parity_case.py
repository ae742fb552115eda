"""A golden case: its tensors, what was compared, and what was not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
TIE = 1e-5


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
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    compared: list[tuple[str, float, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)

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
        if expected.numel() == 1 == actual.numel():
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

    def skip(self, name: str, reason: str) -> None:
        """Say that ``expected/name`` is not compared, and why."""
        if self.has(name):
            self.touched.add(f"expected/{name}")
            self.skipped[name] = reason

    @property
    def passed(self) -> bool:
        """Whether everything compared agrees and something was."""
        return bool(self.compared) and not self.problems


def load_case(path: Path) -> Case:
    """Read ``NAME.json`` and, if it is there, ``NAME.safetensors``."""
    config = json.loads(path.read_text("utf-8"))
    weights = path.with_suffix(".safetensors")
    tensors = load_file(weights) if weights.is_file() else {}
    if not tensors and config.get("tensors"):
        raise UnsupportedError(f"{weights.name} is missing")
    return Case(path.stem, config, tensors)
