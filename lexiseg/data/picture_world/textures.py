"""Procedural stuff: 14 seamless textures made of noise, seeded, with a few variants each."""

import functools
import zlib

import numpy as np

SIZE = 256  # pixels a side; every texture tiles seamlessly
NUM_VARIANTS = 4

Array = np.ndarray
_Y, _X = np.meshgrid(np.arange(SIZE) / SIZE, np.arange(SIZE) / SIZE, indexing="ij")


def noise(rng: np.random.Generator, low: float, high: float, stretch: float = 1.0) -> Array:
    """Return periodic noise in 0..1 with spatial frequencies from ``low`` to ``high`` cycles per tile.

    ``stretch`` > 1 makes horizontal streaks, < 1 vertical ones.
    """
    frequency = np.fft.fftfreq(SIZE) * SIZE
    radius = np.hypot(frequency[:, None] / stretch**0.5, frequency[None, :] * stretch**0.5)
    band = np.exp(-((np.maximum(radius - high, 0) / high) ** 2)) * (radius >= low) / np.maximum(radius, 1.0)
    spectrum = np.fft.fft2(rng.standard_normal((SIZE, SIZE))) * band
    field = np.fft.ifft2(spectrum).real
    return np.clip(0.5 + field / (4.5 * field.std() + 1e-9), 0, 1)


def blend(t: Array, dark: tuple[int, int, int], light: tuple[int, int, int]) -> Array:
    """Return (SIZE, SIZE, 3): ``dark`` where ``t`` is 0 and ``light`` where it is 1."""
    return np.asarray(dark, float) + t[..., None] * (np.asarray(light, float) - np.asarray(dark, float))


def cells(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Return a periodic Voronoi pattern: the distance to the cell's border (0 there) and a random tone per cell."""
    points = rng.random((count, 2))
    best: Array = np.full((SIZE, SIZE), 9.0)
    second: Array = best.copy()
    owner: Array = np.zeros((SIZE, SIZE), int)
    for index, (y, x) in enumerate(points):
        dy, dx = np.abs(_Y - y), np.abs(_X - x)
        distance = np.hypot(np.minimum(dy, 1 - dy), np.minimum(dx, 1 - dx))
        closer = distance < best
        second = np.where(closer, best, np.minimum(second, distance))
        owner = np.where(closer, index, owner)
        best = np.where(closer, distance, best)
    return second - best, rng.random(count)[owner]


def _sky(rng: np.random.Generator) -> Array:
    clouds = np.clip((noise(rng, 1, 7, 2.2) - 0.52) * 3.2, 0, 1)
    return blend(clouds, (104, 172, 238), (250, 252, 255))


def _night(rng: np.random.Generator) -> Array:
    image = blend(noise(rng, 1, 4), (14, 16, 48), (44, 38, 92))
    for _ in range(46):
        y, x = rng.integers(0, SIZE, 2)
        radius = int(rng.integers(1, 4))
        image[y : y + radius, x : x + radius] = (255, 246, 200)
    return image


def _grass(rng: np.random.Generator) -> Array:
    return blend(0.65 * noise(rng, 6, 50, 0.22) + 0.35 * noise(rng, 1, 5), (44, 112, 30), (146, 208, 72))


def _water(rng: np.random.Generator) -> Array:
    waves = np.sin(2 * np.pi * (11 * _Y + 1.6 * noise(rng, 1, 5, 2.5)))
    crest = np.clip(waves * 1.5 - 0.8, 0, 1)
    image = blend(noise(rng, 1, 8, 3), (20, 96, 158), (44, 146, 196))
    return image + crest[..., None] * (np.asarray((188, 232, 244.0)) - image)


def _sand(rng: np.random.Generator) -> Array:
    ripples = 0.5 + 0.5 * np.sin(2 * np.pi * (6 * _Y + 1.3 * noise(rng, 1, 3)))
    t = 0.45 * ripples + 0.3 * noise(rng, 20, 80) + 0.25 * noise(rng, 1, 4)
    return blend(t, (206, 164, 96), (248, 224, 160))


def _snow(rng: np.random.Generator) -> Array:
    return blend(0.75 * noise(rng, 1, 4, 1.6) + 0.25 * noise(rng, 20, 70), (204, 218, 240), (254, 254, 255))


def _road(rng: np.random.Generator) -> Array:
    image = blend(noise(rng, 10, 90), (66, 66, 72), (112, 112, 118))
    stripe = (np.abs(_Y - 0.5) < 0.035) & ((_X * 4) % 1 < 0.6)
    image[stripe] = (238, 214, 96)
    return image


def _soil(rng: np.random.Generator) -> Array:
    return blend(0.5 * noise(rng, 3, 14) + 0.5 * noise(rng, 10, 60), (62, 36, 20), (138, 92, 56))


def _gravel(rng: np.random.Generator) -> Array:
    edge, tone = cells(rng, 150)
    image = blend(0.25 + 0.75 * tone, (112, 110, 112), (206, 202, 196))
    return image * (0.45 + 0.55 * np.clip(edge * 45, 0, 1))[..., None]


def _leaves(rng: np.random.Generator) -> Array:
    edge, tone = cells(rng, 130)
    image = blend(tone, (14, 66, 34), (58, 146, 60))
    return image * (0.5 + 0.5 * np.clip(edge * 28, 0, 1))[..., None]


def _rows(num_rows: int, num_columns: int) -> tuple[Array, Array, Array, Array]:
    """Return row index, column index (shifted by half on odd rows) and the position inside the cell, both 0..1."""
    row = np.floor(_Y * num_rows).astype(int)
    x = _X * num_columns + 0.5 * (row % 2)
    return row, np.floor(x).astype(int) % num_columns, _Y * num_rows - row, x - np.floor(x)


def _brick(rng: np.random.Generator) -> Array:
    row, column, v, u = _rows(12, 6)
    tone = rng.random((12, 6))[row, column]
    image = blend(0.7 * tone + 0.3 * noise(rng, 10, 60), (136, 48, 34), (206, 96, 68))
    image[(v < 0.14) | (u < 0.07)] = (216, 204, 190)
    return image


def _wood(rng: np.random.Generator) -> Array:
    row, _, v, _ = _rows(6, 1)
    grain = noise(rng, 2, 40, 14)
    image = blend(0.6 * grain + 0.4 * rng.random(6)[row], (140, 88, 42), (214, 156, 92))
    image[v < 0.06] = (84, 50, 24)
    return image


def _tiles(rng: np.random.Generator) -> Array:
    v, u = (_Y * 8) % 1, (_X * 8) % 1
    odd = (np.floor(_Y * 8) + np.floor(_X * 8)) % 2
    accent = ((176, 224, 222), (238, 214, 214), (214, 226, 190), (206, 212, 236))[rng.integers(4)]
    image = blend(odd, accent, (244, 244, 240)) * (0.95 + 0.05 * noise(rng, 1, 6))[..., None]
    image[(v < 0.07) | (u < 0.07)] = (150, 156, 160)
    return image


def _carpet(rng: np.random.Generator) -> Array:
    pairs = (((128, 30, 54), (226, 178, 96)), ((62, 44, 112), (206, 160, 220)), ((150, 50, 96), (240, 200, 170)))
    base, accent = pairs[rng.integers(3)]
    u, v = np.abs(((_X * 6) % 1) - 0.5), np.abs(((_Y * 6) % 1) - 0.5)
    diamond = np.abs(u + v - 0.36) < 0.07
    image = blend(0.4 * diamond.astype(float) * 2 + 0.2 * noise(rng, 30, 110), base, accent)
    image[(u + v) < 0.12] = accent
    return image


_MAKERS = {make.__name__[1:]: make for make in (_sky, _night, _grass, _water, _sand, _snow, _road)}
_MAKERS |= {make.__name__[1:]: make for make in (_soil, _gravel, _leaves, _brick, _wood, _tiles, _carpet)}


@functools.cache
def texture(name: str, variant: int) -> Array:
    """Return one variant of a stuff class as (512, 512, 3) uint8: the seamless tile, twice each way for cropping.

    From the fifth on, a variant has a tint and a contrast of its own.
    """
    rng = np.random.default_rng([zlib.crc32(name.encode()), variant])
    image = _MAKERS[name](rng)
    if variant >= NUM_VARIANTS:
        contrast, tint = rng.uniform(0.7, 1.2), rng.uniform(0.8, 1.2, 3)
        image = (image.mean((0, 1)) + contrast * (image - image.mean((0, 1)))) * tint
    image = np.clip(image, 0, 255).astype(np.uint8)
    return np.tile(image, (2, 2, 1))
