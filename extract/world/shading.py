"""Light: from hits to linear RGB, and from linear RGB to pixels."""

import numpy as np

from extract.world.primitives import dot, unit
from extract.world.scene import Backdrop, Scene, Surface, Vector
from extract.world.textures import sample
from extract.world.tracing import Hits, Rays, View, shadows

_SUN_GLOW = 350.0
_CLEAR_M = 1e4
"""Haze thinner than this is left out."""
_SMALL_M = 0.05
"""Bodies smaller than this darken nothing near them."""


def linear(colour: tuple[float, float, float]) -> Vector:
    """sRGB in 0..1 -> linear RGB in 0..1."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
    return (r, g, b)


def _tone_table() -> np.ndarray:
    x = np.arange(8192) / 2047.75  # linear 0..4
    x = np.where(x < 0.6, x, 0.6 + 0.4 * (1 - np.exp(-(x - 0.6) / 0.4)))  # a soft shoulder, so that lights do not clip
    srgb = np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.maximum(x, 1e-9) ** (1 / 2.4) - 0.055)
    return np.rint(255 * srgb).astype(np.uint8)


_TONE = _tone_table()


def to_pixels(rgb: np.ndarray, exposure: float) -> np.ndarray:
    """Linear RGB (any shape) -> uint8 sRGB with a soft shoulder."""
    return _TONE[np.clip(rgb * np.float32(exposure * 2047.75), 0, 8191).astype(np.int16)]


def shade(
    scene: Scene, view: View, rays: Rays, hits: Hits, pixel: float, seed: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Linear RGB float32 (3, N) of rays, and uint8 (N,) with one bit for each light that another body hides from what they see.

    pixel: the width that a ray stands for, in pixels of `view` (1 for an image's pixel, 0.5 for a quarter of one).
    seed: moves lights by ray within their own size, so that averages over neighbouring rays have soft shadows.
    """
    rgb, hidden = np.empty((3, len(rays.x)), np.float32), np.zeros(len(rays.x), np.uint8)
    sky = np.ones(len(rays.x), bool)
    sky[hits.order] = False
    if sky.any():
        rgb[:, sky] = sky_colour(scene.backdrop, rays.direction[:, sky], scene)
    if len(hits.order):
        rgb[:, hits.order], hidden[hits.order] = _surfaces(scene, view, hits, pixel, seed)
    return rgb, hidden


def sky_colour(backdrop: Backdrop, direction: np.ndarray, scene: Scene) -> np.ndarray:
    """Linear RGB (3, N) of the sky in directions (3, N), with clouds and the suns' glow."""
    ray = unit(direction)
    up = np.clip(ray[1], 0, 1)
    low = (1 - up) * (1 - up)
    rgb = _mix(_column(backdrop.zenith), _column(backdrop.horizon), low * low)
    if backdrop.clouds > 0:
        dome = 0.16 / (up + 0.12)
        uv = np.stack([ray[0] * dome + backdrop.cloud_shift[0], ray[2] * dome + backdrop.cloud_shift[1]])
        density, _ = sample("clouds", uv.astype(np.float32), np.full(len(up), 0.004, np.float32))
        cover = np.clip((density - 0.75 + 0.6 * backdrop.clouds) * 2.2, 0, 1) * np.clip(up * 8, 0, 1) * 0.85
        white = 0.35 + 0.65 * _column(backdrop.horizon).mean() + 0.4 * _column(backdrop.horizon)
        rgb = _mix(rgb, np.minimum(white, 1.1), cover)
    for light in scene.lights:
        if light.sun:
            towards = np.clip(np.array(light.point, np.float32) @ ray, 0, 1)
            rgb = rgb + _column(light.power) * (0.5 * towards**_SUN_GLOW + 0.06 * towards**12)
    return rgb


def _surfaces(scene: Scene, view: View, hits: Hits, pixel: float, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
    towards_eye = unit(-hits.direction)
    facing_eye = np.clip(dot(hits.normal, towards_eye), 0.03, 1)
    albedo = _albedo(scene, hits, pixel * hits.depth / view.focal_px / np.sqrt(facing_eye))
    open_sky = _openness(scene, hits)
    backdrop = scene.backdrop
    ambient = _mix(_column(backdrop.ground_light), _column(backdrop.sky_light), 0.5 + 0.5 * hits.normal[1])
    ambient = ambient * (open_sky * (1 + np.array(backdrop.bright_side, np.float32) @ hits.normal))
    received, highlights, hidden = ambient, np.zeros_like(ambient), np.zeros(len(hits.order), np.uint8)
    rng = None if seed is None else np.random.default_rng(seed)
    for number, light in enumerate(scene.lights):
        target = np.array(light.point, np.float32)[:, None]
        way = target if light.sun else target - hits.point
        distance = np.sqrt(dot(way, way))
        towards = way / distance
        facing = dot(hits.normal, towards)
        lit = facing > 0
        jitter = None
        if rng is not None and light.size:
            jitter = light.size * np.float32(distance.mean()) * rng.standard_normal((3, len(facing)), np.float32) * 0.6
        dark = shadows(scene, light, hits, lit, jitter)
        hidden |= dark.astype(np.uint8) << number
        lit &= ~dark
        fall = np.ones_like(facing) if light.sun else 2 / (1 + (distance / np.float32(light.reach_m)) ** 2)
        received = received + _column(light.power) * (np.where(lit, facing, 0) * fall)
        for part, surface in _shining(scene, hits):
            if lit[part].any():
                half = unit((towards if light.sun else towards[:, part]) + towards_eye[:, part])
                shine = np.clip(dot(half, hits.normal[:, part]), 0, 1) ** np.float32(surface.gloss)
                strength = surface.specular * (surface.gloss + 8) / 16 * np.where(lit[part], fall[part], 0) * shine
                highlights[:, part] += _column(light.power) * strength
    rgb = albedo * received
    for part, surface in _shining(scene, hits):
        share, around = _mirrored(scene, surface, hits.normal[:, part], towards_eye[:, part], facing_eye[part])
        around = around * np.sqrt(open_sky[part])
        if surface.metal:
            shine = (around + highlights[:, part] / surface.specular) * share * albedo[:, part]
            rgb[:, part] = rgb[:, part] * (1 - surface.specular) + shine
        else:
            rgb[:, part] = rgb[:, part] * (1 - share) + around * share + highlights[:, part]
    if backdrop.haze_m < _CLEAR_M:
        rgb = _mix(rgb, _column(backdrop.horizon), 1 - np.exp(-hits.depth / np.float32(backdrop.haze_m)))
    return rgb, hidden


def _mirrored(
    scene: Scene, surface: Surface, normal: np.ndarray, towards_eye: np.ndarray, facing_eye: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How much a surface mirrors (Fresnel's share (N,)), and the sky or floor (no things) seen in it, linear RGB (3, N)."""
    grazing = 1 - facing_eye
    share = (
        surface.specular
        + (1 - surface.specular) * 0.7 * min(1, surface.gloss / 150) * grazing * (grazing * grazing) ** 2
    )
    up = (2 * facing_eye * normal - towards_eye)[1]
    sky = _mix(_column(scene.backdrop.horizon), _column(scene.backdrop.zenith), np.clip(up * 1.5, 0, 1))
    ground = _column(scene.primitives[0].surface.colour) * 0.7
    return share, _mix(ground, sky, np.clip(up * 6 + 0.5, 0, 1))


def _shining(scene: Scene, hits: Hits) -> list[tuple[slice, Surface]]:
    parts = ((part, scene.primitives[k].surface) for k, part in hits.slices)
    return [(part, surface) for part, surface in parts if surface.specular > 0]


def _albedo(scene: Scene, hits: Hits, footprint_m: np.ndarray) -> np.ndarray:
    """Linear RGB (3, M) of the surfaces themselves."""
    albedo = np.empty_like(hits.point)
    for k, part in hits.slices:
        surface = scene.primitives[k].surface
        first = _column(surface.colour)
        if surface.texture == "plain":
            albedo[:, part] = first
            continue
        scale = np.array(surface.scale, np.float32)[:, None]
        uv = hits.uv[:, part] * scale + np.array(surface.offset, np.float32)[:, None]
        mix, tone = sample(surface.texture, uv, footprint_m[part] * np.float32(np.sqrt(scale[0, 0] * scale[1, 0])))
        albedo[:, part] = _mix(first, _column(surface.second), mix) * tone
    return albedo


def _openness(scene: Scene, hits: Hits) -> np.ndarray:
    """Share of the surroundings that a hit sees past the bodies near it, each taken for a ball of its volume: (M,)."""
    share = np.ones(len(hits.order), np.float32)
    owner = hits.bodies()
    x, y, z = hits.point
    for k, body in enumerate(scene.primitives):
        radius = float(np.prod(body.scale)) ** (1 / 3) * (1.0 if body.kind == "sphere" else 1.1)
        if body.kind == "plane" or radius < _SMALL_M:
            continue
        reach = 3.5 * radius
        a, b, c = (float(v) for v in body.centre)
        near = (x > a - reach) & (x < a + reach) & (z > c - reach) & (z < c + reach) & (y < b + reach) & (owner != k)
        index = np.flatnonzero(near)
        if len(index):
            away = np.array([[a], [b], [c]], np.float32) - hits.point[:, index]
            square = np.maximum(dot(away, away), np.float32(radius * radius))
            facing = dot(away, hits.normal[:, index]) / np.sqrt(square)
            fade = np.maximum(1 - square / np.float32(reach**2), 0)
            share[index] *= 1 - 0.85 * np.maximum(facing, 0) * (radius * radius / square) * fade
    return share


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    return a + (b - a) * share


def _column(colour: Vector) -> np.ndarray:
    return np.array(colour, np.float32)[:, None]
