"""Periodic textures: each is a square tile of (mix, shade), stored at every scale so that far surfaces do not alias.

mix says how far the colour goes from the surface's first colour to its second, shade multiplies it. Tiles are made
once per process from fixed seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np


def sample(texture: str, uv: np.ndarray, footprint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Filtered texture values.

    uv: float32 (2, N) in periods. footprint: float32 (N,), the width of a pixel on the surface in periods.
    Returns (mix (N,) in 0..1, shade (N,) around 1).
    """
    tile = _pyramid(texture)
    u, v = uv - np.floor(uv)
    level = np.clip(np.log2(np.maximum(footprint * tile.size, 1e-6)), 0, tile.levels - 1)
    coarse = np.floor(level)
    values = _lookup(tile, u, v, coarse.astype(np.int32))
    blend = level - coarse
    if blend.any():
        finer = _lookup(tile, u, v, np.minimum(coarse + 1, tile.levels - 1).astype(np.int32))
        values = values + (finer - values) * blend
    return values[0], values[1]


@dataclass(frozen=True)
class _Pyramid:
    atlas: np.ndarray
    """float32 (size + 2, W, 2): all levels beside each other, each with a border of one wrapped texel."""
    left: np.ndarray
    """float32 (levels,): x of each level's first texel."""
    size: int
    levels: int


def _lookup(tile: _Pyramid, u: np.ndarray, v: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Bilinear values (2, N) at u, v in [0, 1) of the given levels."""
    size = np.ldexp(np.float32(tile.size), -level)
    x, y = tile.left[level] + u * size - 0.5, 1 + v * size - 0.5
    n, width = len(u), 1024  # cv2 limits either side to 32767
    rows = -(-n // width)
    maps = np.zeros((2, rows * width), np.float32)
    maps[0, :n], maps[1, :n] = x, y
    grid = maps.reshape(2, rows, width)
    found = cv2.remap(tile.atlas, grid[0], grid[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return found.reshape(-1, 2)[:n].T


@cache
def _pyramid(texture: str) -> _Pyramid:
    level = np.stack(TEXTURES[texture](), axis=-1).astype(np.float32)
    size, images, left, x = len(level), [], [], 0
    while True:
        padded = np.pad(level, ((1, 1), (1, 1), (0, 0)), "wrap")
        images.append(np.pad(padded, ((0, size + 2 - len(padded)), (0, 0), (0, 0))))
        left.append(x + 1)
        x += padded.shape[1]
        if len(level) == 1:
            break
        level = level.reshape(len(level) // 2, 2, len(level) // 2, 2, 2).mean(axis=(1, 3))
    return _Pyramid(np.ascontiguousarray(np.concatenate(images, axis=1)), np.array(left, np.float32), size, len(left))


# ---- the tiles -------------------------------------------------------------------------------------------------------

_SIZE = 256
Tile = tuple[np.ndarray, np.ndarray]


def _grid(size: int = _SIZE) -> tuple[np.ndarray, np.ndarray]:
    """v (rows) and u (columns) of the texels' centres, in 0..1."""
    at = (np.arange(size) + 0.5) / size
    return np.meshgrid(at, at, indexing="ij")


def _noise(
    seed: int, slope: float, low: float = 1, high: float = 128, stretch: float = 1.0, size: int = _SIZE
) -> np.ndarray:
    """Periodic noise of unit variance, spectrum f^-slope between low and high periods; `stretch` > 1 draws it out along u."""
    white = np.random.default_rng(seed).standard_normal((size, size))
    fy, fx = np.meshgrid(np.fft.fftfreq(size, 1 / size), np.fft.fftfreq(size, 1 / size), indexing="ij")
    f = np.hypot(fy, fx * stretch)
    gain = np.where((f >= low) & (f <= high), np.maximum(f, 1e-9) ** -slope, 0)
    noise = np.fft.ifft2(np.fft.fft2(white) * gain).real
    return noise / noise.std()


def _flat() -> np.ndarray:
    return np.ones((_SIZE, _SIZE))


def _stripes() -> Tile:
    v, _ = _grid()
    return (np.abs(v - 0.5) < 0.25) * 1.0, _flat()


def _checks() -> Tile:
    v, u = _grid()
    seam = np.minimum(np.abs((u * 2) % 1 - 0.5), np.abs((v * 2) % 1 - 0.5))
    return ((u < 0.5) ^ (v < 0.5)) * 1.0, np.where(seam > 0.49, 0.9, 1.0)


def _dots() -> Tile:
    v, u = _grid()
    return (np.hypot(u - 0.5, v - 0.5) < 0.3) * 1.0, _flat()


def _planks() -> Tile:
    v, u = _grid(512)
    rng = np.random.default_rng(1)
    rows = 12
    row = np.floor(v * rows).astype(int)
    shift = rng.random(rows)[row]
    along = (u + shift) * 2  # two planks per row and period
    tone = rng.random((rows, 2))[row, np.floor(along).astype(int) % 2]
    grain = _noise(2, 1.0, 4, 200, stretch=14, size=512) * 0.10 + _noise(3, 1.2, 1, 60, stretch=6, size=512) * 0.05
    seam = np.minimum(np.abs((v * rows) % 1 - 0.5), 1) > 0.475
    joint = np.abs(along % 1 - 0.5) > 0.497
    shade = (1 + grain * 0.6) * np.where(seam | joint, 0.55, 1.0)
    return np.clip(0.15 + 0.7 * tone + grain, 0, 1), shade


def _bricks() -> Tile:
    v, u = _grid(512)
    rng = np.random.default_rng(4)
    rows, columns = 8, 4
    row = np.floor(v * rows).astype(int)
    along = u * columns + 0.5 * (row % 2)
    tone = rng.random((rows, columns))[row, np.floor(along).astype(int) % columns]
    edge = _noise(5, 0.8, 4, 128, size=512) * 0.006
    fine = _noise(6, 0.5, 8, 200, size=512)
    inside = (np.abs((v * rows) % 1 - 0.5) < 0.44 + edge * 2) & (np.abs(along % 1 - 0.5) < 0.47 + edge)
    shade = np.where(inside, 0.80 + 0.34 * tone, 0.95) * (1 + 0.06 * fine)
    return np.where(inside, np.clip(0.9 + 0.05 * fine, 0, 1), 0.05), shade


def _grass() -> Tile:
    blades = _noise(7, 0.1, 16, 128) + _noise(8, 0.6, 6, 100)
    patches = _noise(9, 1.2, 1, 12)
    return np.clip(0.45 + 0.16 * blades + 0.12 * patches, 0, 1), np.clip(1 + 0.12 * blades, 0.5, 1.5)


def _sand() -> Tile:
    v, u = _grid()
    ripples = np.sin(2 * np.pi * (6 * v + 0.25 * _noise(10, 1.8, 1, 8) + np.sin(2 * np.pi * u) * 0.15))
    grains = _noise(11, 0.0, 30, 128)
    return np.clip(0.5 + 0.14 * ripples + 0.14 * grains, 0, 1), 1 + 0.025 * ripples + 0.03 * grains


def _carpet() -> Tile:
    v, u = _grid()
    diamond = np.abs(((u * 2) % 1) - 0.5) + np.abs(((v * 2) % 1) - 0.5)
    motif = (np.abs(diamond - 0.44) < 0.045) | (diamond < 0.13) | (np.abs(diamond - 0.25) < 0.02)
    weave = 0.04 * np.sin(2 * np.pi * 64 * u) * np.sin(2 * np.pi * 64 * v) + 0.07 * _noise(12, 0.1, 20, 128)
    return motif * 0.85 + 0.05, 1 + weave


def _marble() -> Tile:
    veins = np.exp(-np.abs(_noise(13, 1.7, 1, 64)) * 14) + 0.5 * np.exp(-np.abs(_noise(14, 1.6, 2, 64)) * 20)
    clouds = _noise(15, 1.6, 1, 32)
    return np.clip(0.75 * veins + 0.08 * clouds + 0.1, 0, 1), 1 + 0.02 * clouds


def _plaster() -> Tile:
    mottle = _noise(16, 1.4, 1, 64)
    return np.clip(0.5 + 0.2 * mottle, 0, 1), 1 + 0.012 * mottle + 0.01 * _noise(17, 0.2, 30, 128)


def _blotches() -> Tile:
    return np.clip(0.5 + 0.6 * _noise(18, 1.5, 1, 64), 0, 1), 1 + 0.1 * _noise(19, 0.4, 8, 128)


def _speckles() -> Tile:
    return np.clip(0.5 + 0.4 * _noise(20, 0.2, 8, 128), 0, 1), 1 + 0.08 * _noise(21, 0.8, 2, 128)


def _clouds() -> Tile:
    return np.clip(0.5 + 0.32 * _noise(22, 1.45, 1, 128), 0, 1), _flat()


TEXTURES: dict[str, Callable[[], Tile]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "planks": _planks,
    "bricks": _bricks,
    "grass": _grass,
    "sand": _sand,
    "carpet": _carpet,
    "marble": _marble,
    "plaster": _plaster,
    "blotches": _blotches,
    "speckles": _speckles,
    "clouds": _clouds,
}
"""Every texture but "plain", which is its first colour everywhere."""
