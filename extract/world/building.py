"""From the name of a shape to its primitives, painted in a material."""

from dataclasses import dataclass

import numpy as np

from extract.world.scene import Primitive, Surface, Vector
from extract.world.shading import linear
from extract.world.vocabulary import Colour, Material

_BARK: Colour = (0.30, 0.19, 0.11)
_ROOFS: tuple[Colour, ...] = ((0.36, 0.16, 0.11), (0.22, 0.22, 0.25), (0.45, 0.30, 0.18))
_GLASS: Colour = (0.55, 0.68, 0.76)
_DOOR: Colour = (0.28, 0.17, 0.09)
_DARK, _LIGHT = (0.10, 0.10, 0.12), (0.92, 0.91, 0.88)


@dataclass(frozen=True)
class SolidPart:
    """One body of a shape in units of the shape's size, before it is turned and put somewhere; y = 0 is the floor."""

    kind: str
    centre: Vector
    scale: Vector
    colour: Colour | None = None
    """None: the thing's own colour and material."""


@dataclass(frozen=True)
class Plan:
    """A shape at size 1: its parts, the radius of the floor that it takes, and its height."""

    parts: tuple[SolidPart, ...]
    reach: float
    height: float


def plan(shape: str, rng: np.random.Generator) -> Plan:
    """The parts of a shape, with the freedom that its name leaves (a cylinder may be tall or flat)."""
    tall = float(rng.uniform(0.8, 1.25))
    roof = _ROOFS[rng.integers(len(_ROOFS))]
    round_crown = bool(rng.random() < 0.5)
    match shape:
        case "sphere":
            return Plan((SolidPart("sphere", (0, 1, 0), (1, 1, 1)),), 1.0, 2.0)
        case "cube":
            return Plan((SolidPart("box", (0, 0.9, 0), (0.9, 0.9, 0.9)),), 1.28, 1.8)
        case "cylinder":
            return Plan((SolidPart("cylinder", (0, tall, 0), (0.8, tall, 0.8)),), 0.8, 2 * tall)
        case "cone":
            return Plan((SolidPart("cone", (0, 1.15 * tall, 0), (0.95, 1.15 * tall, 0.95)),), 0.95, 2.3 * tall)
        case "pyramid":
            return Plan((SolidPart("pyramid", (0, 0.9 * tall, 0), (1, 0.9 * tall, 1)),), 1.42, 1.8 * tall)
        case "table":
            return _table(tall)
        case "chair":
            return _chair()
        case "house":
            return _house(roof)
        case "tree":
            return _tree(round_crown)
    raise KeyError(shape)


def _table(tall: float) -> Plan:
    height = 1.35 * tall
    legs = tuple(
        SolidPart("box", (x * 1.3, (height - 0.2) / 2, z * 0.8), (0.11, (height - 0.2) / 2, 0.11))
        for x in (-1, 1)
        for z in (-1, 1)
    )
    return Plan((SolidPart("box", (0, height - 0.1, 0), (1.5, 0.1, 1.0)), *legs), 1.8, height)


def _chair() -> Plan:
    legs = tuple(SolidPart("box", (x * 0.52, 0.43, z * 0.52), (0.09, 0.43, 0.09)) for x in (-1, 1) for z in (-1, 1))
    seat, back = (
        SolidPart("box", (0, 0.94, 0), (0.65, 0.08, 0.65)),
        SolidPart("box", (0, 1.62, -0.57), (0.65, 0.60, 0.08)),
    )
    return Plan((seat, back, *legs), 0.92, 2.22)


def _house(roof: Colour) -> Plan:
    windows = tuple(SolidPart("box", (x, 0.85, 0.8), (0.2, 0.22, 0.03), _GLASS) for x in (-0.62, 0.62))
    sides = tuple(SolidPart("box", (x, 0.85, 0), (0.03, 0.22, 0.25), _GLASS) for x in (-1.0, 1.0))
    door = SolidPart("box", (0, 0.48, 0.8), (0.22, 0.48, 0.04), _DOOR)
    chimney = SolidPart("box", (0.55, 2.15, -0.35), (0.14, 0.42, 0.14), roof)
    body, top = (
        SolidPart("box", (0, 0.75, 0), (1.0, 0.75, 0.8)),
        SolidPart("wedge", (0, 1.95, 0), (1.12, 0.45, 0.98), roof),
    )
    return Plan((body, top, door, chimney, *windows, *sides), 1.5, 2.5)


def _tree(round_crown: bool) -> Plan:
    trunk = SolidPart("cylinder", (0, 0.4, 0), (0.16, 0.42, 0.16), _BARK)
    if round_crown:
        return Plan((trunk, SolidPart("sphere", (0, 1.65, 0), (0.95, 0.95, 0.95))), 0.95, 2.6)
    tiers = ((1.15, 0.55, 0.95), (1.75, 0.50, 0.74), (2.3, 0.45, 0.52))
    return Plan((trunk, *(SolidPart("cone", (0, y, 0), (r, h, r)) for y, h, r in tiers)), 0.95, 2.75)


def build(
    shape: Plan, *, size: float, at: Vector, turned: np.ndarray, colour: Colour, material: Material, segment: int
) -> list[Primitive]:
    """The primitives of a shape: `size` metres per unit of the plan, standing at `at`, turned by `turned` (3, 3)."""
    primitives = []
    for part in shape.parts:
        scale = np.array(part.scale, float) * size
        if part.colour is None:
            surface = paint(colour, material, part.kind, scale, size)
        else:
            surface = Surface(texture="plain", colour=linear(part.colour), second=linear(part.colour))
        centre = turned @ (np.array(part.centre, float) * size) + np.array(at)
        primitives.append(
            Primitive(kind=part.kind, centre=centre, scale=scale, rotation=turned, surface=surface, segment=segment)
        )
    return primitives


def paint(colour: Colour, material: Material, kind: str, scale: np.ndarray, size: float) -> Surface:
    """A material in a colour, its pattern fitted to a body so that it closes round it and is centred on flat faces."""
    period = 2 * np.pi * size / (material.repeats * 2)
    if kind in ("sphere", "cylinder", "cone"):
        radius = float(max(scale[0], scale[2]))
        around = 2 * np.pi * radius
        per_metre = max(2, round(around / period)) / around
        offset = (0.0, 0.5)
    else:
        width = 2 * float(scale[0])
        per_metre = max(1, round(width / period)) / width
        offset = (0.5, 0.5) if round(width * per_metre) % 2 else (0.0, 0.0)
    bright = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 0.62
    return Surface(
        texture=material.texture,
        colour=linear(colour),
        second=linear(_DARK if bright else _LIGHT),
        scale=(per_metre, per_metre),
        offset=offset,
        specular=material.specular,
        gloss=material.gloss,
        metal=material.metal,
    )


def yaw(angle: float) -> np.ndarray:
    """(3, 3) rotation by `angle` radians about the upright axis."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def any_rotation(rng: np.random.Generator) -> np.ndarray:
    """(3, 3), uniform over all rotations."""
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q
