"""From a scene to an image and its exact maps at any size."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from extract.world.scene import Scene
from extract.world.shading import shade, to_pixels
from extract.world.tracing import View, trace
from shards.core.errors import UserError
from shards.intrinsics import order_segments

_BRIGHTEST = 1.5
"""Linear light above this is cut before averaging, else one ray's highlight would swallow an edge."""


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
    rgb, hidden = shade(scene, view, rays, hits, pixel=1.0)
    surfaces = hits.surface_ids(height * width)

    depth = np.full(height * width, np.inf, np.float32)
    depth[hits.order] = hits.depth
    normal = np.full((height * width, 3), np.nan, np.float32)
    normal[hits.order] = (view.rotation.T.astype(np.float32) @ hits.normal).T
    segment = np.full(height * width, len(scene.segments) - 1, np.int32)
    for k, part in hits.slices:
        segment[hits.order[part]] = scene.primitives[k].segment

    pixels = to_pixels(rgb, scene.exposure).T.reshape(height, width, 3)
    fine = _refine(scene, view, pixels, surfaces.reshape(height, width), hidden.reshape(height, width))
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


def _refine(scene: Scene, view: View, pixels: np.ndarray, surfaces: np.ndarray, hidden: np.ndarray) -> _Fine:
    """Anti-aliasing: four rays for each pixel near the edge of a surface or of a shadow (textures are filtered already),
    and the outlines as those rays see them, at double resolution.

    pixels: uint8 (H, W, 3). surfaces: int32 (H, W) ids of smooth surfaces. hidden: uint8 (H, W) lights that are not seen.
    """
    around = np.ones((3, 3), np.uint8)
    row, column = np.nonzero(cv2.dilate(_differs(surfaces), around) | _differs(hidden))
    doubled = np.repeat(np.repeat(surfaces, 2, axis=0), 2, axis=1)
    image = np.ascontiguousarray(pixels)
    if len(row):
        offsets = np.array([[-0.25, -0.25], [-0.25, 0.25], [0.25, -0.25], [0.25, 0.25]], np.float32)
        y = (row.astype(np.float32) + np.float32(0.5) + offsets[:, :1]).ravel()
        x = (column.astype(np.float32) + np.float32(0.5) + offsets[:, 1:]).ravel()
        rays = view.rays(x, y)
        hits = trace(scene, view, rays)
        rgb, _ = shade(scene, view, rays, hits, pixel=0.6, seed=scene.index)
        mean = np.minimum(rgb, _BRIGHTEST).reshape(3, 4, -1).mean(axis=1)
        image[row, column] = to_pixels(mean, scene.exposure).T
        doubled[(2 * y - 0.5).round().astype(np.intp), (2 * x - 0.5).round().astype(np.intp)] = hits.surface_ids(len(x))
    return _Fine(image, _outlines(doubled))


def _differs(ids: np.ndarray) -> np.ndarray:
    """uint8 (H, W): 1 on both pixels of each pair of neighbours (4-neighbourhood) with different ids."""
    edge = np.zeros(ids.shape, bool)
    across, down = ids[:, 1:] != ids[:, :-1], ids[1:] != ids[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge.view(np.uint8)


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
