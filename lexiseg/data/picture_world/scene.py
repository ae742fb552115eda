"""Scenes: things over stuff, with exact masks and a caption, a pure function of a seed."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from lexiseg.data.picture_world.classes import CELL, FIRST, STUFF, World, load_atlas
from lexiseg.data.picture_world.textures import SIZE, texture

# What may lie above and below a horizon, so that a person finds the scene plausible.
_ABOVE = ("sky", "night", "brick", "leaves", "tiles", "wood", "sky", "snow")
_GROUNDS = {
    "sky": ("grass", "water", "sand", "snow", "road", "soil", "gravel", "leaves"),
    "night": ("grass", "water", "sand", "snow", "road", "soil", "gravel", "leaves"),
    "brick": ("wood", "carpet", "tiles", "road", "gravel", "grass"),
    "leaves": ("grass", "soil", "water", "gravel", "road", "brick"),
    "tiles": ("wood", "carpet", "brick", "water"),
    "wood": ("carpet", "tiles", "grass", "brick"),
    "snow": ("water", "road", "leaves", "gravel"),
}
_SECOND_GROUNDS = ("water", "sand", "grass", "road", "gravel", "soil", "brick", "leaves")
_WITH_ITS_LIKE = 0.4  # in a varied world, how often a thing is of the same family as the one before


@dataclass(frozen=True)
class Scene:
    """A picture with exact labels."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    label: np.ndarray  # (H, W) uint8, class ids of its world; every pixel has a class
    things: tuple[str, ...]  # names of the things, in drawing order
    stuff: tuple[str, ...]  # names of the stuff in the background, top to bottom
    caption: str  # an English sentence that names them

    @property
    def names(self) -> tuple[str, ...]:
        """Every class name in the caption, things first."""
        return self.things + self.stuff


def _stuff_patch(rng: np.random.Generator, name: str, size: int, variants: tuple[int, int]) -> np.ndarray:
    """Return (size, size, 3) float32 of a randomly placed, scaled, mirrored and tinted texture."""
    tile = texture(name, variants[0] + int(rng.integers(variants[1])))
    span = int(SIZE * rng.uniform(0.45, 0.95))
    top, left = rng.integers(0, SIZE, 2)
    crop = tile[top : top + span, left : left + span]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    resized = Image.fromarray(crop).resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    tint = rng.uniform(0.85, 1.12, 3).astype(np.float32)
    return np.asarray(resized, np.float32) * tint * np.float32(rng.uniform(0.88, 1.1))


def horizon_line(rng: np.random.Generator, size: int, low: float, high: float) -> np.ndarray:
    """Return the row of a gently waving line for every column, (size,)."""
    x = np.linspace(0, 1, size)
    wave = sum(
        rng.uniform(0, 0.035) * np.sin(2 * np.pi * (frequency * x + rng.random())) for frequency in (0.7, 1.6, 3.1)
    )
    return (rng.uniform(low, high) + wave + rng.uniform(-0.05, 0.05) * (x - 0.5)) * size


def _background(
    rng: np.random.Generator, size: int, ids: dict[str, int], variants: tuple[int, int], without: Collection[str]
) -> tuple[np.ndarray, np.ndarray, list[str], float]:
    """Return the picture (float32), its labels, the stuff names from top to bottom and the horizon (0..1)."""

    def one_of(names: Iterable[str]) -> str:
        allowed = [name for name in names if name not in without]
        return allowed[rng.integers(len(allowed))]

    layout = rng.random()
    if layout < 0.2:
        names = [one_of(STUFF)]
        lines: list[np.ndarray] = []
    else:
        names = [one_of(_ABOVE)]
        names.append(one_of(_GROUNDS[names[0]]))
        lines = [horizon_line(rng, size, 0.25, 0.6)]
        if layout > 0.7:
            names.append(one_of(name for name in _SECOND_GROUNDS if name not in names))
            lines.append(lines[0] + horizon_line(rng, size, 0.22, 0.38))
    image = _stuff_patch(rng, names[0], size, variants)
    label = np.full((size, size), ids[names[0]], np.uint8)
    rows = np.arange(size)[:, None]
    for name, line in zip(names[1:], lines, strict=True):
        below = rows >= line[None, :]
        image = np.where(below[..., None], _stuff_patch(rng, name, size, variants), image)
        label[below] = ids[name]
    horizon = float(lines[0].mean() / size) if lines else 0.2
    return image, label, [name for name in names if (label == ids[name]).any()], horizon


def _sprite(rng: np.random.Generator, world: World, name: str, extent: float) -> np.ndarray:
    """Return a thing as premultiplied RGBA float32, ``extent`` pixels wide, turned, mirrored and lit at random."""
    style = world.styles[rng.integers(len(world.styles))] if len(world.styles) > 1 else world.styles[0]
    glyph = load_atlas(style)[world.class_ids[name]]
    if rng.random() < 0.5:
        glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = extent / CELL
    side = max(6, round(extent * 1.25))
    angle = np.deg2rad(rng.normal(0, 9))
    stretch = rng.uniform(0.92, 1.09)
    cos, sin = np.cos(angle), np.sin(angle)
    if scale < 0.6:  # an affine transform does not average; shrink first so that small things stay smooth
        inner = max(4, round(CELL * scale * 1.4))
        glyph = glyph.resize((inner, inner), Image.Resampling.BOX)
        scale = extent / inner
    half, middle = side / 2, glyph.width / 2
    a, b = cos / (scale * stretch), sin / scale
    d, e = -sin / (scale * stretch), cos / scale
    matrix = (a, b, middle - a * half - b * half, d, e, middle - d * half - e * half)
    turned = glyph.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    sprite = np.asarray(turned, np.float32)
    light = np.append(rng.uniform(0.9, 1.08, 3) * rng.uniform(0.85, 1.12), 1.0).astype(np.float32)
    sprite = sprite * light
    sprite[..., :3] = np.minimum(sprite[..., :3], sprite[..., 3:])
    return sprite


def overlap(top: int, left: int, side: int, size: int) -> tuple[slice, slice, slice, slice]:
    """Return the picture's and the sprite's row and column slices where the two overlap."""
    y0, x0, y1, x1 = max(0, top), max(0, left), min(size, top + side), min(size, left + side)
    return slice(y0, y1), slice(x0, x1), slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)


def shadow(image: np.ndarray, sprite: np.ndarray, top: int, left: int) -> None:
    """Darken the picture a little below and beside a thing, in place."""
    side, size = sprite.shape[0], image.shape[0]
    alpha = Image.fromarray(sprite[..., 3].astype(np.uint8)).filter(ImageFilter.BoxBlur(max(1, side // 16)))
    rows, columns, inner_rows, inner_columns = overlap(top + side // 14, left + side // 18, side, size)
    shade = np.asarray(alpha, np.float32)[inner_rows, inner_columns, None] * (0.3 / 255.0)
    image[rows, columns] *= 1.0 - shade


def _place_things(
    rng: np.random.Generator,
    world: World,
    image: np.ndarray,
    label: np.ndarray,
    names: list[str],
    horizon: float,
    extents: tuple[float, float],
) -> list[str]:
    """Draw the things, in place; a thing that finds no free place is left out. Return the names drawn."""
    size = image.shape[0]
    owner = np.full((size, size), -1, np.int16)
    areas: list[int] = []
    drawn: list[str] = []
    shrink = 1.0 / (1.0 + 0.09 * max(0, len(names) - 1))
    for name in names:
        for attempt in range(8):
            extent = size * rng.uniform(*extents) * shrink * 0.95**attempt
            sprite = _sprite(rng, world, name, extent)
            side = sprite.shape[0]
            reach = 0.36 * extent
            low = max(reach, min(horizon * size, size - reach) - 0.35 * extent)
            centre_y = rng.uniform(low if rng.random() < 0.7 else reach, size - reach)
            centre_x = rng.uniform(reach, size - reach)
            top, left = round(centre_y - side / 2), round(centre_x - side / 2)
            rows, columns, inner_rows, inner_columns = overlap(top, left, side, size)
            opaque = sprite[inner_rows, inner_columns, 3] > 127
            area = int(opaque.sum())
            if area < 0.7 * max(1, int((sprite[..., 3] > 127).sum())) or area == 0:
                continue
            counts = np.bincount(owner[rows, columns][opaque] + 1, minlength=len(areas) + 1)[1:]
            visible = np.bincount(owner.ravel() + 1, minlength=len(areas) + 1)[1:]
            if any(visible[k] - counts[k] < world.min_visible * areas[k] for k in range(len(areas))):
                continue
            shadow(image, sprite, top, left)
            part = sprite[inner_rows, inner_columns]
            image[rows, columns] = image[rows, columns] * (1.0 - part[..., 3:] / 255.0) + part[..., :3]
            label[rows, columns][opaque] = world.class_ids[name]
            owner[rows, columns][opaque] = len(areas)
            areas.append(area)
            drawn.append(name)
            break
    return drawn


def finish(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Apply light, colour temperature, a slant of brightness and sensor noise; return uint8."""
    size = image.shape[0]
    slope = np.linspace(-1, 1, size, dtype=np.float32)
    slant = 1.0 + rng.uniform(-0.1, 0.1) * slope[:, None, None] + rng.uniform(-0.1, 0.1) * slope[None, :, None]
    warm = rng.uniform(-0.05, 0.05)
    gain = np.asarray((1 + warm, 1, 1 - warm), np.float32) * np.float32(rng.uniform(0.88, 1.1))
    noise = rng.standard_normal((size, size, 1), dtype=np.float32) * np.float32(rng.uniform(0, 6))
    return np.clip(image * (slant * gain).astype(np.float32) + noise, 0, 255).astype(np.uint8)


def _clutter(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Return the picture with up to ten small flat shapes strewn over its stuff, which they belong to."""
    size = image.shape[0]
    canvas = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(11))):
        centre, reach = rng.uniform(0, size, 2), size * rng.uniform(0.01, 0.05)
        corners = centre + rng.uniform(-reach, reach, (int(rng.integers(3, 6)), 2))
        draw.polygon([(x, y) for x, y in corners], fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
    return np.asarray(canvas, np.float32)


def _weather(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Apply a spot of light or shade, a gamma, and now and then a blur."""
    size = image.shape[0]
    y, x = np.ogrid[:size, :size]
    (row, column), width = rng.uniform(0, size, 2), size * rng.uniform(0.3, 0.8)
    spot = np.exp(-(((y - row) ** 2 + (x - column) ** 2) / (2 * width**2)), dtype=np.float32)
    image = image * (1 + np.float32(rng.uniform(-0.45, 0.35)) * spot)[..., None]
    image = 255 * (np.clip(image, 0, 255) / 255) ** np.float32(rng.uniform(0.75, 1.35))
    blur = rng.uniform(0.002, 0.008) * size
    if rng.random() < 0.4:
        pixels = Image.fromarray(image.astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur))
        image = np.asarray(pixels, np.float32)
    return image


def _choose_things(rng: np.random.Generator, world: World, count: int, without: Collection[str]) -> tuple[str, ...]:
    """Return names of different things; in a varied world often several of one family."""
    things = [name for name in world.things if name not in without]
    if not world.varied:
        return tuple(things[index] for index in rng.choice(len(things), count, replace=False))
    chosen: list[str] = []
    while len(chosen) < count:
        like = next((family for family in world.families if chosen and chosen[-1] in family), ())
        near = [name for name in like if name in things and name not in chosen] if rng.random() < _WITH_ITS_LIKE else []
        pool = near or [name for name in things if name not in chosen]
        chosen.append(pool[rng.integers(len(pool))])
    return tuple(chosen)


def _article(name: str) -> str:
    """Return the name with its article, as a caption says it."""
    if name in ("cherries", "grapes", "broccoli", "corn", "cheese", "bread", "beer", "milk", "coffee", "jeans"):
        return name
    return ("an " if name[0] in "aeio" else "a ") + name


_STUFF_WORDS = ("on", "with", "over", "in front of")


def caption(rng: np.random.Generator, things: tuple[str, ...], stuff: tuple[str, ...]) -> str:
    """Return an English caption naming the given things and stuff (either may be empty, not both)."""
    parts = [_article(name) for name in things]
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1] if parts else ""
    ground = " and ".join(stuff)
    if text and ground:
        text = f"{text} {_STUFF_WORDS[rng.integers(len(_STUFF_WORDS))]} {ground}"
    text = text or ground
    opening = ("a photo of ", "there is ", "this is a photo of ", "", "a picture of ")[rng.integers(5)]
    return opening + text


def render_scene(
    seed: int | list[int],
    size: int = 256,
    *,
    world: World = FIRST,
    held_out: bool = False,
    num_things: tuple[int, int] = (1, 6),
    extents: tuple[float, float] | None = None,
    things: tuple[str, ...] | None = None,
    without: Collection[str] = (),
) -> Scene:
    """Render a scene; the same arguments always give the same pixels.

    Args:
        seed: seed, or a list of integers that together are one (e.g. ``[stage, index]``).
        size: pixels per side.
        world: what the scene is made of.
        held_out: whether stuff has the textures of the val and test splits instead of the training's.
        num_things: smallest and largest number of things, drawn uniformly.
        extents: smallest and largest size of a thing as a fraction of the picture's side, before crowding shrinks it;
            default: the world's.
        things: the things to draw; default: drawn at random without repetition.
        without: classes, things and stuff, that are not drawn at random.
    """
    rng = np.random.default_rng(seed)
    ids, variants = world.class_ids, world.held_out_textures if held_out else world.train_textures
    image, label, stuff, horizon = _background(rng, size, ids, variants, without)
    if things is None:
        things = _choose_things(rng, world, int(rng.integers(num_things[0], num_things[1] + 1)), without)
    if world.varied:
        image = _clutter(rng, image)
    drawn = _place_things(rng, world, image, label, list(things), horizon, extents or world.extents)
    pixels = finish(rng, _weather(rng, image) if world.varied else image)
    visible = tuple(name for name in stuff if np.count_nonzero(label == ids[name]) >= 0.01 * size * size)
    text = caption(rng, tuple(drawn), visible)
    return Scene(image=pixels, label=label, things=tuple(drawn), stuff=visible, caption=text)
