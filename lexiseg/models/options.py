"""What options of systems are: immutable pydantic models, whose mistakes are one sentence."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lexiseg.windows import WindowPolicy

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

    def window(self) -> WindowPolicy:
        """How the system is run over a picture by default."""
        return WindowPolicy()

    def prompt_places(self) -> dict[str, int] | None:
        """How many vectors the learned text prompts have: "prefix", "suffix" and "task"; None without such prompts."""
        return None

    def changes_to_init(self, wanted: ModelOptions, given: dict[str, Any], name: str) -> dict[str, Any]:
        """What a training must change of these options so that a model of the ``wanted`` ones can start from its own.

        Args:
            wanted: options of the model to come.
            given: these options as they were written.
            name: of the recipe they are of, for the message.

        Raises:
            LexisegError: nothing helps.
        """
        return {}


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

    def window(self) -> WindowPolicy:
        """How the system is run over a picture by default."""
        stride = self.window_stride or self.window_size or 0
        return WindowPolicy(self.window_size, stride, self.short_side, getattr(self, "long_side", None))
