"""Where a scene plays: camera, floor, walls or open sky, and lights."""

from dataclasses import dataclass

import numpy as np

from extract.world.building import yaw
from extract.world.scene import Backdrop, Camera, Light, Primitive, Surface, Vector
from extract.world.shading import linear
from extract.world.textures import TEXTURES
from extract.world.vocabulary import FLOORS, PAINTS, SKIES, WALLS, Colour, Ground

_AIR_M = 0.8
"""Least distance of the camera to a wall."""


@dataclass(frozen=True)
class Setting:
    """Everything but the things and the lights. Names are "" where a caption has nothing to say."""

    bodies: tuple[Primitive, ...]
    segments: tuple[str, ...]
    floor: str
    wall: str
    paint: str
    sky: str
    backdrop: Backdrop
    indoors: bool


def camera_for(radius: float, rng: np.random.Generator, *, wild: bool) -> Camera:
    """A camera that frames the disc of `radius` metres about the origin."""
    fov = np.radians(rng.uniform(22, 85) if wild else rng.uniform(32, 60))
    above = np.radians(rng.uniform(1, 60) if wild else rng.uniform(8, 36))
    focal = 0.5 / np.tan(fov / 2)
    distance = radius * (1 + 1.9 * focal) * float(rng.uniform(0.45, 1.15) if wild else rng.uniform(0.85, 1.0))
    aim = float(rng.uniform(0.15, 0.45))
    position = (0.0, float(aim + distance * np.sin(above)), float(distance * np.cos(above)))
    tilt, roll = (rng.uniform(-6, 6), rng.uniform(-12, 12)) if wild else (rng.uniform(-1, 2), 0.0)
    return Camera(
        position=position, pitch=float(above + np.radians(tilt)), roll=float(np.radians(roll)), focal=float(focal)
    )


def setting_for(radius: float, camera: Camera, rng: np.random.Generator, *, wild: bool) -> Setting:
    """Floor, walls and sky round a disc of `radius` metres about the origin."""
    kind = rng.choice(["open", "yard", "wall", "corner"], p=[0.42, 0.12, 0.26, 0.20])
    indoors = kind in ("wall", "corner")
    floors = [name for name, ground in FLOORS.items() if (ground.indoors if indoors else ground.outdoors)]
    floor = floors[rng.integers(len(floors))]
    wall = list(WALLS)[rng.choice(3, p=[0.3, 0.2, 0.5])] if kind != "open" else ""
    paint = list(PAINTS)[rng.integers(len(PAINTS))] if wall == "painted" else ""
    sky = list(SKIES)[rng.integers(len(SKIES))]

    turn = float(rng.uniform(0, 2 * np.pi))
    bodies = [_plane(np.zeros(3), yaw(turn), _ground(FLOORS[floor], None, rng, wild), 0)]
    segments = ["floor"]
    if wall:
        surface = _ground(WALLS[wall], PAINTS.get(paint), rng, wild)
        bodies += _walls(str(kind), radius, camera, surface, rng)
        segments += ["wall"] * (len(bodies) - 1)
    backdrop = _backdrop(sky, indoors, bodies[0].surface, rng, wild)
    says = not wild
    return Setting(
        bodies=tuple(bodies),
        segments=tuple(segments),
        floor=floor if says else "",
        wall=wall if says else "",
        paint=paint if says else "",
        sky=sky if says and kind == "open" else "",
        backdrop=backdrop,
        indoors=indoors,
    )


def _plane(centre: np.ndarray, rotation: np.ndarray, surface: Surface, segment: int) -> Primitive:
    return Primitive(kind="plane", centre=centre, scale=np.ones(3), rotation=rotation, surface=surface, segment=segment)


def _walls(kind: str, radius: float, camera: Camera, surface: Surface, rng: np.random.Generator) -> list[Primitive]:
    """One wall behind the disc, low and with a top in a yard, and in a corner a second one at a right angle to it."""
    turn = float(np.radians(rng.uniform(-24, 24) if kind != "corner" else rng.uniform(8, 40) * rng.choice([-1, 1])))
    gap = radius + float(rng.uniform(0.7, 2.2))
    side = radius + float(rng.uniform(0.7, 1.6))
    if kind == "yard":
        height, turned = float(rng.uniform(0.35, 0.8)), yaw(turn * 0.5)
        centre = turned @ np.array([0, height, -gap - 0.12])
        box = Primitive(
            kind="box", centre=centre, scale=np.array([40, height, 0.12]), rotation=turned, surface=surface, segment=1
        )
        return [box]
    upright = np.array(
        [[1, 0, 0], [0, 0, -1], [0, 1, 0]], float
    )  # the plane's y becomes the world's z, its -z the world's y
    back = yaw(turn)
    planes = [_plane(back @ np.array([0, 0, -gap]), back @ upright, surface, 1)]
    if kind == "corner":
        hand = -np.sign(turn)  # the wall that the first one turns towards
        across = yaw(turn - hand * np.pi / 2)
        planes.append(_plane(across @ np.array([0, 0, -side]), across @ upright, surface, 2))
    eye = np.array(camera.position)
    return [p for n, p in enumerate(planes) if n == 0 or (eye - p.centre) @ p.rotation[:, 1] > _AIR_M]


def _ground(ground: Ground, paint: Colour | None, rng: np.random.Generator, wild: bool) -> Surface:
    """A floor's or wall's surface; if wild, of any texture and colours."""
    if paint is not None:
        first, second = paint, tuple(0.93 * c for c in paint)
    else:
        first, second = ground.pairs[rng.integers(len(ground.pairs))]
    texture, period = ground.texture, ground.period_m * float(rng.uniform(0.85, 1.2))
    specular, gloss = ground.specular, ground.gloss
    if wild:
        texture = sorted(TEXTURES)[rng.integers(len(TEXTURES))]
        base = rng.random(3) * rng.uniform(0.2, 1.0)
        base = base.mean() + (base - base.mean()) * rng.random()  # most real surfaces are greyish
        first = tuple(base)
        second = tuple(np.clip(base + rng.normal(0, 0.25, 3), 0.02, 1))
        period = float(np.exp(rng.uniform(np.log(0.3), np.log(5))))
        specular, gloss = float(rng.choice([0.0, 0.0, 0.05, 0.2])), float(rng.uniform(20, 200))
    tint = rng.uniform(0.94, 1.05) * rng.uniform(0.97, 1.03, 3)
    r, g, b = (float(np.clip(c * t, 0, 1)) for c, t in zip(first, tint, strict=True))
    s, t, u = (float(np.clip(c * t, 0, 1)) for c, t in zip(second, tint, strict=True))
    return Surface(
        texture=texture,
        colour=linear((r, g, b)),
        second=linear((s, t, u)),
        scale=(1 / period, 1 / period),
        offset=(float(rng.random()), float(rng.random())),
        specular=specular,
        gloss=gloss,
    )


def _backdrop(sky: str, indoors: bool, floor: Surface, rng: np.random.Generator, wild: bool) -> Backdrop:
    look = SKIES[sky]
    horizon, zenith = np.array(linear(look.horizon)), np.array(linear(look.zenith))
    if wild:
        horizon, zenith = horizon * rng.uniform(0.4, 1.2, 3), zenith * rng.uniform(0.3, 1.5, 3)
    if indoors:
        light = np.array([0.46, 0.455, 0.45]) * rng.uniform(0.85, 1.15)
        horizon, zenith = np.array([0.55, 0.54, 0.52]), np.array([0.80, 0.80, 0.78])
    else:
        light = 0.5 * horizon + 0.5 * zenith
        light = (0.4 * light + 0.6 * light.mean()) / light.mean() * 0.46  # eyes adapt: colours keep their names
    bounce = light * 0.25 + 0.4 * light * (np.array(floor.colour) + np.array(floor.second))
    side = rng.uniform(0.4, 1.3) * rng.choice([-1, 1])  # from beside the viewer, so that shaded roundings stay visible
    return Backdrop(
        name=sky,
        horizon=_vector(horizon),
        zenith=_vector(zenith),
        clouds=float(np.clip(look.clouds + rng.uniform(-0.15, 0.15), 0, 1)),
        cloud_shift=(float(rng.random()), float(rng.random())),
        sky_light=_vector(light),
        ground_light=_vector(bounce),
        bright_side=(float(0.3 * np.sin(side)), 0.0, float(0.3 * np.cos(side))),
        haze_m=1e6 if indoors else float(rng.uniform(50, 160)),
    )


def lights_for(
    setting: Setting, radius: float, camera: Camera, rng: np.random.Generator, *, wild: bool
) -> tuple[Light, ...]:
    """One main light and up to two weaker ones; outdoors the first is the sun."""
    count = int(rng.choice([1, 2, 3], p=[0.45, 0.38, 0.17]))
    share = rng.dirichlet([6.0, 2.0, 1.5][:count])
    share[::-1].sort()
    total = float(rng.uniform(0.5, 1.9) if wild else rng.uniform(0.95, 1.15))
    lights = []
    for number in range(count):
        tint = (
            rng.uniform(0.4, 1.0, 3)
            if wild and rng.random() < 0.5
            else rng.uniform([0.98, 0.94, 0.86], [1.0, 1.0, 1.0])
        )
        power = total * share[number] * tint
        if number == 0 and not setting.indoors:
            look = SKIES[setting.backdrop.name]
            up = np.radians(rng.uniform(12, 80) if wild else rng.uniform(26, 60))
            round_about = rng.uniform(0, 2 * np.pi) if wild else np.radians(rng.uniform(-115, 115))
            towards = (np.sin(round_about) * np.cos(up), np.sin(up), np.cos(round_about) * np.cos(up))
            power = total * share[0] * look.sun_power * (0.5 + 0.5 * np.array(look.sun))
            lights.append(Light(point=_vector(towards), power=_vector(1.35 * power), sun=True, size=0.02))
            continue
        height = float(rng.uniform(1.6, 4.5)) + 0.5 * radius
        x, z = rng.uniform(-0.8, 0.8) * radius, rng.uniform(-0.2, 1.5) * radius
        point = (float(x), height, float(z))
        reach = float(np.linalg.norm(point))
        lights.append(Light(point=point, power=_vector(1.25 * power), sun=False, reach_m=reach, size=0.035))
    return tuple(lights)


def _vector(values: object) -> Vector:
    r, g, b = (float(v) for v in values)  # type: ignore[attr-defined]
    return (r, g, b)
