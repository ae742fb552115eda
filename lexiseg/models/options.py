"""Options of systems: immutable pydantic models, with one sentence for every mistake."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from lexiseg.strict import StrictModel
from lexiseg.windows import LONGEST_SIDE, WindowPolicy

Options = TypeVar("Options", bound="ModelOptions")
_Deviation = Annotated[float, Field(gt=0)]
Triple = tuple[float, float, float]
Deviations = tuple[_Deviation, _Deviation, _Deviation]
LossWeight = Annotated[float, Field(ge=0)]
Pixels = Annotated[int, Field(ge=1, le=LONGEST_SIDE)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class ModelOptions(StrictModel):
    """Options of a system: immutable; an unknown key, or a number that is not finite, is an error that names it.

    ``weights_depend_on`` names the options that a model and the one it is initialised from must have in common.
    """

    weights_depend_on: ClassVar[frozenset[str]] = frozenset()

    def window(self) -> WindowPolicy:
        """How the system is run over a picture by default."""
        return WindowPolicy()

    def prompt_places(self) -> dict[str, int] | None:
        """How many vectors the learned text prompts have: "prefix", "suffix" and "task"; None without such prompts."""
        return None

    def with_values(self: Options, groups: Mapping[str, Mapping[str, Any]]) -> Options:
        """The same options but for single values of some of their groups, such as ``{"ensemble": {"rule": "region"}}``.

        They are validated as any options are.
        """
        changed = {key: getattr(self, key).model_dump() | dict(values) for key, values in groups.items()}
        return type(self).model_validate({**self.model_dump(), **changed})

    def changes_to_init(self, wanted: ModelOptions, given: dict[str, Any], name: str) -> dict[str, Any]:
        """What to change in these options so that the model they train can initialise one with the ``wanted`` options.

        Args:
            wanted: options of the model to be initialised.
            given: these options as they were written.
            name: of their recipe, for the message.

        Raises:
            LexisegError: no change makes it fit.
        """
        before, after = self.model_dump(mode="json"), wanted.model_dump(mode="json")
        names = sorted(self.weights_depend_on & wanted.weights_depend_on)
        return {name: after[name] for name in names if before[name] != after[name]}


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
                f"a window_stride of {self.window_stride} leaves gaps between windows of {self.window_size}; use 1 to "
                f"{self.window_size}"
            )
        return self

    def window(self) -> WindowPolicy:
        """Those of `WindowPolicy`'s fields that a system has options of the same name for are its options."""
        stride = self.window_stride or self.window_size or 0
        limits = () if self.short_side is None else ("long_side",)  # alone it limits nothing
        named = (*limits, "antialias", "canvas", "whole")
        more = {name: getattr(self, name) for name in named if name in type(self).model_fields}
        return WindowPolicy(self.window_size, stride, self.short_side, **more)


_SPAN = r"\s*(\d{1,3})\s*(?:-\s*(\d{1,3})\s*)?"
_GROUP = rf"\s*\{{{_SPAN}(?:,{_SPAN})*\}}\s*"


def parse_groups(groups: str | Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    """Read groups of blocks, counted from 1: ``"{6-8},{9-11},{12}"``, ``"{6,8,11}"``, or lists of numbers.

    Raises:
        ValueError: it is not of that form, a group is empty, or the blocks of a group do not increase.
    """
    text = groups if isinstance(groups, str) else ",".join(f"{{{','.join(map(str, group))}}}" for group in groups)
    if not re.fullmatch(f"{_GROUP}(?:,{_GROUP})*", text):
        raise ValueError(f"'{text}' does not name groups of blocks; write them like {{6-8}},{{9-11}},{{12}}")
    found = []
    for part in re.findall(r"\{[^}]*\}", text):
        spans = [(int(first), int(last or first)) for first, last in re.findall(_SPAN, part)]
        group = tuple(block for first, last in spans for block in range(first, last + 1))
        if any(last < first for first, last in spans) or group[0] < 1 or any(b <= a for a, b in pairwise(group)):
            raise ValueError(f"the group {part} must hold increasing block numbers, counted from 1")
        found.append(group)
    return tuple(found)


def format_groups(groups: Iterable[tuple[int, ...]]) -> str:
    """Write groups as `parse_groups` reads them, with spans for consecutive blocks."""

    def write(group: tuple[int, ...]) -> str:
        if len(group) > 1 and group[-1] - group[0] == len(group) - 1:
            return f"{{{group[0]}-{group[-1]}}}"
        return "{" + ",".join(str(block) for block in group) + "}"

    return ",".join(write(group) for group in groups)


def _plain_groups(value: Any) -> Any:
    return format_groups(parse_groups(value)) if isinstance(value, str | list | tuple) else value


BlockGroups = Annotated[str, BeforeValidator(_plain_groups)]
"""Groups of a tower's blocks as `format_groups` writes them; also read from anything else `parse_groups` takes."""
