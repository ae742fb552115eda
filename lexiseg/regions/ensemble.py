"""Two opinions on a region, the generator's and CLIP's, made one.

A^p is what the generator says of its own regions, good on classes it was trained on; A^c what CLIP says, good on all
others. Both are probabilities; they are joined by a geometric mean whose weight depends on whether a class was seen.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lexiseg.strict import StrictModel


class EnsembleOptions(StrictModel):
    """How the two scores of a region become one.

    With w the weight, for seen and for unseen classes:

    ======== ======================== ======================== =======================================================
    rule     seen                     unseen                   what it is
    ======== ======================== ======================== =======================================================
    released A^p ^ w * A^c ^ (1-w)    A^p ^ (1-w) * A^c ^ w    the base models' code, what Eq. 9 of MAFT speaks of
    paper    A^p ^ w * A^c ^ (1-w)    A^c ^ w                  Eq. 9 of MAFT to the letter
    proposal A^p                      A^p                      no CLIP
    region   A^c                      A^c                      no ensemble: MAFT's Table 2 to 6, and its final model
    ======== ======================== ======================== =======================================================

    In ZegFormer's released form A^c of a seen class is its mean over all seen classes. ``docs/methods.md`` says what
    Eq. 9 can mean and what each reading costs.

    Attributes:
        rule: the row of the table.
        weight: w. 0 is the rule "region", as in the released code, and not the limit of the formula.
        empty: what is said of a region that CLIP saw nothing of, where both opinions are joined: "one" gives it A^c = 1
            for every class, as the released code does; "drop" lets it take no part. The rule "paper" takes what mask
            attention says of such a region as it is.
    """

    rule: Literal["released", "paper", "proposal", "region"] = "released"
    weight: Annotated[float, Field(le=1)] = 0.8
    empty: Literal["one", "drop"] = "one"


def ensemble(
    proposal: Tensor | None,
    region: Tensor | None,
    options: EnsembleOptions,
    *,
    seen: Tensor | None = None,
    encoded: Tensor | None = None,
    always: bool = False,
    seen_mean: bool = False,
) -> Tensor:
    """Combine the scores of regions.

    Args:
        proposal: A^p (B, N, C), probabilities; None where the generator knows no classes.
        region: A^c (B, N, C), probabilities; None where CLIP is not asked.
        options: see `EnsembleOptions`. With one of the two missing the other decides alone.
        seen: (C,) bool; None treats every class as unseen.
        encoded: (B, N) bool, False where CLIP saw nothing of a region; None: it saw all of them.
        always: CLIP says something of the others too (mask attention). MAFT's final model keeps it, and so does Eq. 9,
            where A^c = 1 for such regions would give every unseen class the largest score there is.
        seen_mean: with the rule "released", give each seen class the mean of A^c over the seen ones.

    Returns:
        (B, N, C), not normalised: no logarithm is taken, nothing is divided. Nothing to combine is a ValueError.
    """
    if proposal is not None and (region is None or options.rule == "proposal"):
        return proposal
    if region is None:
        raise ValueError("there are neither proposal nor region scores for an ensemble")
    alone = proposal is None or options.rule == "region" or options.weight <= 0
    if encoded is not None and not (always and (alone or options.rule == "paper")):
        present = encoded[..., None].to(region.dtype)
        region = region * present + (1 - present) if options.empty == "one" and not alone else region * present
    if proposal is None or alone:
        return region
    weight = options.weight
    unseen_scores = region**weight if options.rule == "paper" else proposal ** (1 - weight) * region**weight
    if seen is None or not bool(seen.any()):
        return unseen_scores
    if seen_mean and options.rule == "released":
        region = region[..., seen].mean(dim=-1, keepdim=True)
    return torch.where(seen, proposal**weight * region ** (1 - weight), unseen_scores)
