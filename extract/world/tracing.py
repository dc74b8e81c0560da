"""From a scene and pixel positions to what is seen there, and which of it lies in the shadow of which light."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from extract.world.primitives import MAX_FACES, describe_hits, intersect
from extract.world.scene import Light, Primitive, Scene

FLOOR_FAR_M = 100.0
"""Depth at which the floor ends and the sky begins: close enough to the horizon, yet finite."""
_NEAR_M = 0.05
Bounds = tuple[float, float, float, float]
EVERYWHERE: Bounds = (-np.inf, -np.inf, np.inf, np.inf)


@dataclass(frozen=True)
class Rays:
    """Rays through pixel positions. x, y: float32 (N,), pixels from the image's left and top edges.

    direction: float32 (3, N) in the world; along it the parameter t is z-depth in metres.
    """

    x: np.ndarray
    y: np.ndarray
    direction: np.ndarray
    grid: tuple[int, int] | None
    """(height, width) where the rays are the pixel centres of an image, in row-major order."""


@dataclass(frozen=True)
class View:
    """A scene's camera at one image size. focal_px: focal length in pixels; cx, cy: the principal point."""

    rotation: np.ndarray
    position: np.ndarray
    focal_px: float
    width: int
    height: int

    @classmethod
    def of(cls, scene: Scene, height: int, width: int) -> "View":
        camera = scene.camera
        position = np.array(camera.position, np.float32)
        return cls(camera.rotation(), position, camera.focal * min(height, width), width, height)

    def grid(self) -> Rays:
        """The rays of all pixel centres."""
        x = np.tile(np.arange(self.width, dtype=np.float32) + 0.5, self.height)
        y = np.repeat(np.arange(self.height, dtype=np.float32) + 0.5, self.width)
        return self.rays(x, y, (self.height, self.width))

    def rays(self, x: np.ndarray, y: np.ndarray, grid: tuple[int, int] | None = None) -> Rays:
        """The rays through positions x, y (N,) in pixels."""
        in_camera = np.empty((3, len(x)), np.float32)
        in_camera[0] = (x - self.width / 2) / self.focal_px
        in_camera[1] = (self.height / 2 - y) / self.focal_px
        in_camera[2] = -1
        return Rays(x, y, self.rotation.astype(np.float32) @ in_camera, grid)

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """World points (3, N) -> (x, y in pixels, z-depth in metres)."""
        p = self.rotation.T @ (points - self.position[:, None])
        z = -p[2]
        safe = np.where(np.abs(z) < 1e-6, 1e-6, z)
        return self.width / 2 + self.focal_px * p[0] / safe, self.height / 2 - self.focal_px * p[1] / safe, z

    def bounds(self, bodies: Sequence[Primitive]) -> list[Bounds]:
        """(left, top, right, bottom) in pixels that hold each body; everything, for planes and what is beside the camera."""
        x, y, z = (a.reshape(-1, 8) for a in self.project(_boxes(bodies)))
        limits = np.stack([x.min(axis=1), y.min(axis=1), x.max(axis=1), y.max(axis=1)], axis=1)
        unbounded = z.min(axis=1) < _NEAR_M
        unbounded |= [body.kind == "plane" for body in bodies]
        limits[unbounded] = EVERYWHERE
        return [tuple(row) for row in limits.tolist()]


def _boxes(bodies: Sequence[Primitive]) -> np.ndarray:
    """(3, 8 K) float32: the corners of the bodies' boxes."""
    return np.concatenate([body.box for body in bodies], axis=1)


def _within(rays: Rays, bounds: Bounds) -> np.ndarray:
    """Indices of the rays inside the bounds."""
    left, top, right, bottom = bounds
    if bounds == EVERYWHERE:
        return np.arange(len(rays.x))
    if rays.grid is not None:
        height, width = rays.grid
        x0, x1 = max(int(left - 0.5), 0), min(int(right + 1), width)
        y0, y1 = max(int(top - 0.5), 0), min(int(bottom + 1), height)
        if x0 >= x1 or y0 >= y1:
            return np.empty(0, np.intp)
        return (np.arange(y0, y1)[:, None] * width + np.arange(x0, x1)).ravel()
    return np.flatnonzero((rays.x >= left) & (rays.x <= right) & (rays.y >= top) & (rays.y <= bottom))


def crossings(body: Primitive, view: View, rays: Rays, bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """(indices of rays that hit the body, their z-depths in metres); rays outside the bounds are not asked."""
    index = _within(rays, bounds)
    if not len(index):
        return index, np.empty(0, np.float32)
    o = body.to_body @ (view.position[:, None] - body.middle)
    direction = rays.direction if len(index) == len(rays.x) else rays.direction[:, index]
    t_in, t_out = intersect(body.kind, o, body.to_body @ direction)
    far = FLOOR_FAR_M if body.kind == "plane" else np.inf
    with np.errstate(invalid="ignore"):
        hit = (t_in <= t_out) & (t_in > _NEAR_M) & (t_in < far)
    return index[hit], t_in[hit]


def nearest(scene: Scene, view: View, rays: Rays) -> tuple[np.ndarray, np.ndarray]:
    """(z-depth float32 (N,), +inf for sky; index of the primitive int16 (N,), -1 for sky)."""
    depth = np.full(len(rays.x), np.inf, np.float32)
    body_of = np.full(len(rays.x), -1, np.int16)
    for k, (body, bounds) in enumerate(zip(scene.primitives, view.bounds(scene.primitives), strict=True)):
        index, t = crossings(body, view, rays, bounds)
        closer = t < depth[index]
        index = index[closer]
        depth[index] = t[closer]
        body_of[index] = k
    return depth, body_of


@dataclass(frozen=True)
class Hits:
    """What rays see, sorted by primitive so that each one's hits are a slice. Rays that see sky are left out.

    All arrays have one column per hit: `order` the ray, depth z in metres, point and unit normal (3, M) in the world,
    uv (2, M) in metres on the surface, face below MAX_FACES. slices: (primitive index, slice of the columns) in order.
    """

    order: np.ndarray
    depth: np.ndarray
    direction: np.ndarray
    point: np.ndarray
    normal: np.ndarray
    uv: np.ndarray
    face: np.ndarray
    slices: tuple[tuple[int, slice], ...]

    def bodies(self) -> np.ndarray:
        """int16 (M,): the index of each hit's primitive."""
        return np.repeat([k for k, _ in self.slices], [part.stop - part.start for _, part in self.slices]).astype(
            np.int16
        )

    def surface_ids(self, n: int) -> np.ndarray:
        """int32 (n,): a number per ray that changes where one smooth surface ends and another begins; 0 for sky."""
        ids = np.zeros(n, np.int32)
        for k, part in self.slices:
            ids[self.order[part]] = 1 + k * MAX_FACES + self.face[part]
        return ids


def trace(scene: Scene, view: View, rays: Rays) -> Hits:
    """Everything that the rays see first."""
    depth, body_of = nearest(scene, view, rays)
    order = np.argsort(body_of, kind="stable")
    counts = np.bincount(body_of[order] + 1, minlength=len(scene.primitives) + 1)
    order = order[counts[0] :]
    edges = np.concatenate([[0], np.cumsum(counts[1:])])
    slices = tuple((k, slice(edges[k], edges[k + 1])) for k in range(len(scene.primitives)) if counts[k + 1])
    z, direction = depth[order], rays.direction[:, order]
    point = view.position[:, None] + z * direction
    normal, uv = np.empty_like(point), np.empty_like(point[:2])
    face = np.empty(len(order), np.int16)
    for k, part in slices:
        body = scene.primitives[k]
        local = body.to_body @ (point[:, part] - body.middle)
        face[part], n, uv[:, part] = describe_hits(body.kind, local, body.scale.astype(np.float32))
        normal[:, part] = body.rotation.astype(np.float32) @ n
    return Hits(order, z, direction, point, normal, uv, face, slices)


def shadows(scene: Scene, light: Light, hits: Hits, facing: np.ndarray, jitter: np.ndarray | None = None) -> np.ndarray:
    """bool (M,): hits from which the light is hidden by another primitive.

    facing: bool (M,), the hits worth asking for. jitter: float32 (3, M) moves the light per hit (for soft edges).
    """
    dark = np.zeros(len(hits.order), bool)
    axes, room = _light_axes(light), 0.0 if jitter is None else light.size
    casters = [(k, body) for k, body in enumerate(scene.primitives) if body.kind != "plane"]
    asked = np.flatnonzero(facing)
    if not casters or not len(asked):
        return dark
    bounds = _bounds_from_light(light, axes, [body for _, body in casters], room)
    x, y = _from_light(light, axes, hits.point[:, asked])
    inside = _inside(x, y, np.array(bounds).T)
    asked, x, y = asked[inside], x[inside], y[inside]
    body_of, point = hits.bodies()[asked], hits.point[:, asked]
    target = np.array(light.point, np.float32)[:, None]
    if jitter is not None:
        target = target + jitter[:, asked]
    for (k, body), (left, low, right, high) in zip(casters, bounds, strict=True):
        index = np.flatnonzero((x >= left) & (x <= right) & (y >= low) & (y <= high) & (body_of != k))
        if not len(index):
            continue
        o = body.to_body @ (point[:, index] - body.middle)
        aim = target if target.shape[1] == 1 else target[:, index]
        t_in, t_out = intersect(body.kind, o, body.to_body @ (aim if light.sun else aim - point[:, index]))
        with np.errstate(invalid="ignore"):
            hit = (t_in <= t_out) & (t_out > 1e-4) & (t_in < (np.inf if light.sun else 1))
        dark[asked[index[hit]]] = True
    return dark


def _inside(x: np.ndarray, y: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """bool (N,): places in the box round several boxes. bounds: (4, K), rows left, low, right, high."""
    left, low, right, high = bounds[0].min(), bounds[1].min(), bounds[2].max(), bounds[3].max()
    return (x >= np.float32(left)) & (x <= np.float32(right)) & (y >= np.float32(low)) & (y <= np.float32(high))


_LAMP_CLEARANCE_M = 0.05


def _light_axes(light: Light) -> np.ndarray:
    """float32 (2, 3): directions across a sun's rays, of any length."""
    x, y, z = light.point
    right = (z, 0.0, -x) if abs(y) < 0.999 * (x * x + y * y + z * z) ** 0.5 else (1.0, 0.0, 0.0)
    return np.array([right, np.cross(light.point, right)], np.float32)


def _from_light(light: Light, axes: np.ndarray, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where points (3, N) are in a picture taken by the light: along a sun's rays, or straight down from a lamp.

    What hides the light from a point is at the same place of that picture. Points above a lamp are infinitely far to the
    side: no body that is wholly below the lamp hides it from them.
    """
    at = np.array(light.point, np.float32)
    if light.sun:
        x, y = axes @ point
        return x, y
    below = at[1] - point[1]
    scale = 1 / np.where(below > 1e-3, below, np.float32(1))
    return np.where(below > 1e-3, (point[0] - at[0]) * scale, np.float32(np.inf)), (point[2] - at[2]) * scale


def _bounds_from_light(light: Light, axes: np.ndarray, bodies: Sequence[Primitive], size: float) -> list[Bounds]:
    """(left, low, right, high) of each body in the light's picture, with room for a light of some size.

    Everything, for bodies that are not wholly below a lamp.
    """
    boxes = _boxes(bodies)
    x, y = (a.reshape(-1, 8) for a in _from_light(light, axes, boxes))
    room = size * (6.0 if light.sun else 3.0)
    limits = np.stack([x.min(axis=1) - room, y.min(axis=1) - room, x.max(axis=1) + room, y.max(axis=1) + room], axis=1)
    if not light.sun:
        limits[light.point[1] - boxes[1].reshape(-1, 8).max(axis=1) < _LAMP_CLEARANCE_M] = EVERYWHERE
    return [tuple(row) for row in limits.tolist()]
