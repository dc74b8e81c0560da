"""From a scene to an image and its exact maps at any size."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from extract.world.scene import Scene
from extract.world.shading import shade, to_pixels
from extract.world.tracing import Hits, View, trace
from shards.errors import UserError
from shards.intrinsics import order_segments

_CONTRAST = 12
"""Neighbouring pixels that differ by more (of 255) are rendered again with four rays."""


@dataclass(frozen=True)
class Rendering:
    """One scene at one size. All maps have the image's H and W and are exact at pixel centres.

    image: uint8 (H, W, 3) RGB, anti-aliased. depth_m: float32 (H, W) z-depth in metres, +inf where there is sky.
    normal: float32 (H, W, 3) unit, camera space (x right, y up, z to the camera), NaN where there is sky.
    segmentation: uint16 (H, W), 1..K by falling area: one for each object, the floor, each wall, the sky.
    line: float32 (H, W) in [0, 1], outlines and creases, about 1.5 px wide; not textures or shadows.
    caption: true of the picture. focal_px: focal length in pixels; the principal point is the image's centre.
    objects: what describe_objects says of each visible object.
    segments: label of each segment id, from 1: "floor", "wall", a shape, "sky".
    """

    image: np.ndarray
    depth_m: np.ndarray
    normal: np.ndarray
    segmentation: np.ndarray
    line: np.ndarray
    caption: str
    focal_px: float
    objects: list[dict[str, Any]]
    segments: list[str]


def render(scene: Scene, size_px: int | tuple[int, int]) -> Rendering:
    """Renders a scene at size_px (square) or (height, width). Raises UserError for sizes below 8 px."""
    height, width = (size_px, size_px) if isinstance(size_px, int) else size_px
    if min(height, width) < 8:
        raise UserError(
            f"a scene of {width} x {height} pixels is too small to show anything; ask for 8 pixels at least"
        )
    view = View.of(scene, height, width)
    rays = view.grid()
    hits = trace(scene, view, rays)
    rgb = shade(scene, view, rays, hits, pixel=1.0)
    surfaces = hits.surface_ids(height * width)

    depth = np.full(height * width, np.inf, np.float32)
    depth[hits.order] = hits.depth
    normal = np.full((height * width, 3), np.nan, np.float32)
    normal[hits.order] = (view.rotation.T.astype(np.float32) @ hits.normal).T
    segment = np.full(height * width, len(scene.segments) - 1, np.int32)
    for k, part in hits.slices:
        segment[hits.order[part]] = scene.primitives[k].segment

    pixels = to_pixels(rgb, scene.exposure).T.reshape(height, width, 3)
    fine = _refine(scene, view, rgb, surfaces.reshape(height, width), np.ascontiguousarray(pixels))
    ids = segment.reshape(height, width)
    ordered = order_segments(ids + 1)
    return Rendering(
        image=fine.image,
        depth_m=depth.reshape(height, width),
        normal=normal.reshape(height, width, 3),
        segmentation=ordered,
        line=fine.line,
        caption=scene.caption,
        focal_px=view.focal_px,
        objects=describe_objects(scene, ids, ordered),
        segments=_labels(scene, ids, ordered),
    )


@dataclass(frozen=True)
class _Fine:
    image: np.ndarray
    line: np.ndarray


def _refine(scene: Scene, view: View, rgb: np.ndarray, surfaces: np.ndarray, pixels: np.ndarray) -> _Fine:
    """Anti-aliasing: four rays for each pixel near an edge of any kind, and the outlines seen at that double resolution."""
    height, width = surfaces.shape
    edges = np.zeros((height, width), np.uint8)
    low, high = cv2.erode(pixels, np.ones((3, 3), np.uint8)), cv2.dilate(pixels, np.ones((3, 3), np.uint8))
    edges[(high - low).max(axis=2) > _CONTRAST] = 1
    seams = _differs(surfaces)
    edges |= cv2.dilate(seams, np.ones((3, 3), np.uint8))
    row, column = np.nonzero(edges)
    doubled = np.repeat(np.repeat(surfaces, 2, axis=0), 2, axis=1)
    if len(row):
        offsets = np.array([[-0.25, -0.25], [-0.25, 0.25], [0.25, -0.25], [0.25, 0.25]], np.float32)
        y = (row[None] + np.float32(0.5) + offsets[:, :1]).astype(np.float32).ravel()
        x = (column[None] + np.float32(0.5) + offsets[:, 1:]).astype(np.float32).ravel()
        rays = view.rays(x, y)
        hits: Hits = trace(scene, view, rays)
        sub = shade(scene, view, rays, hits, pixel=0.6, seed=scene.index)
        flat = (row * width + column).astype(np.intp)
        rgb = rgb.copy()
        mean = np.minimum(sub, 1.5).reshape(3, 4, -1).mean(axis=1)
        rgb[:, flat] = mean
        pixels = pixels.copy()
        pixels[row, column] = to_pixels(mean, scene.exposure).T
        doubled[(2 * y - 0.5).round().astype(np.intp), (2 * x - 0.5).round().astype(np.intp)] = hits.surface_ids(len(x))
    return _Fine(pixels, _outlines(doubled))


def _differs(ids: np.ndarray) -> np.ndarray:
    """uint8 (H, W): 1 on both pixels of each pair of neighbours (4-neighbourhood) with different ids."""
    edge = np.zeros(ids.shape, np.uint8)
    across, down = ids[:, 1:] != ids[:, :-1], ids[1:] != ids[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge


def _outlines(doubled: np.ndarray) -> np.ndarray:
    """float32 (H, W): lines where the surface ids (2H, 2W) change, drawn at double size and then averaged."""
    drawn = cv2.GaussianBlur(_differs(doubled).astype(np.float32), (3, 3), 0)
    height, width = doubled.shape[0] // 2, doubled.shape[1] // 2
    mean = drawn.reshape(height, 2, width, 2).mean(axis=(1, 3))
    return np.clip(1.5 * mean, 0, 1).astype(np.float32)


def _labels(scene: Scene, ids: np.ndarray, ordered: np.ndarray) -> list[str]:
    first = np.unique(ordered, return_index=True)[1]
    return [scene.segments[i] for i in ids.ravel()[first]]


def describe_objects(scene: Scene, ids: np.ndarray, ordered: np.ndarray) -> list[dict[str, Any]]:
    """The visible objects of a picture, in the order of scene.things; every entry has the same keys and types.

    ids: int (H, W), indices into scene.segments. ordered: the segmentation that the sample stores.
    Keys: thing (index into scene.things), segment (id in the segmentation), shape, colour, material, share (of the image's
    pixels), x, y (centroid) and left, top, right, bottom (bounding box), all in 0..1 of the image's width and height,
    mentioned (is it in the caption), on (index of the thing that it stands on, -1 for the floor).
    """
    height, width = ids.shape
    found = []
    for index, thing in enumerate(scene.things):
        row, column = np.nonzero(ids == thing.segment)
        if not len(row):
            continue
        found.append(
            {
                "thing": index,
                "segment": int(ordered[row[0], column[0]]),
                "shape": thing.shape,
                "colour": thing.colour,
                "material": thing.material,
                "share": round(len(row) / ids.size, 6),
                "x": round((float(column.mean()) + 0.5) / width, 6),
                "y": round((float(row.mean()) + 0.5) / height, 6),
                "left": round(int(column.min()) / width, 6),
                "top": round(int(row.min()) / height, 6),
                "right": round((int(column.max()) + 1) / width, 6),
                "bottom": round((int(row.max()) + 1) / height, 6),
                "mentioned": index in scene.mentioned,
                "on": thing.supported_by,
            }
        )
    return found


def contact_sheet(renderings: list[Rendering], columns: int = 4) -> np.ndarray:
    """uint8 RGB: each rendering's image, depth, normals, segments and outlines in a row, `columns` renderings abreast."""
    rows = []
    for start in range(0, len(renderings), columns):
        panels = [_panel(rendering) for rendering in renderings[start : start + columns]]
        panels += [np.zeros_like(panels[0])] * (columns - len(panels))
        rows.append(np.concatenate(panels, axis=1))
    return np.concatenate(rows)


def _panel(rendering: Rendering) -> np.ndarray:
    near = 1 / rendering.depth_m
    depth = np.repeat((255 * near / near.max()).astype(np.uint8)[..., None], 3, axis=2)
    normal = np.nan_to_num(127.5 * (rendering.normal + 1)).astype(np.uint8)
    palette = np.random.default_rng(0).integers(40, 255, (256, 3)).astype(np.uint8)
    line = np.repeat((255 * rendering.line).astype(np.uint8)[..., None], 3, axis=2)
    return np.concatenate([rendering.image, depth, normal, palette[rendering.segmentation % 256], line], axis=1)
