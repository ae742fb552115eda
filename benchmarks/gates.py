"""What a CLIP must show so that the papers' claims can be seen with it: is it like the CLIPs they were written for?

    python -m benchmarks.gates --clip clip-world2           # prints the gates and writes docs/results/gates.json
    python -m benchmarks.gates --clip RUN/model --no-pages  # only prints them

OpenAI's CLIP names whole pictures well and patches poorly; its last block has lost the place of things, which cutting
its mixing brings back in part; and it cares little how well a mask fits. Everything is measured on val scenes of
128 x 128 pixels, the size at which the systems run the tower.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import machine
from lexiseg.clip.embeddings import image_embeddings
from lexiseg.clip.load import load_clip
from lexiseg.clip.model import CLIP
from lexiseg.clip.tower import Attention, block_attention, run_block, token_values
from lexiseg.data.picture_world import PictureWorld, World, find_world
from lexiseg.files import write_json
from lexiseg.regions.crops import CropOptions, tight_crops
from lexiseg.training.contrastive import zero_shot_accuracy

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
SIZE = 128
SMALLEST = 0.02  # a region is judged where it covers this fraction of the picture


def value_path(attention: nn.MultiheadAttention, x: Tensor, context: Tensor | None = None) -> Tensor:
    """In the place of the mixing: each token keeps its own value (MaskCLIP, ECCV 2022)."""
    return attention.out_proj(token_values(attention, x))


def text_of(clip: CLIP, world: World) -> Tensor:
    """Unit vectors (C, D) of "a photo of a {name}" for every class of a world."""
    return F.normalize(clip.encode_text(clip.tokenize([f"a photo of a {name}" for name in world.classes])), dim=-1)


def normalised(clip: CLIP, image: Tensor) -> Tensor:
    """A picture (3, H, W) uint8 as the tower takes it, (1, 3, H, W)."""
    mean, std = torch.tensor(clip.mean)[:, None, None], torch.tensor(clip.std)[:, None, None]
    return ((image.float() / 255 - mean) / std)[None]


def patch_labels(label: Tensor, patch: int) -> Tensor:
    """The class (h, w) of each patch that lies inside one region, and 255 elsewhere."""
    cells = label.unfold(0, patch, patch).unfold(1, patch, patch).flatten(2)
    return torch.where((cells == cells[..., :1]).all(2), cells[..., 0], 255)


def patch_accuracy(
    clip: CLIP, dataset: PictureWorld, attention: Attention = block_attention, *, shortcut: bool = True
) -> dict[str, float]:
    """Percent of the patches inside regions to whose class CLIP compares them best.

    Of ``all`` patches, of those of ``things`` and of ``stuff``; ``present`` compares with the names of the classes in
    the picture alone. ``attention`` is what mixes in the last block; without its ``shortcut`` and its MLP a patch is
    what the mixing gives and nothing else (ClearCLIP, ECCV 2024).
    """
    tower, text = clip.image_tower, text_of(clip, dataset.world)
    last, block = tower.num_blocks - 1, clip.visual.transformer.resblocks[-1]
    split, counts = len(dataset.world.things), torch.zeros(2, 4)
    for sample in dataset:
        tokens, grid = tower.embed(normalised(clip, sample.image))
        tokens = tower.run(tokens, grid, stop=last).tokens
        if shortcut:
            tokens = run_block(block, tokens, attention=attention)
        else:
            tokens = attention(block.attn, block.ln_1(tokens), None)
        patches = tower.project(tokens[:, 1:])[0]
        truth = patch_labels(sample.label, clip.patch_size).flatten()
        patches, truth = patches[truth != 255], truth[truth != 255]
        similarity = F.normalize(patches, dim=-1) @ text.T
        correct, present = similarity.argmax(1) == truth, sample.label.unique()
        among = present[similarity[:, present].argmax(1)] == truth
        every = torch.ones_like(correct)
        kinds = ((correct, every), (correct, truth < split), (correct, truth >= split), (among, every))
        counts += torch.tensor([[int((right & kind).sum()), int(kind.sum())] for right, kind in kinds]).T
    return dict(zip(("all", "things", "stuff", "present"), (100 * counts[0] / counts[1]).tolist(), strict=True))


def half_of(mask: Tensor, rng: torch.Generator) -> Tensor:
    """The pixels (H, W) of a mask on one side of a line through its middle: left, right, upper or lower."""
    rows, columns = mask.nonzero().T
    place = columns if torch.rand((), generator=rng) < 0.5 else rows
    near = place <= place.median() if torch.rand((), generator=rng) < 0.5 else place > place.median()
    half = torch.zeros_like(mask)
    half[rows[near], columns[near]] = True
    return half


def mask_crops(
    clip: CLIP, image: Tensor, label: Tensor, things: Collection[int], rng: torch.Generator
) -> tuple[list[int], Tensor]:
    """Which ``things`` cover enough of a picture, and crops (2, N, 3, S, S) of their exact masks and of half of each.

    The crops are ZSSeg's: the box of the mask, with CLIP's mean colour outside the mask.
    """
    present, areas = label.unique(return_counts=True)
    classes = [int(c) for c in present[areas >= SMALLEST * label.numel()] if int(c) in things]
    if not classes:
        return [], torch.zeros(2, 0, 3, clip.image_size, clip.image_size)
    exact = [label == c for c in classes]
    masks = torch.stack(exact + [half_of(mask, rng) for mask in exact]).float()
    black = -torch.tensor(clip.mean) / torch.tensor(clip.std)
    crops = tight_crops(normalised(clip, image)[0], [masks], CropOptions(), size=clip.image_size, black=black)
    return classes, crops.images.unflatten(0, (2, -1))


def mask_probabilities(
    clip: CLIP, dataset: PictureWorld, seed: int, text: Tensor | None = None, things: Collection[int] | None = None
) -> Tensor:
    """Sums (2, 2) over things of their class's probability, by the crop of an exact mask and by that of half of it.

    Columns: among all names of the world, and among those of the picture's things. ``text`` (C, D) is multiplied with
    the crops' unit vectors, by default that of CLIP by its scale; ``things`` are those that count, by default all.
    """
    if text is None:
        text = clip.model.logit_scale.exp().clamp(max=100) * text_of(clip, dataset.world)
    things, rng = things or range(len(dataset.world.things)), torch.Generator().manual_seed(seed)
    sums = torch.zeros(2, 2)
    for sample in dataset:
        classes, crops = mask_crops(clip, sample.image, sample.label, things, rng)
        if not classes:
            continue
        image = F.normalize(image_embeddings(clip.visual, crops.flatten(0, 1)), dim=-1)
        logits = (image @ text.T).view(2, len(classes), -1)
        sums[:, 0] += logits.softmax(2)[:, range(len(classes)), classes].sum(1)
        sums[:, 1] += logits[..., classes].softmax(2).diagonal(dim1=1, dim2=2).sum(1)
    return sums


def separation(clip: CLIP, dataset: PictureWorld) -> list[float]:
    """For each block, how often two neighbouring patches of one region are more alike than two of different ones.

    The area under the ROC curve of the cosine of neighbours, in percent; 50 is chance.
    """
    tower = clip.image_tower
    cosines: list[list[Tensor]] = [[] for _ in range(tower.num_blocks)]
    same = []
    for sample in dataset:
        tokens, grid = tower.embed(normalised(clip, sample.image))
        levels = tower.run(tokens, grid, levels=range(tower.num_blocks)).levels
        truth = patch_labels(sample.label, clip.patch_size)
        pairs = ((truth[:, :-1], truth[:, 1:]), (truth[:-1], truth[1:]))
        known = [(a != 255) & (b != 255) for a, b in pairs]
        same += [(a == b)[k] for (a, b), k in zip(pairs, known, strict=True)]
        for index, kept in enumerate(cosines):
            patches = F.normalize(levels[index][0, 1:], dim=-1).view(*grid, -1)
            kept.append((patches[:, :-1] * patches[:, 1:]).sum(-1)[known[0]])
            kept.append((patches[:-1] * patches[1:]).sum(-1)[known[1]])
    alike = torch.cat(same)
    return [auc(torch.cat(kept), alike) for kept in cosines]


def auc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve in percent, of scores (N,) and which of them belong to positives, without ties."""
    ranks = score.argsort().argsort().double() + 1
    yes, no = int(positive.sum()), int((~positive).sum())
    return float(100 * (ranks[positive].sum() - yes * (yes + 1) / 2) / (yes * no))


@torch.no_grad()
def measure(clip: CLIP, world: World, limit: int, seed: int) -> dict[str, Any]:
    """All gates of a CLIP: rows of ``gate``, ``value``, ``wanted`` and ``ok``, and what they were made from."""
    dataset = PictureWorld("val", world=world, size=SIZE, length=limit)
    top1, top5 = zero_shot_accuracy(clip, world=world, num_rounds=3, size=SIZE)
    plain, value = patch_accuracy(clip, dataset), patch_accuracy(clip, dataset, value_path)
    alone = patch_accuracy(clip, dataset, value_path, shortcut=False)
    exact, half = mask_probabilities(clip, dataset, seed)
    kept, kept_present = (half / exact).tolist()
    blocks = separation(clip, dataset)
    gain, third = value["all"] - plain["all"], len(blocks) // 3
    middle = max(blocks[third : 2 * third + 1])
    rows = [
        ("top-1 of pictures of single things (%)", 100 * top1, "above 80", 100 * top1 > 80),
        ("patches inside regions, the last values alone (%)", alone["all"], "40 to 65", 40 <= alone["all"] <= 65),
        ("value path above plain (points)", gain, "at least 5", gain >= 5),
        ("probability by half a mask over that by the exact one", kept, "above 0.9", kept > 0.9),
        ("neighbours told apart, best middle block above the last (points)", middle - blocks[-1], "above 0",
         middle > blocks[-1]),
    ]  # fmt: skip
    return {
        "rows": [
            {"gate": gate, "value": round(number, 2), "wanted": wanted, "ok": bool(ok)}
            for gate, number, wanted, ok in rows
        ],
        "top5": round(100 * top5, 2),
        "half_mask_present": round(kept_present, 2),
        "patches_value_path": {key: round(number, 2) for key, number in value.items()},
        "patches_value_alone": {key: round(number, 2) for key, number in alone.items()},
        "patches_plain": {key: round(number, 2) for key, number in plain.items()},
        "neighbours_by_block": [round(number, 2) for number in blocks],
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", default="clip-world2", help="name or folder of a CLIP")
    parser.add_argument("--world", default="picture-world-2", help="the world whose val scenes are used")
    parser.add_argument("--limit", type=int, default=200, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the halves of the masks")
    parser.add_argument("--no-pages", action="store_true", help="do not write docs/results")
    options = parser.parse_args()
    result = measure(load_clip(options.clip), find_world(options.world), options.limit, options.seed)
    for row in result["rows"]:
        print(f"{'ok  ' if row['ok'] else 'MISS'} {row['gate']}: {row['value']} (wanted: {row['wanted']})")
    print({key: value for key, value in result.items() if key != "rows"})
    if not options.no_pages:
        command = f"python -m benchmarks.gates --clip {options.clip}"
        card = {"machine": machine("cpu"), "seed": options.seed, "command": command, "scenes": options.limit}
        print("wrote", write_json(RESULTS / "gates.json", {**card, **result}))


if __name__ == "__main__":
    main()
