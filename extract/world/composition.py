"""Scenes from (seed, index): what is in them, where it stands, how it is lit, and a caption that is true of the picture.

Everything is decided here, by looking at the scene once at a small fixed size, so that neither the scene nor its
caption depends on the size that it is rendered at.
"""

from dataclasses import dataclass, replace

import numpy as np

from extract.world import captions
from extract.world.building import Plan, any_rotation, build, plan, yaw
from extract.world.scene import Camera, Primitive, Scene, Thing
from extract.world.setting import Setting, camera_for, lights_for, setting_for
from extract.world.tracing import View, crossings
from extract.world.vocabulary import ANONYMOUS, COLOURS, MATERIALS, SHAPES, SMALL_ENOUGH, SUPPORTS, Material

_LOOK_PX = 64
_PLACE_SHARE = 0.04
"""A wall or the sky is named only if it fills this share of the picture."""
_ATTEMPTS = 64


@dataclass(frozen=True)
class _Bar:
    """What a thing must reach to stay in the picture: shares in 0..1."""

    share: float
    """Of the picture that it fills ..."""
    seen: float
    """... of what it would cover alone that is not hidden ..."""
    framed: float
    """... and of its bounding box that is inside the picture."""


_PLAIN, _WILD = _Bar(0.010, 0.55, 0.85), _Bar(0.003, 0.25, 0.35)


def compose(seed: int, index: int, *, variety: float = 0.0) -> Scene:
    """The scene of a seed and an index.

    variety: 0 gives the plain world, whose captions state colours and materials. Above 0 it is the chance, for each of
    camera, things, textures and lights, to leave that world (many bodies, odd shapes and colours, strange light): for
    training estimators that are to cope with photographs. Captions are true for any value, but say less.
    """
    for attempt in range(_ATTEMPTS):
        scene = _attempt(seed, index, variety, np.random.default_rng([seed, index, attempt, round(variety * 1000)]))
        if scene is not None:
            return scene
    raise AssertionError(f"scene {index} of seed {seed}: nothing visible in {_ATTEMPTS} attempts")


@dataclass(frozen=True)
class _Placed:
    thing: Thing
    plan: Plan
    at: tuple[float, float, float]
    size: float
    bodies: tuple[Primitive, ...]


def _attempt(seed: int, index: int, variety: float, rng: np.random.Generator) -> Scene | None:
    wild = bool(rng.random() < variety)
    count = (
        int(rng.integers(3, 13))
        if wild
        else int(rng.choice([1, 2, 3, 4, 5, 6], p=[0.06, 0.16, 0.26, 0.24, 0.18, 0.10]))
    )
    radius = float(rng.uniform(0.75, 1.0)) * (0.75 + 0.35 * count**0.5 * (1.2 if wild else 1.0))
    camera = camera_for(radius, rng, wild=bool(rng.random() < variety))
    setting = setting_for(radius, camera, rng, wild=bool(rng.random() < variety))
    placed = _place(count, radius, setting, rng, wild)
    look = _look(setting, placed, camera, _WILD if wild else _PLAIN)
    if not look.things:
        return None
    kept = {old: new for new, (old, _) in enumerate(look.things)}
    sights = [sight for _, sight in look.things]
    wall = setting.wall if look.wall > _PLACE_SHARE else ""
    sky = setting.sky if look.sky > _PLACE_SHARE else ""
    first = len(setting.segments)
    things, bodies = [], list(setting.bodies)
    for old, new in kept.items():
        thing = replace(placed[old].thing, segment=first + new)
        things.append(replace(thing, supported_by=kept.get(thing.supported_by, -1)))
        bodies += [replace(body, segment=first + new) for body in placed[old].bodies]
    true = captions.relations(things, sights)
    where = captions.place(setting.floor, wall, setting.paint, sky, rng)
    caption, named = captions.write(things, true, where, rng)
    return Scene(
        seed=seed,
        index=index,
        variety=variety,
        camera=camera,
        primitives=tuple(bodies),
        segments=(*setting.segments, *(thing.shape for thing in things), "sky"),
        things=tuple(things),
        lights=lights_for(setting, radius, camera, rng, wild=bool(rng.random() < variety)),
        backdrop=setting.backdrop,
        floor=setting.floor,
        wall=wall,
        sky=sky,
        caption=caption,
        relations=tuple(true),
        mentioned=named,
    )


# ---- placing ---------------------------------------------------------------------------------------------------------


def _place(count: int, radius: float, setting: Setting, rng: np.random.Generator, wild: bool) -> list[_Placed]:
    """Things that do not touch each other except where one stands on another. Colours are all different unless wild."""
    colours = [colour for colour in COLOURS if colour != setting.paint]
    rng.shuffle(colours)
    placed: list[_Placed] = []
    for number in range(count):
        shape = SHAPES[rng.integers(len(SHAPES))]
        carriers = [i for i, p in enumerate(placed) if _free_top(i, placed)]
        colour = colours[number % len(colours)]
        one: _Placed | None
        if carriers and shape in SMALL_ENOUGH and rng.random() < 0.55:
            one = _on_top(shape, colour, carriers[rng.integers(len(carriers))], placed, rng)
        else:
            one = _on_floor(shape, colour, placed, radius, rng, wild)
        if one is not None:
            placed.append(one)
    return placed


def _free_top(index: int, placed: list[_Placed]) -> bool:
    carrier = placed[index].thing
    taken = any(p.thing.supported_by == index for p in placed)
    return carrier.shape in SUPPORTS and carrier.supported_by < 0 and not taken


def _on_top(shape: str, colour: str, carrier: int, placed: list[_Placed], rng: np.random.Generator) -> _Placed:
    below = placed[carrier]
    width = below.size * {"cube": 0.9, "cylinder": 0.8, "table": 1.0}[below.thing.shape]
    form = plan(shape, rng)
    size = width * float(rng.uniform(0.62, 0.95)) / max(form.reach, 0.8)
    x, y, z = below.at
    at = (x, y + below.plan.height * below.size, z)
    return _make(shape, colour, form, size, at, carrier, yaw(float(rng.uniform(0, 2 * np.pi))), rng)


def _on_floor(
    shape: str, colour: str, placed: list[_Placed], radius: float, rng: np.random.Generator, wild: bool
) -> _Placed | None:
    form = plan(shape, rng)
    for _ in range(12):
        size = float(rng.uniform(0.26, 0.52)) * (float(rng.uniform(0.5, 1.6)) if wild else 1.0)
        size *= {"table": 0.85, "chair": 1.0, "house": 0.85}.get(shape, 1.0)
        angle, far = rng.uniform(0, 2 * np.pi), radius * np.sqrt(rng.random())
        x, z = float(far * np.cos(angle)), float(far * np.sin(angle))
        if all(np.hypot(x - p.at[0], z - p.at[2]) > form.reach * size + p.plan.reach * p.size + 0.08 for p in placed):
            if wild and rng.random() < 0.5:
                return _odd(shape, colour, size, (x, 0.0, z), rng)
            # Upright faces at a slant show two sides; houses and chairs turn their fronts to the viewer.
            turn = float(rng.uniform(-1.0, 1.0)) if shape in ("house", "chair") else float(rng.uniform(0, 2 * np.pi))
            return _make(shape, colour, form, size, (x, 0.0, z), -1, yaw(turn), rng)
    return None


def _make(
    shape: str,
    colour: str,
    form: Plan,
    size: float,
    at: tuple[float, float, float],
    carrier: int,
    turned: np.ndarray,
    rng: np.random.Generator,
) -> _Placed:
    names = list(MATERIALS)
    material = names[rng.choice(len(names), p=[0.34, 0.08, 0.16, 0.08, 0.12, 0.11, 0.11])]
    bright = rng.uniform(0.94, 1.05)
    r, g, b = (float(np.clip(c * bright + rng.uniform(-0.012, 0.012), 0, 1)) for c in COLOURS[colour])
    bodies = build(
        shape=form, size=size, at=at, turned=turned, colour=(r, g, b), material=MATERIALS[material], segment=0
    )
    thing = Thing(shape=shape, colour=colour, material=material, segment=0, supported_by=carrier)
    return _Placed(thing, form, at, size, tuple(bodies))


def _odd(shape: str, colour: str, size: float, at: tuple[float, float, float], rng: np.random.Generator) -> _Placed:
    """A thing of any colour, texture and attitude; squeezed and turned ones lose their name."""
    texture = ("plain", "blotches", "speckles", "marble", "planks", "checks", "stripes", "dots", "plaster")[
        rng.integers(9)
    ]
    material = Material(
        word="",
        texture=texture,
        repeats=float(rng.uniform(1, 12)),
        specular=float(rng.choice([0, 0.04, 0.15, 0.5])),
        gloss=float(rng.uniform(10, 200)),
        metal=bool(rng.random() < 0.15),
    )
    base = rng.random(3) * rng.uniform(0.3, 1.0)
    r, g, b = (float(c) for c in base.mean() + (base - base.mean()) * rng.random() ** 0.5)
    form = plan(shape, rng)
    squeezed = shape in SMALL_ENOUGH and rng.random() < 0.7
    turned, lifted = yaw(float(rng.uniform(0, 2 * np.pi))), 0.0
    if squeezed:
        part, *_ = form.parts
        a, b, c = (float(s * k) for s, k in zip(part.scale, rng.uniform(0.35, 1.5, 3), strict=True))
        part = replace(part, scale=(a, b, c), centre=(0.0, b, 0.0))
        form = Plan((part,), form.reach * 1.6, 2 * part.scale[1])
        if rng.random() < 0.5:
            turned = any_rotation(rng)
            lifted = float(np.linalg.norm(part.scale) * size) * float(rng.uniform(0.2, 1.2))
    bodies = build(
        shape=form, size=size, at=(at[0], lifted, at[2]), turned=turned, colour=(r, g, b), material=material, segment=0
    )
    x, y, z = (float(c) for c in rng.random(3))
    bodies = [replace(body, surface=replace(body.surface, second=(x, y, z))) for body in bodies]
    name = ANONYMOUS if squeezed else shape
    thing = Thing(shape=name, colour=colour, material="plain", segment=0, hue_matters=False)
    return _Placed(thing, form, at, size, tuple(bodies))


# ---- looking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    things: list[tuple[int, captions.Sight]]
    """Index into what was placed, and what it looks like."""
    wall: float
    sky: float
    """Shares of the picture, 0..1."""


def _look(setting: Setting, placed: list[_Placed], camera: Camera, bar: _Bar) -> _Look:
    """The things that are well visible, and what they look like, once those that are not were taken away.

    Taking things away only uncovers others, so what is dropped stays dropped, and one look is enough.
    """
    focal_px = camera.focal * _LOOK_PX
    view = View(camera.rotation(), np.array(camera.position, np.float32), focal_px, _LOOK_PX, _LOOK_PX)
    rays = view.grid()

    def depths(bodies: tuple[Primitive, ...]) -> np.ndarray:
        depth = np.full(_LOOK_PX * _LOOK_PX, np.inf, np.float32)
        for body, bounds in zip(bodies, view.bounds(bodies) if bodies else [], strict=True):
            at, t = crossings(body, view, rays, bounds)
            depth[at] = np.minimum(depth[at], t)
        return depth

    # Layers: the sky (last, at infinity), the floor, the walls, then one for each thing.
    floor, walls = depths(setting.bodies[:1]), depths(setting.bodies[1:])
    layers = np.stack(
        [np.full_like(floor, np.finfo(np.float32).max), floor, walls, *(depths(p.bodies) for p in placed)]
    )
    marks = {i: depths(p.bodies[:1]) <= layers[i + 3] for i, p in enumerate(placed) if _needs_trunk(p)}
    kept = [i for i, p in enumerate(placed) if _framed(view, p) >= bar.framed]
    while True:
        kept = [i for i in kept if placed[i].thing.supported_by < 0 or placed[i].thing.supported_by in kept]
        front = layers[[0, 1, 2, *(i + 3 for i in kept)]].argmin(axis=0)
        seen = {i: front == n + 3 for n, i in enumerate(kept)}
        worth = {i: _worth(seen[i], layers[i + 3], marks.get(i), bar) for i in kept}
        worst = min(kept, key=worth.__getitem__, default=None)
        if worst is None or worth[worst] >= 1:
            things = [(i, _sight(seen[i], view, placed[i])) for i in kept]
            return _Look(things, wall=float((front == 2).mean()), sky=float((front == 0).mean()))
        kept.remove(worst)


def _needs_trunk(placed: _Placed) -> bool:
    """A round tree whose trunk cannot be seen looks like a sphere."""
    return placed.thing.shape == "tree" and placed.bodies[1].kind == "sphere"


def _worth(seen: np.ndarray, depth: np.ndarray, mark: np.ndarray | None, bar: _Bar) -> float:
    """At least 1 for a thing that is well visible. mark: bool, pixels of the part that it is known by, if it needs one."""
    alone = int(np.isfinite(depth).sum())
    visible = int(seen.sum())
    known = 1.0
    if mark is not None:
        mark = mark & np.isfinite(depth)
        known = min(int((seen & mark).sum()) / 4, int((seen & mark).sum()) / max(int(mark.sum()), 1) / bar.seen)
    return min(visible / (bar.share * seen.size), visible / max(alone, 1) / bar.seen, known)


def _framed(view: View, placed: _Placed) -> float:
    """Share of a thing's bounding box that is inside the square picture."""
    b = np.array(view.bounds(placed.bodies))
    if not np.isfinite(b).all():
        return 0.0
    left, top, right, bottom = b[:, 0].min(), b[:, 1].min(), b[:, 2].max(), b[:, 3].max()
    inside = np.diff(np.clip([left, right], 0, view.width)) * np.diff(np.clip([top, bottom], 0, view.height))
    return float(inside[0] / max((right - left) * (bottom - top), 1e-6))


def _sight(seen: np.ndarray, view: View, placed: _Placed) -> captions.Sight:
    columns = np.flatnonzero(seen) % view.width
    depth = view.project(np.array([placed.at]).T)[2][0]
    return captions.Sight(
        x=float(columns.mean() + 0.5) / view.width,
        left=int(columns.min()) / view.width,
        right=(int(columns.max()) + 1) / view.width,
        depth_m=float(depth),
        radius_m=placed.plan.reach * placed.size,
    )
