"""Classifying proposals: mask attention in one run, against the bare image tower and against a crop for each proposal.

"tower" is CLIP's image tower on the whole picture, with no proposals. "mask attention" classifies all proposals in one
run of it (MAFT's IP-CLIP encoder): the picture's embedding for each of them, ready to be compared with words. "crops"
runs the tower on a square of 224 pixels for each proposal, without counting the cutting of the crops. The goals are at
most 1.6 towers for mask attention, and crops at least 5 times as slow as mask attention.
"""

from __future__ import annotations

import torch

from benchmarks.measure import VIT_B_16, alternate, parser, report, set_up, summary
from lexiseg.clip.embeddings import image_embeddings
from lexiseg.clip.model import build_clip
from lexiseg.models.maft import region_embeddings

GOAL = 1.6
CROPS_GOAL = 5.0
TOWER = "tower"
CROP_SIDE = 224


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--side", type=int, default=480, help="side of the picture in pixels")
    arguments.add_argument("--proposals", type=int, default=100, help="proposals in the picture")
    arguments.add_argument("--start-block", type=int, default=8, help="first block with masks")
    arguments.add_argument("--crop-batch", type=int, default=10, help="crops run at once")
    options = arguments.parse_args()
    set_up(options)
    visual = build_clip({"model_cfg": VIT_B_16}).visual.eval().to(options.device)
    images = torch.randn(1, 3, options.side, options.side, device=options.device)
    masks = torch.rand(1, options.proposals, options.side // 4, options.side // 4, device=options.device)
    crops = torch.randn(options.proposals, 3, CROP_SIDE, CROP_SIDE, device=options.device)

    @torch.inference_mode()
    def tower() -> None:
        image_embeddings(visual, images)

    @torch.inference_mode()
    def mask_attention() -> None:
        region_embeddings(visual, images, masks, start_block=options.start_block)

    @torch.inference_mode()
    def every_crop() -> None:
        for part in crops.split(options.crop_batch):
            image_embeddings(visual, part)

    candidates = {TOWER: tower, "mask attention": mask_attention, "crops": every_crop}
    rows = summary(alternate(candidates, options.repeats, options.device), TOWER)
    ratio, crop_ratio = (next(row["ratio"] for row in rows if row["what"] == what) for what in list(candidates)[1:])
    slower = crop_ratio / ratio
    report(
        "Proposals classified by mask attention and by crops",
        rows,
        options,
        model=f"ViT-B/16, random weights; masks from block {options.start_block} on",
        picture=f"{options.side} x {options.side}, {options.proposals} proposals",
        verdict=(
            f"mask attention {ratio:.3f} towers; the goal of {GOAL} is {'met' if ratio <= GOAL else 'missed'}; "
            f"crops {slower:.1f} x mask attention; the goal of {CROPS_GOAL:g} is "
            f"{'met' if slower >= CROPS_GOAL else 'missed'}"
        ),
    )


if __name__ == "__main__":
    main()
