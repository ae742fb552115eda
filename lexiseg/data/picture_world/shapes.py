"""Shapes that no word names: pictures with masks for the class-agnostic training of proposals.

Blobs, polygons, strokes and figures put together of several such parts lie over regions of random texture. Nothing is
drawn from a vocabulary: no glyph, and no texture of a stuff class, so that a generator that has seen these masks has
seen none of an unseen class. This takes the place of the ImageNet and SAM pretraining behind the papers' proposals.
"""

import functools

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw

from lexiseg.data.base import Sample
from lexiseg.data.picture_world.scene import finish, horizon_line, overlap, shadow
from lexiseg.data.picture_world.textures import SIZE, Array, blend, cells, noise
from lexiseg.errors import LexisegError
from lexiseg.vocabulary import Vocabulary, VocabularyClass

MOST = 12
"""Regions per picture: at most 3 of stuff and 9 shapes."""

# First integers of the seeds, beside those of the picture world's splits.
SPLIT_SEEDS = {"train": 11, "val": 12}
SPLIT_LENGTHS = {"train": 20_000, "val": 200}
_TEXTURES = 96
_FINE = 2  # shapes are drawn so many times larger than they appear, which smooths their edges


class Shapes:
    """Pictures of shapes; ids number the regions of one picture in random order, and mean nothing beyond it.

    Args:
        split: "train" or "val".
        size: pixels per side.
        length: number of pictures; default 20,000 (train) and 200 (val).

    Raises LexisegError if there is no such split.
    """

    # names that number the regions of a picture: "region 1" to "region 12"
    vocabulary = Vocabulary(tuple(VocabularyClass(f"region {number + 1}") for number in range(MOST)))

    def __init__(self, split: str, *, size: int = 128, length: int | None = None) -> None:
        if split not in SPLIT_SEEDS:
            raise LexisegError(f"shapes has no split '{split}'; choose 'train' or 'val'.")
        self.split, self.size = split, size
        self._length = SPLIT_LENGTHS[split] if length is None else length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """Return the sample: image (3, S, S) uint8, label (S, S) int64; every pixel is in a region."""
        if not 0 <= index < self._length:
            raise IndexError(f"shapes {self.split} has {self._length} pictures, there is no index {index}")
        image, label = render_shapes([SPLIT_SEEDS[self.split], index], self.size)
        return Sample(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            label=torch.from_numpy(label.astype(np.int64)),
            name=f"shapes/{self.split}/{index:05d}",
        )


def render_shapes(seed: int | list[int], size: int) -> tuple[Array, Array]:
    """A picture (size, size, 3) uint8 and the number of each pixel's region (size, size) uint8, below `MOST`."""
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(MOST)
    label = np.zeros((size, size), np.uint8)
    image = _patch(rng, size)
    lines = np.zeros(size)
    for index in range(1, 1 + int(rng.choice(3, p=(0.2, 0.5, 0.3)))):
        lines = lines + horizon_line(rng, size, 0.2, 0.5)
        rows, columns = np.indices((size, size))
        below = (rows >= lines[None, :]) if rng.random() < 0.8 else (columns >= lines[:, None])
        image = np.where(below[..., None], _patch(rng, size), image)
        label[below] = index
    for index in range(3, 3 + int(rng.integers(1, MOST - 2))):
        side = max(8, round(size * rng.uniform(0.15, 0.7)))
        sprite = _sprite(rng, side)
        top, left = (int(place) for place in rng.integers(-side // 4, size - 3 * side // 4, 2))
        y, x, inner_y, inner_x = overlap(top, left, side, size)
        part = sprite[inner_y, inner_x]
        if rng.random() < 0.6:
            shadow(image, sprite, top, left)
        alpha = part[..., 3:] / 255.0
        image[y, x] = image[y, x] * (1.0 - alpha) + part[..., :3] * alpha
        label[y, x][part[..., 3] > 127] = index
    return finish(rng, image), numbers[label].astype(np.uint8)


@functools.cache
def texture(number: int) -> Array:
    """Texture ``number``, (2 SIZE, 2 SIZE, 3) uint8: noise, stripes, checks or cells in two random colours."""
    rng = np.random.default_rng([13, number])
    dark, light = rng.uniform(0, 255, (2, 3))
    kind = number % 4
    axis = np.arange(SIZE) / SIZE
    low = int(rng.integers(1, 12))
    field = noise(rng, low, low + int(rng.integers(2, 60)), float(rng.choice((0.2, 1, 1, 4))))
    if kind == 1:
        ways = rng.integers(0, 14, 2)
        field = 0.5 + 0.5 * np.sin(2 * np.pi * (ways[0] * axis[:, None] + ways[1] * axis[None, :] + field))
    elif kind == 2:
        rows, columns = rng.integers(2, 12, 2)
        field = 0.3 * field + 0.7 * ((np.floor(axis[:, None] * rows) + np.floor(axis[None, :] * columns)) % 2)
    elif kind == 3:
        edge, tone = cells(rng, int(rng.integers(20, 120)))
        field = tone * np.clip(edge * rng.uniform(8, 60), 0, 1)
    return np.tile(np.clip(blend(field, tuple(dark), tuple(light)), 0, 255).astype(np.uint8), (2, 2, 1))


def _patch(rng: np.random.Generator, size: int) -> Array:
    """(size, size, 3) float32: a texture, placed, scaled and coloured at random."""
    tile = texture(int(rng.integers(_TEXTURES)))
    span = int(SIZE * rng.uniform(0.3, 0.95))
    top, left = rng.integers(0, SIZE, 2)
    crop = Image.fromarray(tile[top : top + span, left : left + span])
    resized = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0), np.float32)
    # Contrast and mean change with every patch, so that 96 textures give endless ones.
    mean = resized.mean(axis=(0, 1))
    return np.clip((resized - mean) * rng.uniform(0.15, 1.1) + mean[rng.permutation(3)] * rng.uniform(0.7, 1.2), 0, 255)


def _sprite(rng: np.random.Generator, side: int) -> Array:
    """A shape as (side, side, 4) float32 with straight alpha: one part, or a figure of several touching ones."""
    fine = side * _FINE
    canvas, alpha = Image.new("RGB", (fine, fine)), Image.new("L", (fine, fine))
    count = 1 if rng.random() < 0.35 else int(rng.integers(2, 8))
    palette = [_colour(rng) for _ in range(int(rng.integers(1, 5)))]
    outline = _colour(rng, dark=True) if rng.random() < 0.4 else None
    centre, reach = np.full(2, fine / 2), fine * (0.46 if count == 1 else 0.3)
    for index in range(count):
        part = Image.new("L", (fine, fine))
        _draw_part(rng, part, centre, reach)
        if index and ImageChops.multiply(part, alpha).getbbox() is None:
            continue  # a figure hangs together
        fill: Image.Image | tuple[int, int, int] = palette[index % len(palette)]
        if rng.random() < 0.25:
            fill = Image.fromarray(_patch(rng, fine).astype(np.uint8))
        canvas.paste(fill, None if isinstance(fill, Image.Image) else (0, 0, fine, fine), part)
        if outline is not None:
            edge = ImageChops.subtract(part, ImageChops.offset(part, _FINE, _FINE))
            canvas.paste(outline, (0, 0, fine, fine), edge)
        alpha = ImageChops.lighter(alpha, part)
        inside = np.argwhere(np.asarray(alpha) > 127)
        if len(inside):  # the next part begins somewhere in the figure
            centre, reach = inside[rng.integers(len(inside))][::-1].astype(float), fine * rng.uniform(0.05, 0.26)
    joined = np.dstack([np.asarray(canvas), np.asarray(alpha)])
    return np.asarray(Image.fromarray(joined, "RGBA").resize((side, side), Image.Resampling.BOX), np.float32)


def _colour(rng: np.random.Generator, *, dark: bool = False) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 90 if dark else 256, 3))
    return red, green, blue


def _draw_part(rng: np.random.Generator, canvas: Image.Image, centre: Array, reach: float) -> None:
    """Draw a filled blob, ellipse or polygon of about ``reach`` around ``centre``, or a stroke, into a mask."""
    draw, kind = ImageDraw.Draw(canvas), rng.integers(4)
    if kind == 3:
        steps = np.cumsum(rng.normal(0, reach / 2.2, (int(rng.integers(2, 6)), 2)), axis=0)
        points = [tuple(point) for point in steps - steps.mean(axis=0) + centre]
        width = max(2, round(reach * rng.uniform(0.15, 0.5)))
        draw.line(points, 255, width, joint="curve")
        for x, y in points:
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 255)
        return
    count = int(rng.integers(3, 9)) if kind == 2 else 40
    angles = np.sort(rng.uniform(0, 2 * np.pi, count)) if kind == 2 else np.linspace(0, 2 * np.pi, count, False)
    radius = rng.uniform(0.6, 1.0, count) if kind == 2 else np.ones(count)
    if kind == 1:
        for frequency in (2, 3, 5):
            radius += rng.uniform(0, 0.9 / frequency) * np.sin(frequency * angles + rng.uniform(0, 2 * np.pi))
        radius /= radius.max()
    x, y = radius * np.cos(angles), radius * np.sin(angles) * rng.uniform(0.35, 1.0)
    turn = rng.uniform(0, 2 * np.pi)
    turned = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], axis=1)
    draw.polygon([tuple(point) for point in centre + reach * turned], 255)
