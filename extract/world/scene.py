"""What a scene is: plain data, in metres, in a world frame with x right, y up and z towards the viewer.

A scene says nothing about pixels: it can be rendered at any size and aspect ratio. The camera's focal length is a
multiple of the image's shorter side, so a wider picture shows more at its sides and the middle square stays the same.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

_CUBE = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32).T
Vector = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A texture between two linear RGB colours, and how it shines. Texture coordinates are metres on the surface."""

    texture: str
    colour: Vector
    second: Vector
    scale: tuple[float, float] = (1.0, 1.0)
    """Periods of the texture per metre along u and v."""
    offset: tuple[float, float] = (0.0, 0.0)
    """In periods."""
    specular: float = 0.0
    gloss: float = 20.0
    metal: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Primitive:
    """One convex solid (or the half space of kind "plane"): a canonical body within [-1, 1]^3, scaled, turned, moved."""

    kind: str
    centre: np.ndarray
    """(3,) metres."""
    scale: np.ndarray
    """(3,) half extents in metres along the body's own axes."""
    rotation: np.ndarray
    """(3, 3) from the body's axes to the world's."""
    surface: Surface
    segment: int
    """Index into Scene.segments."""

    @cached_property
    def to_body(self) -> np.ndarray:
        """(3, 3) float32 from the world's axes to the canonical body's."""
        return (self.rotation.T / self.scale[:, None]).astype(np.float32)

    @cached_property
    def middle(self) -> np.ndarray:
        """(3, 1) float32: the centre, in metres."""
        return self.centre.astype(np.float32)[:, None]

    @cached_property
    def box(self) -> np.ndarray:
        """(3, 8) float32: corners of the turned box that holds the body (not for planes), in metres."""
        return (self.rotation @ (_CUBE * self.scale[:, None]) + self.centre[:, None]).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Light:
    """A sun (`point` is the direction towards it, unit) or a lamp (`point` is where it hangs); linear RGB power.

    A lamp's power is what it sends to a surface at distance `reach_m`; nearer is brighter.
    """

    point: Vector
    power: Vector
    sun: bool
    reach_m: float = 1.0
    size: float = 0.05
    """Radius over distance: how soft its shadows are."""


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole that looks along -z of its own frame, pitched about x and rolled about its axis."""

    position: Vector
    pitch: float
    """Radians downwards."""
    roll: float
    focal: float
    """Focal length over the image's shorter side."""

    def rotation(self) -> np.ndarray:
        """(3, 3) float64; columns are the camera's x (right), y (up) and z (backwards) axes in the world."""
        c, s, cr, sr = np.cos(self.pitch), np.sin(self.pitch), np.cos(self.roll), np.sin(self.roll)
        pitched = np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
        return pitched @ np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])


@dataclass(frozen=True, kw_only=True)
class Backdrop:
    """What is where nothing is hit, and the light from everywhere: linear RGB colours."""

    name: str
    horizon: Vector
    zenith: Vector
    clouds: float
    cloud_shift: tuple[float, float]
    sky_light: Vector
    """Ambient light on a surface that faces up."""
    ground_light: Vector
    """Ambient light on a surface that faces down."""
    bright_side: Vector
    """Where more ambient light comes from: the light varies by this (a level vector, below 1) times the normal."""
    haze_m: float
    """Distance at which the horizon's colour takes over by 63 %."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object, made of one primitive or several; they share a segment."""

    shape: str
    colour: str
    material: str
    segment: int
    supported_by: int = -1
    """Index of the thing that it stands on; -1 for the floor."""
    hue_matters: bool = True
    """False where the colour name is only roughly right (randomised scenes); captions leave it out."""


@dataclass(frozen=True)
class Relation:
    """things[subject] is `relation` things[object]; object -1 is the floor."""

    subject: int
    relation: str
    object: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All of a scene. Two scenes of the same (seed, index, variety) are equal, whatever they are rendered at."""

    seed: int
    index: int
    variety: float
    camera: Camera
    primitives: tuple[Primitive, ...]
    segments: tuple[str, ...]
    """What each segment is: "floor", "wall", a shape, and "sky" last."""
    things: tuple[Thing, ...]
    lights: tuple[Light, ...]
    backdrop: Backdrop
    floor: str
    wall: str
    sky: str
    """Names in the tables of the vocabulary; "" where there is none, or none that has a name."""
    caption: str
    relations: tuple[Relation, ...]
    mentioned: tuple[int, ...]
    """Things that the caption names."""
    exposure: float = 1.0
