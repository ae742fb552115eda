"""Options of ZSSeg, ZegFormer and FreeSeg: how regions are shown to CLIP, and whose opinion counts how much."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lexiseg.clip.positions import Interpolation
from lexiseg.losses.proposals import ProposalWeights
from lexiseg.models.decoupled import DecoupledOptions
from lexiseg.models.maft import MaftOptions
from lexiseg.regions.crops import CropOptions
from lexiseg.regions.ensemble import EnsembleOptions
from lexiseg.regions.viewer import AttentionOptions

Regions = Literal["crops", "mask-attention", "pooled", "none"]


class PromptOptions(BaseModel):
    """Learned words around the class names (CoOp).

    Attributes:
        prefix: vectors in front of a name.
        suffix: vectors behind it.
        task: vectors behind the name of the task (FreeSeg); 0 leaves the task out.
        proposals: False leaves the generator's own scores to the templates: only CLIP's words are learned prompts
            (ZSSeg's separate adapter on VOC).
        frozen: keep the prompts as they are while the proposals are trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prefix: Annotated[int, Field(ge=0)] = 16
    suffix: Annotated[int, Field(ge=0)] = 0
    task: Annotated[int, Field(ge=0)] = 0
    proposals: bool = True
    frozen: bool = False


class RegionHostOptions(DecoupledOptions):
    """Options of ZSSeg, ZegFormer and FreeSeg.

    Attributes:
        regions: how a region is shown to CLIP: "crops" (one run a region), "mask-attention" (one run for all), "pooled"
            (the patches of one plain run whose last block keeps them apart, pooled by the mask) or "none" (the
            generator decides alone). None is "crops". With ``maft`` both become "mask-attention", which takes their
            place, and the last two are refused.
        crops: how crops are made.
        attention: how mask attention runs.
        positions: how CLIP's position table follows another size than it was trained at, where crops or patches are
            looked at.
        ensemble: how the generator's and CLIP's scores become one.
        region_temperature: factor on CLIP's cosines; None is ``temperature``, which is the generator's factor as well.
            (ZegFormer takes CLIP's own scale whatever this says.)
        seen_offset: subtracted from the scores of seen classes (ZegFormer: 0.1).
        prompts: learned prompts; None uses templates.
        maft: tune a copy of CLIP's image tower to masks; None leaves it out.
        stage: what training trains: "proposals" the generator with its class head, the no-object row and the prompts;
            "maft" the tower's copy. "auto" is "maft" where ``maft`` is given, else "proposals".
        criterion: weights of the losses of the stage "proposals".
        label_void: in self-training, label pixels without any label as well, as ZSSeg's released rule does.
    """

    regions: Regions | None = None
    crops: CropOptions = CropOptions()
    attention: AttentionOptions = AttentionOptions()
    positions: Interpolation = "bicubic"
    ensemble: EnsembleOptions = EnsembleOptions()
    region_temperature: Annotated[float, Field(gt=0)] | None = None
    seen_offset: Annotated[float, Field(ge=0)] = 0.0
    prompts: PromptOptions | None = None
    maft: MaftOptions | None = None
    stage: Literal["auto", "proposals", "maft"] = "auto"
    criterion: ProposalWeights = ProposalWeights()
    label_void: bool = False
