"""Two opinions on a region, the generator's and CLIP's, made one.

A^p is what the generator says of its own regions, good on classes it was trained on; A^c what CLIP says, good on all
others. Both are probabilities; they are joined by a geometric mean whose weight depends on whether a class was seen.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Rule = Literal["geometric", "zegformer", "zegformer-all", "paper", "proposal", "region"]


class EnsembleOptions(BaseModel):
    """How the two scores of a region become one.

    With w the weight, for seen and for unseen classes:

    ============== ============================ ======================== =====================================
    rule           seen                         unseen                   used by
    ============== ============================ ======================== =====================================
    geometric      A^p ^ w * A^c ^ (1-w)        A^p ^ (1-w) * A^c ^ w    ZSSeg, FreeSeg, MAFT, as released
    zegformer      A^p ^ w * mean ^ (1-w)       A^p ^ (1-w) * A^c ^ w    ZegFormer; mean is A^c over the seen
    zegformer-all  A^p ^ (1-w) * A^c ^ w        the same                 ZegFormer where no class was seen
    paper          A^p ^ w * A^c ^ (1-w)        A^c ^ w                  MAFT, Eq. 9
    proposal       A^p                          A^p                      no CLIP
    region         A^c                          A^c                      no ensemble: MAFT's final model
    ============== ============================ ======================== =====================================

    Attributes:
        rule: the row of the table.
        weight: w. 0 is the rule "region", as in the released code, and not the limit of the formula.
        empty: what is said of a region that had no sub-image, where both opinions are joined: "one" gives it A^c = 1
            for every class, as the released code does; "drop" lets it take no part. The rule "paper" takes what mask
            attention says of such a region as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rule: Rule = "geometric"
    weight: Annotated[float, Field(le=1)] = 0.8
    empty: Literal["one", "drop"] = "one"


def class_probabilities(logits: Tensor, *, drop_first: bool = False) -> Tensor:
    """Softmax over K = C + 1 logits, the last of which is "no object", which is dropped: (..., K) to (..., C).

    Args:
        logits: (..., K).
        drop_first: drop the column before the softmax (CLIP's scores) and not after it (the generator's, whose rows
            then sum to less than 1).
    """
    return logits[..., :-1].softmax(dim=-1) if drop_first else logits.softmax(dim=-1)[..., :-1]


def ensemble(
    proposal: Tensor | None,
    region: Tensor | None,
    options: EnsembleOptions,
    *,
    seen: Tensor | None = None,
    shown: Tensor | None = None,
) -> Tensor:
    """Join the scores of regions.

    Args:
        proposal: A^p (B, N, C), probabilities; None where the generator knows no classes.
        region: A^c (B, N, C), probabilities; None where no region classifier runs.
        options: see `EnsembleOptions`. With one of the two missing the other decides alone.
        seen: (C,) bool; None treats every class as unseen.
        shown: (B, N) bool, False where CLIP was shown nothing of a region; None: it saw all of them.

    Returns:
        (B, N, C), not normalised: no logarithm is taken, nothing is divided.

    Raises:
        ValueError: both are missing.
    """
    if proposal is None and region is None:
        raise ValueError("there is neither a proposal's nor a region's score to make an ensemble of")
    if region is None or (options.rule == "proposal" and proposal is not None):
        if proposal is None:
            raise ValueError("there is no proposal's score")
        return proposal
    present = None if shown is None else shown[..., None].to(region.dtype)
    if proposal is None or options.rule == "region" or options.weight <= 0:
        return region if present is None else region * present
    if present is not None:
        region = region * present + (1 - present) if options.empty == "one" else region * present
    weight = options.weight
    unseen_scores = proposal ** (1 - weight) * region**weight
    if options.rule == "zegformer-all":
        return unseen_scores
    if seen is None or not bool(seen.any()):
        return region**weight if options.rule == "paper" else unseen_scores
    if options.rule == "zegformer":
        average = region[..., seen].mean(dim=-1, keepdim=True)
        seen_scores = proposal**weight * average ** (1 - weight)
    else:
        seen_scores = proposal**weight * region ** (1 - weight)
        if options.rule == "paper":
            unseen_scores = region**weight
    return torch.where(seen, seen_scores, unseen_scores)
