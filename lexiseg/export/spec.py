"""``export.json``: what an exported model has besides its graphs, validated like any untrusted file."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lexiseg.checking import Policy, check
from lexiseg.errors import LexisegError
from lexiseg.files import read_json
from lexiseg.strict import StrictModel
from lexiseg.windows import LONGEST_SIDE
from lexiseg.words import describe

FILE = "export.json"
FORMAT = 1

Side = Annotated[int, Field(ge=1, le=LONGEST_SIDE)]
Size = tuple[Side, Side]
Deviation = Annotated[float, Field(gt=0)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,100}$")]


class Fit(StrictModel):
    """How a window is brought to a size that the graph takes."""

    kind: Literal["resize", "crop", "pad"]
    unit: Side  # sides become multiples of this
    size: Size | None = None  # resize: always to this size

    def to(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size that a window becomes; at least two units per side, which is the least that a graph takes."""
        if self.size is not None:
            return self.size
        if self.kind == "pad":
            height, width = (-(-side // self.unit) * self.unit for side in size)
        elif self.kind == "crop" and min(size) >= 2 * self.unit:
            height, width = (side - side % self.unit for side in size)
        else:
            height, width = (max(round(side / self.unit), 2) * self.unit for side in size)
        return height, width


class Decode(StrictModel):
    """How a grid becomes scores, see `lexiseg.scores.GridScores`."""

    resize_to: Literal["window", "frame", "none"]  # first to the window, the padded window, or not
    square_side: Side | None = None  # of square windows to this side instead
    sigmoid: bool
    seen_offset: float = 0.0  # taken off the score of words that had masks in training

    def frame(self, fit: Fit, window: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int]]:
        """The size that a window's grid is brought to first, None for its own, and the window's place in that."""
        if self.resize_to == "none":
            return None, (0, 0)
        if self.resize_to == "frame":
            height, width = fit.to(window)
            return (height, width), ((height - window[0]) // 2, (width - window[1]) // 2)
        side = self.square_side
        return (window if side is None or window[0] != window[1] else (side, side)), (0, 0)


class Text(StrictModel):
    """The text tower, its tokenizer, and how words go through them."""

    graph: FileName
    tokenizer: FileName
    context_length: Annotated[int, Field(ge=3, le=65536)]  # tokens
    templates: Annotated[tuple[str, ...], Field(min_length=1)]
    separate_templates: bool = False  # one vector per template, not their mean
    first_of_name: bool = False  # of a name with ", " in it only what stands before it


class ExportSpec(StrictModel):
    """The whole file. Names of files are in its folder."""

    format: Literal[1]
    lexiseg: str
    kind: Literal["onnx", "openvino", "torch"]
    precision: Literal["fp32", "fp16", "int8"]
    compiled: bool = False  # torch: by AOTInductor
    system: str
    name: str  # of the towers
    trained_on: str | None = None  # see `lexiseg.clip.model.CLIP.trained_on`
    options: dict[str, Any]
    parameters: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # of the weights
    mean: tuple[float, float, float]
    std: tuple[Deviation, Deviation, Deviation]
    graphs: Annotated[tuple[FileName, ...], Field(min_length=1)]  # one a size, or one for all
    sizes: tuple[Size, ...] = ()  # of the graphs; empty: any
    fit: Fit
    window: Policy  # how the model is run over a picture by default
    decode: Decode
    text: Text
    seen_names: tuple[str, ...] = ()
    max_words: Side | None = None

    @model_validator(mode="after")
    def _check_graphs(self) -> ExportSpec:
        if len(self.graphs) != max(len(self.sizes), 1):
            raise ValueError(f"{len(self.graphs)} graphs are named for {len(self.sizes)} sizes")
        if self.fit.kind != "resize" and self.fit.size is not None:
            raise ValueError(f"'fit.size' belongs to a 'fit' of the kind 'resize', not '{self.fit.kind}'")
        if self.fit.kind != "pad" and self.decode.resize_to == "frame":
            raise ValueError(f"'decode.resize_to' is 'frame', which a 'fit' of the kind '{self.fit.kind}' has not")
        return self


def is_export(name: object) -> bool:
    """Whether a name is that of a folder of an exported model."""
    with suppress(OSError, ValueError, RuntimeError):  # names that no path can have
        return isinstance(name, str | Path) and (Path(name).expanduser() / FILE).is_file()
    return False


def read_spec(folder: Path) -> ExportSpec:
    """Read the description of an exported model. Raises LexisegError if it is damaged or of another version."""
    path = folder / FILE
    values = read_json(path, "export the model again")
    if values.get("format") != FORMAT:
        found = describe(values.get("format"))
        raise LexisegError(f"'{path}' has format {found} and this lexiseg reads {FORMAT}; export the model again.")
    spec = check(ExportSpec, values, f"'{path}'")
    for file in (*spec.graphs, spec.text.graph, spec.text.tokenizer):
        if not (folder / file).is_file():
            raise LexisegError(f"The exported model '{folder}' has no {file}; copy the whole folder again.")
    return spec
