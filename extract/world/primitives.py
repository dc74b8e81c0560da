"""Rays against canonical convex bodies within [-1, 1]^3, and what the surface is like where they hit.

Arrays are (3, N): one contiguous row per coordinate. A ray is o + t d in the body's own frame, where o and d may be
(3, 1) if all rays share them. Because bodies are only moved, turned and scaled, t is the same as in the world.

    sphere    |p| = 1                          cylinder  x^2 + z^2 = 1, |y| <= 1
    cone      apex (0, 1, 0), base y = -1      box, pyramid (apex (0, 1, 0)), wedge (ridge along x at y = 1): FACES
    plane     y = 0, seen from y > 0; infinite
"""

from functools import lru_cache

import numpy as np

FACES: dict[str, np.ndarray] = {
    "box": np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], np.float32),
    "pyramid": np.array([[2, 1, 0], [-2, 1, 0], [0, 1, 2], [0, 1, -2], [0, -1, 0]], np.float32),
    "wedge": np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 2], [0, 1, -2], [0, -1, 0]], np.float32),
}
"""Rows n of the faces n . p = 1 of each polyhedron; inside is n . p <= 1 for all of them."""
KINDS = ("sphere", "cylinder", "cone", "plane", *FACES)
MAX_FACES = 8
_TINY = np.float32(1e-12)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scalar products (N,) of the columns of (3, N) or (3, 1) arrays: four times as fast as a sum over the short axis."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(a: np.ndarray) -> np.ndarray:
    """The columns of (3, N) at length 1."""
    return a / np.sqrt(dot(a, a))


def intersect(kind: str, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave a body: float (t_in, t_out), each (N,); t_in > t_out or NaN where they miss it.

    t may be negative: behind the ray's origin. For "plane" only t_in counts, and only rays from above hit.
    """
    with np.errstate(all="ignore"):
        if kind in FACES:
            return _polyhedron(FACES[kind].astype(d.dtype, copy=False), o, d)
        return _BODIES[kind](o, d)


def _polyhedron(faces: np.ndarray, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    speed = faces @ d + _TINY  # (F, N)
    t = (1 - faces @ o) / speed
    entering = speed < 0
    t_in, t_out = np.where(entering, t, -np.inf), np.where(entering, np.inf, t)
    first, last = t_in[0], t_out[0]
    for row in range(1, len(faces)):  # reductions over a short axis are several times slower
        first, last = np.maximum(first, t_in[row]), np.minimum(last, t_out[row])
    return first, last


def _quadratic(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Roots of a t^2 + 2 b t + c, the smaller first if a > 0; NaN where there are none."""
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def _sphere(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # The discriminant from the ray's nearest point to the centre: c = |o|^2 - 1 would cancel in float32 from far away.
    a = dot(d, d)
    middle = -dot(o, d) / a
    nearest = o + middle * d
    half = np.sqrt((1 - dot(nearest, nearest)) / a)
    return middle - half, middle + half


def _cylinder(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a = d[0] * d[0] + d[2] * d[2] + _TINY
    middle = -(o[0] * d[0] + o[2] * d[2]) / a
    x, z = o[0] + middle * d[0], o[2] + middle * d[2]
    half = np.sqrt((1 - x * x - z * z) / a)
    lid, base = (1 - o[1]) / (d[1] + _TINY), (-1 - o[1]) / (d[1] + _TINY)
    return np.maximum(middle - half, np.minimum(lid, base)), np.minimum(middle + half, np.maximum(lid, base))


def _cone(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # 4 (x^2 + z^2) = (1 - y)^2 from the base to the apex. The line meets a convex body's boundary twice or never, so
    # among the crossings of the side and of the base that lie on the body, the first is the way in, the last the way out.
    # Crossings are counted from the ray's nearest point to the axis' middle, else float32 would cancel from far away.
    start = -dot(o, d) / dot(d, d)
    o = o + start * d
    h = 1 - o[1]
    a = 4 * (d[0] * d[0] + d[2] * d[2]) - d[1] * d[1]
    b = 4 * (o[0] * d[0] + o[2] * d[2]) + h * d[1]
    c = 4 * (o[0] * o[0] + o[2] * o[2]) - h * h
    first, second = _quadratic(np.where(np.abs(a) < 1e-6, np.asarray(1e-6, d.dtype), a), b, c)
    base = (-1 - o[1]) / (d[1] + _TINY)
    x, z = o[0] + base * d[0], o[2] + base * d[2]
    on_base = x * x + z * z <= 1
    t_in, t_out = np.where(on_base, base, np.inf), np.where(on_base, base, -np.inf)
    for t in (first, second):
        on_side = np.abs(o[1] + t * d[1]) <= 1
        t_in, t_out = np.minimum(t_in, np.where(on_side, t, np.inf)), np.maximum(t_out, np.where(on_side, t, -np.inf))
    return start + t_in, start + t_out


def _plane(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    t = -o[1] / d[1]
    t = np.where((o[1] > 0) & (d[1] < 0), t, np.nan)
    return t, np.full_like(t, np.inf)


_BODIES = {"sphere": _sphere, "cylinder": _cylinder, "cone": _cone, "plane": _plane}


def describe_hits(kind: str, p: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the surface is like at points p (3, N) on a body, in the body's frame.

    scale: (3,) half extents in metres. Returns (face int (N,) below MAX_FACES, unit normal (3, N) to be turned to the world
    by the rotation alone, uv (2, N) texture coordinates in metres, v upwards on upright faces).
    """
    if kind in FACES:
        return _polyhedron_hits(kind, p, scale)
    s = scale[:, None]
    if kind == "plane":
        face = np.zeros(p.shape[1], np.int16)
        up = np.zeros_like(p)
        up[1] = 1
        return face, up, p[[0, 2]] * s[[0, 2]]
    if kind == "sphere":
        r = float(scale.max())
        latitude = np.arcsin(np.clip(p[1], -1, 1))
        return np.zeros(p.shape[1], np.int16), unit(p / s), np.stack([np.arctan2(p[0], p[2]) * r, latitude * r])
    return _round_hits(kind, p, scale)


def _round_hits(kind: str, p: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cylinder and cone: face 0 is the side, 1 the lid, 2 the base."""
    radius = np.sqrt(p[0] * p[0] + p[2] * p[2])
    if kind == "cylinder":
        face = np.where(np.abs(p[1]) < radius, 0, np.where(p[1] > 0, 1, 2)).astype(np.int16)
        side = np.stack([p[0], np.zeros_like(radius), p[2]])
    else:
        face = np.where(np.abs(radius - (1 - p[1]) / 2) < p[1] + 1, 0, 2).astype(np.int16)
        side = np.stack([p[0], radius / 2, p[2]])
    flat = np.zeros_like(p)
    flat[1] = np.where(face == 1, 1, -1)
    on_side = face == 0
    u = np.where(on_side, np.arctan2(p[0], p[2]) * max(scale[0], scale[2]), p[0] * scale[0])
    v = np.where(on_side, p[1] * scale[1], p[2] * scale[2])
    return face, np.where(on_side, unit(side / scale[:, None]), flat), np.stack([u, v])


def _polyhedron_hits(kind: str, p: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    faces, lengths, normals, axes = _frames(kind, *(float(s) for s in scale))
    excess = (faces @ p - 1) / lengths
    face, most = np.zeros(p.shape[1], np.int16), excess[0]
    for row in range(1, len(faces)):
        face[excess[row] > most] = row
        most = np.maximum(most, excess[row])
    uv = np.take_along_axis(axes @ p, face[None, None].astype(np.intp), axis=1)[:, 0]
    return face, normals.T[:, face], uv


@lru_cache(maxsize=256)
def _frames(kind: str, sx: float, sy: float, sz: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of a scaled polyhedron: its faces (F, 3), their lengths (F, 1), unit normals (F, 3), and texture axes (2, F, 3)."""
    faces, scale = FACES[kind], np.array([sx, sy, sz], np.float32)
    normals = faces / scale
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    nx, ny, nz = normals.T
    level = np.abs(ny) > 0.99
    zero = np.zeros_like(nx)
    across = np.stack([np.where(level, ny, nz), zero, np.where(level, zero, -nx)], axis=1)
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    axes = np.stack([across, np.cross(normals, across)]) * scale
    return faces, np.linalg.norm(faces, axis=1, keepdims=True), normals, axes.astype(np.float32)
