"""How a decoupled system starts from a trained model of another one: it takes the parts that both have alike."""

from __future__ import annotations

from typing import Any

from torch import nn

from lexiseg.clip.load import shapes_of
from lexiseg.errors import LexisegError
from lexiseg.models.base import SegmentationModel
from lexiseg.models.options import ModelOptions, WindowOptions
from lexiseg.proposals.base import ProposalGenerator
from lexiseg.proposals.options import GeneratorOptions, MaskFormerOptions, QueryOptions

NO_WEIGHTS = {"dropout", "frozen_dropout"}
"""Options of a generator that its weights do not depend on."""


class DecoupledInitOptions(WindowOptions):
    """Options of systems whose proposals can come from another system's model.

    Attributes:
        proposals: which generator proposes the regions, and how it is built.
    """

    proposals: GeneratorOptions = MaskFormerOptions()

    def changes_to_init(self, wanted: ModelOptions, given: dict[str, Any], name: str) -> dict[str, Any]:
        """How the proposals are built, as the model to come has them; see `ModelOptions.changes_to_init`."""
        own, theirs = self.proposals, wanted.proposals if isinstance(wanted, DecoupledInitOptions) else None
        # SAM is not trained, so whoever has it takes no proposals over, and only the rest has to fit.
        if not isinstance(own, QueryOptions) or not isinstance(theirs, QueryOptions):
            return {}
        before, after = own.model_dump(mode="json"), theirs.model_dump(mode="json")
        if before["kind"] != after["kind"]:
            raise LexisegError(
                f"'{name}' trains proposals of the kind '{before['kind']}', and the recipe's are of the kind "
                f"'{after['kind']}'; give both the same."
            )
        changes = {key: after[key] for key in after if key not in NO_WEIGHTS and before[key] != after[key]}
        said = given.get("proposals") or {"kind": after["kind"]}
        return {"proposals": {**said, **changes}} if changes else {}


class DecoupledInit(SegmentationModel):
    """A system of proposals and other parts, each of which can come from another system's model.

    Attributes:
        generator: proposes regions.
        no_object: (1, D), which goes with the proposals.
    """

    family = "decoupled"
    generator: ProposalGenerator
    no_object: nn.Parameter

    def init_from(self, other: SegmentationModel, what: str) -> tuple[str, ...]:
        """All weights of the same form of the same system, else the parts that fit; see `SegmentationModel.init_from`.

        Proposals are taken where the generators are equal, so that one training of proposals serves all.
        """
        alike = other.system == self.system and shapes_of(other) == shapes_of(self)
        parts = self.take_parts(other, what) if isinstance(other, DecoupledInit) and not alike else ()
        return parts or super().init_from(other, what)

    def take_parts(self, other: DecoupledInit, what: str) -> tuple[str, ...]:
        """Copy the parts of ``other`` that fit, and name them; a `LexisegError` if it proposes regions differently."""
        parts: tuple[str, ...] = ()
        # SAM comes trained: there is nothing to take over, and the rest may still be of use.
        if any(True for _ in self.generator.parameters()):
            before, now = (
                one.options.model_dump(exclude={"proposals": NO_WEIGHTS})["proposals"] for one in (other, self)
            )
            if before != now:
                key = next(key for key in (*now, *before) if now.get(key) != before.get(key))
                raise LexisegError(
                    f"{what} has other proposals than the recipe: '{key}' is {before.get(key)} in the model and "
                    f"{now.get(key)} in the recipe; give both the same."
                )
            self.generator.load_state_dict(other.generator.state_dict())
            self.no_object.data.copy_(other.no_object.data)
            parts = ("proposals",)
        return (*parts, "prompts") if copied(other.learned_prompts, self.learned_prompts) else parts

    def check_start(self, *, proposals: bool, steps: int) -> None:
        """Refuse random proposals that are not trained, whose loss would fall for days and nothing be learned."""
        if not proposals and not self.generator.trainable and any(True for _ in self.generator.parameters()):
            raise LexisegError(
                f"This training of '{self.system}' builds on proposals that it does not train itself, and they have "
                "random weights; let 'initial' name a model or a recipe that trains them, as the packaged recipes with "
                "'maft' or 'deop' in their names do."
            )


def copied(source: nn.Module | None, target: nn.Module | None) -> bool:
    """Copy weights if both modules are there and of one form; whether that was so."""
    if source is None or target is None or shapes_of(source) != shapes_of(target):
        return False
    target.load_state_dict(source.state_dict())
    return True
