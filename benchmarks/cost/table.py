"""The cost table: parameters, multiply-adds and speed of every system at one size, beside what the papers print."""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.cost.case import CLASSES, SIDE, CostCase, Step
from benchmarks.cost.counting import Count, count
from benchmarks.cost.decoupled import DECOUPLED
from benchmarks.cost.one_stage import ONE_STAGE
from benchmarks.timing import alternate, machine
from lexiseg.errors import LexisegError
from lexiseg.models import SegmentationModel
from lexiseg.segmenter import Segmenter

CASES: tuple[type[CostCase], ...] = (*ONE_STAGE, *DECOUPLED)
_GIGA, _MEGA = 1e9, 1e6
SLOW = 10.0


@dataclass(frozen=True)
class CostRow:
    """One system.

    Attributes:
        system: its name.
        parameters_m: parameters in millions as the authors count them, dead weights included.
        trainable_m: of them trained.
        gmac: multiply-adds (1e9) of one prediction as lexiseg runs it, text embeddings cached, every matrix product,
            convolution and attention product counted.
        frames_per_s: predictions a second, from a picture in memory to its label map; None if not measured.
        live_parameters_m: parameters that lexiseg holds.
        live_trainable_m: of them trained.
        attention_gmac: the part of ``gmac`` inside fused attention products; None if nothing was run.
        paper_parameters_m: what the paper prints; None if nothing.
        paper_trainable_m: the same for the trained ones.
        paper_gmac: what the paper calls GFLOPs.
        paper_frames_per_s: on the paper's own machine.
        paper_source: which table of which paper.
        code_gmac: the authors' code counted in the paper's convention.
        code_parameters_m: parameters of the authors' modules.
        code_trainable_m: of them trained.
        convention_gmac: lexiseg's own count brought to that convention; None where there is no figure to explain.
        convention: how the paper's figure comes about.
        steps: the terms that ``convention_gmac`` is the sum of.
        further: other counts that ``convention`` names.
        timed: how often its speed was measured.
    """

    system: str
    parameters_m: float
    trainable_m: float
    gmac: float
    frames_per_s: float | None
    live_parameters_m: float
    live_trainable_m: float
    attention_gmac: float | None
    paper_parameters_m: float | None
    paper_trainable_m: float | None
    paper_gmac: float | None
    paper_frames_per_s: float | None
    paper_source: str
    code_gmac: float | None
    code_parameters_m: float | None
    code_trainable_m: float | None
    convention_gmac: float | None
    convention: str
    steps: tuple[Step, ...] = ()
    further: tuple[Step, ...] = ()
    timed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON holds it; multiply-adds of the steps in 1e9 as well."""
        row = asdict(self)
        for name, steps in (("steps", self.steps), ("further", self.further)):
            row[name] = [{"what": step.what, "gmac": round(step.macs / _GIGA, 4)} for step in steps]
        return row


@dataclass(frozen=True)
class SpeedRatio:
    """How two systems that a paper compares do in one run.

    Attributes:
        fast: the system that the paper calls faster.
        slow: what it compares it with.
        ratio: frames a second of the one over those of the other.
        claim: the paper's own words or figures.
    """

    fast: str
    slow: str
    ratio: float
    claim: str


_COMPARED = (
    ("zegclip", "zegformer", "ZegCLIP's paper: one stage is about 5 times as fast as two"),
    ("zegclip", "zsseg", "the same"),
    ("cascade-clip", "zegclip", "Cascade-CLIP's Table 12: 18.4 against 20.9 frames a second"),
    ("second-look", "zegclip", "lexiseg's own combination; half as fast is its limit"),
    ("deop", "zsseg", "DeOP's paper: 4 to 7 times"),
    ("zegformer+maft", "zegformer", "MAFT's Table 4a counts 21 times fewer operations in CLIP"),
    ("zsseg+maft", "zsseg", "the same"),
    ("freeseg+maft", "freeseg", "the same"),
)


def speed_ratios(rows: Sequence[CostRow]) -> list[SpeedRatio]:
    """The pairs that the papers compare, as far as both are among the rows and were timed."""
    frames = {row.system: row.frames_per_s for row in rows if row.frames_per_s}
    return [
        SpeedRatio(fast, slow, frames[fast] / frames[slow], claim)
        for fast, slow, claim in _COMPARED
        if fast in frames and slow in frames
    ]


@dataclass(frozen=True)
class CostTable:
    """The table and how it was made.

    Attributes:
        rows: one a system.
        side: of the picture in pixels.
        classes: how many.
        machine: what it was measured on.
        repeats: measurements of each system's speed; 0 if none. Those that take more than `SLOW` seconds have one.
    """

    rows: tuple[CostRow, ...]
    side: int
    classes: int
    machine: dict[str, Any] = field(default_factory=dict)
    repeats: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it."""
        return {
            "side": self.side,
            "classes": self.classes,
            "tower": "ViT-B/16, random weights",
            "repeats": self.repeats,
            "machine": self.machine,
            "rows": [row.to_dict() for row in self.rows],
            "speed_ratios": [asdict(ratio) for ratio in speed_ratios(self.rows)],
        }


def cost_systems() -> tuple[str, ...]:
    """Names of the rows there are."""
    return tuple(case.name for case in CASES)


def measure_cost(
    systems: Sequence[str] = (),
    *,
    side: int = SIDE,
    classes: int = CLASSES,
    speed: bool = True,
    repeats: int = 3,
    device: str = "cpu",
) -> CostTable:
    """Build each system at its paper's size with random weights, and measure it.

    Args:
        systems: names of the rows, see `cost_systems`; none means all.
        side: side of the picture in pixels.
        classes: number of classes.
        speed: measure the speed too. All systems are timed in turn, in one run.
        repeats: measurements of each; the median counts. A system whose first takes more than `SLOW` seconds is not
            measured again: what disturbs a run of a second hardly moves one of a minute.
        device: where to run.

    Raises:
        LexisegError: a system or a number is wrong.
    """
    cases = [_case(name) for name in dict.fromkeys(systems)] if systems else [case() for case in CASES]
    if side < 16 or classes < 1 or repeats < 1:
        raise LexisegError(
            f"A side of {side}, {classes} classes and {repeats} repeats cannot be measured; take a side of at least 16 "
            "pixels, one class and one repeat."
        )
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    words = [f"class {index}" for index in range(classes)]
    runs: dict[str, Callable[[], object]] = {}
    measured: list[tuple[CostCase, SegmentationModel, Count | None]] = []
    for case in cases:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = case.build(side).eval()
        segmenter = Segmenter(model, device=device, disk_cache=False)
        if not case.runs:
            measured.append((case, model, None))
            continue
        model.embed_text(segmenter.embedder, segmenter.vocabulary(words))  # from here on the words are remembered
        runs[case.name] = partial(segmenter.predict, picture, words)
        measured.append((case, model, count(runs[case.name], model)))
    seconds = _seconds(runs, repeats, device) if speed else {}
    rows = [_row(case, model, counted, seconds.get(case.name, [])) for case, model, counted in measured]
    return CostTable(tuple(rows), side, classes, machine(device), repeats if speed else 0)


def _seconds(runs: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    found = {name: [timing.wall for timing in timings] for name, timings in alternate(runs, 1, device, 0).items()}
    again = {name: run for name, run in runs.items() if found[name][0] <= SLOW}
    for name, timings in alternate(again, repeats - 1, device, 0).items():
        found[name] += [timing.wall for timing in timings]
    return found


def _case(name: str) -> CostCase:
    for case in CASES:
        if case.name == name:
            return case()
    near = difflib.get_close_matches(name, cost_systems(), n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(cost_systems())}."
    raise LexisegError(f"The cost table has no system '{name}'; {hint}")


def _row(case: CostCase, model: SegmentationModel, counted: Count | None, seconds: Sequence[float]) -> CostRow:
    parameters, trainable = case.authors_parameters(model)
    steps = tuple(case.steps(model))
    further = tuple(case.further(model))
    macs = counted.macs if counted else sum(step.macs for step in further)
    published = case.published
    return CostRow(
        system=case.name,
        parameters_m=parameters / _MEGA,
        trainable_m=trainable / _MEGA,
        gmac=macs / _GIGA,
        frames_per_s=1 / statistics.median(seconds) if seconds else None,
        live_parameters_m=model.num_parameters() / _MEGA,
        live_trainable_m=model.num_parameters(trainable=True) / _MEGA,
        attention_gmac=counted.attention / _GIGA if counted else None,
        paper_parameters_m=published.parameters_m,
        paper_trainable_m=published.trainable_m,
        paper_gmac=published.gmac,
        paper_frames_per_s=published.frames_per_s,
        paper_source=published.source,
        code_gmac=published.code_gmac,
        code_parameters_m=published.code_parameters_m,
        code_trainable_m=published.code_trainable_m,
        convention_gmac=sum(step.macs for step in steps) / _GIGA if steps else None,
        convention=case.convention,
        steps=steps,
        further=further,
        timed=len(seconds),
    )
