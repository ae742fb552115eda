"""How much of a thing half of it shows: what is left of the class's probability after training on halves.

    python -m benchmarks.half_masks             # half an hour on one core; writes docs/results/half-masks.json
    python -m benchmarks.half_masks --steps 2   # seconds, and writes nothing: checks that it runs

The gate of `benchmarks.gates` asks that half a mask keeps 0.9 of the exact one's. Look-alikes differ in some of their
parts, and this shows how close a training on masks comes: CLIP's image tower and a vector for each name learn from the
masks of the seen classes, exact ones and halves, which the CLIP of the package never does, and nothing of it is stored.
It is no strict limit; more steps would come a little further.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gates import RESULTS, SIZE, mask_crops, mask_probabilities, text_of
from benchmarks.timing import machine
from lexiseg.clip.load import load_clip
from lexiseg.data.picture_world import PictureWorld, find_world
from lexiseg.files import write_json
from lexiseg.training.contrastive import drop_patches

STEPS, SCENES, BATCH, RATE, EVERY = 700, 3000, 96, 5e-4, 175
KEPT = 0.3  # of the patches in training (FLIP, CVPR 2023); twice as many in the last seventh of the steps


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    clip, world = load_clip("clip-world2"), find_world("picture-world-2")
    seen = {world.class_ids[name] for name in world.things if name not in world.unseen}
    small = options.steps < STEPS
    val = PictureWorld("val", world=world, size=SIZE, length=4 if small else 200)
    scenes = list(PictureWorld("train", world=world, size=SIZE, length=40 if small else SCENES))
    with torch.no_grad():
        names = (clip.model.logit_scale.exp() * text_of(clip, world)).requires_grad_()
    parameters = [*clip.visual.requires_grad_().parameters(), names]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, options.steps + 1, pct_start=0.05, anneal_strategy="linear", cycle_momentum=False
    )
    tower, rng, rows = clip.image_tower, torch.Generator().manual_seed(options.seed), []
    for step in range(options.steps + 1):
        if step % EVERY == 0 or step == options.steps:
            with torch.no_grad():
                exact, half = mask_probabilities(clip, val, options.seed, names, seen)[:, 0].tolist()
            rows.append({"steps": step, "half_over_exact": round(half / exact, 3)})
            print(rows[-1], flush=True)
        crops, classes = [], []
        while len(classes) < BATCH:
            sample = scenes[int(torch.randint(len(scenes), ()))]
            found, both = mask_crops(clip, sample.image, sample.label, seen, rng)
            halves = torch.rand(len(found)) < 0.6
            crops.append(torch.where(halves[:, None, None, None], both[1], both[0]))
            classes += found
        pictures = torch.cat(crops)
        mirrored = torch.rand(len(pictures)) < 0.5
        tokens, grid = tower.embed(torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures))
        kept = KEPT * (1 if step < options.steps * 6 / 7 else 2)
        tokens = tower.run(drop_patches(tokens, 1 - kept), grid).tokens[:, :1]
        vectors = F.normalize(tower.project(tokens)[:, 0], dim=-1)
        optimizer.zero_grad()
        F.cross_entropy(vectors @ names.T, torch.tensor(classes)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    if not small:
        card: dict[str, Any] = {"machine": machine("cpu"), "seed": options.seed, "scenes": len(val)}
        command = "python -m benchmarks.half_masks"
        print("wrote", write_json(RESULTS / "half-masks.json", {**card, "command": command, "rows": rows}))


if __name__ == "__main__":
    main()
