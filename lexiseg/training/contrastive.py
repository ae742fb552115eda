"""Training the tiny CLIPs of the picture worlds from captions alone.

A picture comes with one sentence that names what is visible in it, and nothing says where. Three terms share the text
tower, all of them contrasts between pictures and texts; a term of weight 0 is left out:

- *names*: the class token against every noun phrase of the world ("a photo of a cow"), with the phrases of the caption
  as positives, things and stuff apart (so that recognising the background is not enough);
- *captions*: CLIP's symmetric contrast between the pictures and the sentences of a batch (Radford et al., ICML 2021);
- *patches*: the token-wise contrast of FILIP (Yao et al., ICLR 2022) in a multiple-instance form: every patch belongs
  to some phrase of the caption, and every phrase of the caption to some patches.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lexiseg.clip.load import check_state, load_clip, shapes_of
from lexiseg.clip.model import CLIP, build_clip, save_clip
from lexiseg.clip.positions import resize_positions
from lexiseg.data.picture_world import FIRST, STUFF, World, find_world, render_scene
from lexiseg.data.picture_world.scene import Scene, caption
from lexiseg.errors import LexisegError
from lexiseg.normalisation import normalise
from lexiseg.recipes.schema import HELD_OUT_SEED, ContrastiveSettings, TrainSettings
from lexiseg.scores.base import NotFiniteError
from lexiseg.training.engine import Task

TEMPLATES = (
    "a photo of a {}",
    "a photo of a {}.",
    "a photo of the {}",
    "a picture of a {}",
    "there is a {}",
    "this is a photo of a {}.",
    "a {} in the scene.",
    "{}",
)


def _multi_positive(logits: Tensor, positives: Tensor) -> Tensor:
    """Cross entropy of (B, N) logits against the uniform distribution over each row's positives; empty rows count 0."""
    count = positives.sum(1)
    per_row = -(logits.log_softmax(1) * positives).sum(1) / count.clamp(min=1)
    return per_row.sum() / (count > 0).sum().clamp(min=1)


def patch_loss(logits: Tensor, positives: Tensor, coverage: float) -> Tensor:
    """Multiple-instance contrast between patches and phrases.

    Args:
        logits: (B, P, N) scaled similarities of patches and phrases.
        positives: (B, N) bool, the phrases of each picture's caption.
        coverage: the fraction of patches, in 0..1, from which on a phrase counts as found.

    Returns the mean over patches of -log p(some phrase of the caption | patch), plus the mean over the captions'
    phrases of -log(fraction of the patches / coverage) where that is positive.
    """
    log_probabilities = logits.log_softmax(2)
    inside = log_probabilities.masked_fill(~positives[:, None], float("-inf")).logsumexp(2)
    fraction = log_probabilities.exp().mean(1)
    missing = (-(fraction.clamp(min=1e-6) / coverage).log()).clamp(min=0) * positives
    return -inside.mean() + missing.sum() / positives.sum().clamp(min=1)


def drop_patches(tokens: Tensor, fraction: float) -> Tensor:
    """Leave out a fraction (0..1) of the patches of tokens (B, 1 + P, D), chosen anew for each picture (FLIP).

    The class token, the first, and at least one patch stay. Source: Li et al., CVPR 2023.
    """
    num_patches = tokens.shape[1] - 1
    keep = max(1, round(num_patches * (1 - fraction)))
    kept = torch.rand(len(tokens), num_patches, device=tokens.device).argsort(1)[:, :keep] + 1
    patches = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :1], patches], dim=1)


def crop_scene(
    scene: Scene, world: World, rng: np.random.Generator, areas: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a random resized crop of a scene, (S, S, 3) uint8, and the fraction of it that each class covers, (C,).

    Args:
        scene: a square scene of a world.
        world: the scene's.
        rng: what draws area, aspect ratio (3:4 to 4:3) and place.
        areas: smallest and largest area as a fraction of the scene's.
    """
    size = len(scene.label)
    area, ratio = rng.uniform(*areas), np.exp(rng.uniform(-1, 1) * np.log(4 / 3) / 2)
    height, width = (max(1, min(size, round(size * area**0.5 * factor))) for factor in (ratio, 1 / ratio))
    top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
    picture = Image.fromarray(scene.image).resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    counts = np.bincount(scene.label[top : top + height, left : left + width].ravel(), minlength=len(world.classes))
    return np.asarray(picture), counts / (height * width)


def incomplete_caption(
    rng: np.random.Generator, world: World, areas: np.ndarray, mentions: tuple[int, int], stuff_mentions: float
) -> tuple[str, list[int]]:
    """Return a sentence that names some of what is in a picture, and the ids of the classes it names.

    Args:
        rng: what chooses: a class that covers more is named more often.
        world: the picture's.
        areas: (C,) fractions of the picture that the classes cover.
        mentions: smallest and largest number of things named; fewer where fewer cover 3 % of the picture.
        stuff_mentions: how often stuff is named beside things; where there are none it always is.
    """
    split = len(world.things)
    things, stuff = np.flatnonzero(areas[:split] >= 0.03), split + np.flatnonzero(areas[split:] >= 0.1)
    largest = split + int(areas[split:].argmax())
    count = min(len(things), int(rng.integers(mentions[0], mentions[1] + 1)))
    named = [int(index) for index in _draw(rng, things, areas, count)]
    if not named or (len(stuff) and rng.random() < stuff_mentions):
        named += [int(index) for index in _draw(rng, stuff, areas, 1)] if len(stuff) else [largest]
    names = [world.classes[index] for index in named]
    return caption(rng, tuple(n for n in names if n not in STUFF), tuple(n for n in names if n in STUFF)), named


def _draw(rng: np.random.Generator, ids: np.ndarray, areas: np.ndarray, count: int) -> np.ndarray:
    weights = areas[ids] + 1e-9
    return rng.choice(ids, count, replace=False, p=weights / weights.sum()) if count else ids[:0]


def build_towers(settings: ContrastiveSettings) -> CLIP:
    """The CLIP of a recipe, with random weights. A `LexisegError` says what is wrong with its architecture."""
    clip = build_clip({"model_cfg": settings.model_cfg, "trained_on": settings.scenes.world}, name="clip-emoji")
    places, tokens = settings.model_cfg["text_cfg"].get("vocab_size"), clip.tokenizer.vocab_size
    if places is not None and places < tokens:
        raise LexisegError(
            f"'vocab_size' of the text_cfg is {places}, but its tokenizer has {tokens} tokens; set it so."
        )
    return clip


class ContrastiveTask(Task):
    """The contrastive training of a CLIP in the picture world.

    Args:
        settings: model, scenes and weights of the terms.
        train: the run's numbers; the batch size and the seed matter here.
    """

    divisible = False

    def __init__(self, settings: ContrastiveSettings, train: TrainSettings) -> None:
        torch.manual_seed(train.seed)
        self.settings, self.batch_size, self.seed = settings, train.batch_size, train.seed
        self.world = find_world(settings.scenes.world)
        self.clip = build_towers(settings)
        self.initial: str | None = None  # the fingerprint of the CLIP it starts from
        if settings.initial is not None:
            key, side = "visual.positional_embedding", self.clip.image_size // self.clip.patch_size
            clip = load_clip(settings.initial)
            self.initial, tensors = clip.fingerprint(), dict(clip.model.state_dict())
            if key in tensors:
                tensors[key] = resize_positions(tensors[key], (side, side))
            check_state(tensors, shapes_of(self.clip.model), f"The initial CLIP '{settings.initial}'")
            self.clip.model.load_state_dict(tensors)
        self.model = self.clip
        # One more than are in use, or the newest block would drop the one that this step asks for next.
        self._block = lru_cache(maxsize=settings.scenes.repeats * settings.scenes.lag + 1)(self._render_block)

    def _render_block(self, number: int) -> list[Scene]:
        """Return the scenes first shown at step ``number``."""
        scenes = self.settings.scenes
        count = -(-self.batch_size // scenes.repeats)
        first = (number + scenes.repeats * scenes.lag) * count
        how: dict[str, Any] = {"world": self.world, "num_things": scenes.num_things, "extents": scenes.extents}
        return [render_scene([scenes.seed, index], scenes.size, **how) for index in range(first, first + count)]

    def batch(self, index: int, rank: int = 0, processes: int = 1) -> dict[str, Any]:
        """Return the pictures of a step, the names in their captions, and tokens of phrases and of the captions.

        The phrases, one a name of the world, are there only when a term needs them.
        """
        settings, world = self.settings.scenes, self.world
        blocks = [self._block(index - turn * settings.lag) for turn in range(settings.repeats)]
        scenes = [scene for block in blocks for scene in block][: self.batch_size]
        rng = np.random.default_rng([self.seed, index, 11])
        pixels = np.empty((len(scenes), settings.size, settings.size, 3), np.uint8)
        present = torch.zeros(len(scenes), len(world.classes), dtype=torch.bool)
        captions = []
        for row, scene in enumerate(scenes):
            mirrored = rng.random() < 0.5
            if settings.crops is None:
                picture, text = self._shifted(scene.image, rng), scene.caption
                named = [world.class_ids[name] for name in scene.names]
            else:
                picture, areas = crop_scene(scene, world, rng, settings.crops)
                text, named = incomplete_caption(rng, world, areas, settings.mentions, settings.stuff_mentions)
            pixels[row] = picture[:, ::-1] if mirrored else picture
            present[row, named] = True
            captions.append(text)
        phrases = []
        if self.settings.names_weight or self.settings.patch_weight:
            template = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
            phrases = [template.format(name) for name in world.classes]
        return {
            "images": _normalised(pixels, self.clip),
            "present": present,
            "tokens": self.clip.tokenize(phrases + captions),
            "names": [f"scene {settings.seed}/{index}/{row}" for row in range(len(scenes))],
        }

    def _shifted(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        size = len(image)
        shift = size // 16
        dy, dx = rng.integers(0, 2 * shift + 1, 2)
        padded = np.pad(image, ((shift, shift), (shift, shift), (0, 0)), mode="edge")
        return padded[dy : dy + size, dx : dx + size]

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit vectors of the class token (B, D) and of the patches (B, P, D)."""
        tower = self.clip.image_tower
        tokens, grid = tower.embed(images)
        if self.model.training and self.settings.patch_dropout:
            tokens = drop_patches(tokens, self.settings.patch_dropout)
        first = self._entry() if self.model.training else 0
        patches = tower.run(tokens[:, 1:], grid, stop=first).tokens
        tokens = tower.run(torch.cat([tokens[:, :1], patches], dim=1), grid, first=first).tokens
        tokens = F.normalize(tower.project(tokens), dim=-1)
        return tokens[:, 0], tokens[:, 1:]

    def _entry(self) -> int:
        """The block at which the class token joins the patches: the first, or at random one of the later half."""
        blocks, late = self.clip.image_tower.num_blocks, self.settings.late_class_token
        if not late or torch.rand(()) >= late:
            return 0
        return int(torch.randint(blocks // 2, blocks, ()))

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the terms whose weight is not 0, and their weighted sum ``loss``."""
        settings, present = self.settings, batch["present"]
        image, patches = self.encode_images(batch["images"])
        text = F.normalize(self.clip.encode_text(batch["tokens"]), dim=-1)
        names, captions = text[: -len(image)], text[-len(image) :]
        scale = self.clip.model.logit_scale.exp().clamp(max=100)
        terms: dict[str, tuple[float, Tensor]] = {}  # their weights and values
        if settings.names_weight:
            logits, split = scale * image @ names.T, len(self.world.things)
            things = _multi_positive(logits[:, :split], present[:, :split])
            stuff = _multi_positive(logits[:, split:], present[:, split:])
            terms["loss_names"] = settings.names_weight, things + 0.5 * stuff
        if settings.caption_weight:
            pairs = scale * image @ captions.T
            same = (present[:, None] == present[None]).all(2)
            both = _multi_positive(pairs, same) + _multi_positive(pairs.T, same)
            terms["loss_captions"] = settings.caption_weight, 0.5 * both
        if settings.patch_weight:
            found = patch_loss(scale * patches @ names.T, present, settings.coverage)
            terms["loss_patches"] = settings.patch_weight, found
        total = torch.stack([weight * term for weight, term in terms.values()]).sum()
        return {"loss": total, **{key: term for key, (_, term) in terms.items()}}

    def sample_names(self, batch: Mapping[str, Any]) -> Sequence[str]:
        """Name the scenes of a batch."""
        return batch["names"]

    def measures(self) -> Sequence[str]:
        """See `evaluate`."""
        return ("zero_shot_top1", "zero_shot_top5")

    def evaluate(self, step: int) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Zero-shot top-1 and top-5 accuracy (0..1), see `zero_shot_accuracy`."""
        scenes = self.settings.scenes
        how: dict[str, Any] = {"num_rounds": 3, "size": scenes.size, "extents": scenes.extents}
        return dict(zip(self.measures(), zero_shot_accuracy(self.clip, world=self.world, **how), strict=True)), {}

    def export(self, folder: Path) -> None:
        """Write an open_clip folder with the weights in float16."""
        save_clip(self.clip, folder, dtype=torch.float16)


def _normalised(pixels: np.ndarray, clip: CLIP) -> Tensor:
    """Pixels (B, H, W, 3) uint8 as the image tower wants them, (B, 3, H, W)."""
    return normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255.0), clip.mean, clip.std)


@torch.no_grad()
def zero_shot_accuracy(
    clip: CLIP,
    *,
    world: World = FIRST,
    num_rounds: int = 6,
    size: int | None = None,
    extents: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy (0..1) over all thing names on held-out scenes that show one thing each.

    The class token is compared with "a photo of a {name}" for every thing, ``num_rounds`` scenes a thing. ``size`` is
    in pixels, that of the tower by default; ``extents``, the world's by default, are the smallest and largest size of
    a thing of the ``world`` as a fraction of it. Raises NotFiniteError if the CLIP's weights have diverged.
    """
    size = size or clip.image_size
    text = F.normalize(clip.encode_text(clip.tokenize([f"a photo of a {name}" for name in world.things])), dim=-1)
    tower, truth = clip.image_tower, torch.arange(len(world.things))[:, None]
    top1 = top5 = 0
    for turn in range(num_rounds):
        pictures = [
            render_scene(
                [HELD_OUT_SEED, turn, index], size, world=world, held_out=True, extents=extents, things=(name,)
            ).image
            for index, name in enumerate(world.things)
        ]
        tokens, grid = tower.embed(_normalised(np.stack(pictures), clip))
        image = F.normalize(tower.project(tower.run(tokens, grid).tokens[:, :1])[:, 0], dim=-1)
        cosines = image @ text.T
        if not bool(cosines.isfinite().all()):
            raise NotFiniteError("The CLIP's vectors hold NaN or infinite values; check its weights.")
        correct = cosines.topk(5, dim=1).indices == truth
        top1 += int(correct[:, 0].sum())
        top5 += int(correct.any(1).sum())
    total = num_rounds * len(world.things)
    return top1 / total, top5 / total
