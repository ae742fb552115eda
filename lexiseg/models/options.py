"""What options of systems are: immutable pydantic models, whose mistakes are one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lexiseg.errors import LexisegError

_Deviation = Annotated[float, Field(gt=0)]
Triple = tuple[float, float, float]
Deviations = tuple[_Deviation, _Deviation, _Deviation]
LossWeight = Annotated[float, Field(ge=0)]
Pixels = Annotated[int, Field(ge=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class ModelOptions(BaseModel):
    """Options of a system: immutable; an unknown key, or a number that is not finite, is an error that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WindowOptions(ModelOptions):
    """Options of a system that say how it is run over a picture.

    Attributes:
        window_size: side of the sliding window at prediction; None runs whole pictures.
        window_stride: its stride; 0 is the window's side.
        short_side: the length pictures' shorter side is resized to at prediction; None keeps it.
    """

    window_size: Pixels | None = None
    window_stride: Annotated[int, Field(ge=0)] = 0
    short_side: Pixels | None = None

    @model_validator(mode="after")
    def _check_stride(self) -> WindowOptions:
        if self.window_size is not None and self.window_stride > self.window_size:
            raise ValueError(
                f"a window_stride of {self.window_stride} leaves pixels between windows of {self.window_size} out; use "
                f"1 to {self.window_size}"
            )
        return self


_Options = TypeVar("_Options", bound=ModelOptions)


def parse_options(system: str, options_class: type[_Options], options: dict[str, Any]) -> _Options:
    """Check options given as a plain dict.

    Args:
        system: what the sentence calls the system.
        options_class: of its options.
        options: by name.

    Raises:
        LexisegError: an option is unknown or has a wrong value; the sentence names it.
    """
    try:
        return options_class(**options)
    except ValidationError as error:
        problems = error.errors()
        # Of a value that may have several forms each form complains; the one that got furthest is what was meant.
        same = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
        first = max(same, key=lambda problem: len(_as_written(problem["loc"], options)))
        name = ".".join(_as_written(first["loc"], options))
        if first["type"] == "extra_forbidden":
            known = ", ".join(options_class.model_fields)
            raise LexisegError(f"{system} has no option '{name}'; it knows {known}.") from error
        message = first["msg"].removeprefix("Value error, ")
        if not name:  # a check of several options together, which its own sentence names
            raise LexisegError(f"The options of {system} do not fit each other: {message}.") from error
        raise LexisegError(f"The option '{name}' of {system} is wrong: {message}.") from error


def _as_written(loc: Sequence[str | int], options: object) -> list[str]:
    """The keys of a location of pydantic that are there in the options, without its names of a union's members."""
    written: list[str] = []
    for part in loc:
        if isinstance(options, Mapping) and part in options:
            options = options[part]
        elif isinstance(options, list | tuple) and isinstance(part, int):
            options = options[part] if part < len(options) else None
        else:
            continue
        written.append(str(part))
    return written
