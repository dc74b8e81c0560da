"""The demo source: scenes of the demo world, rendered in the workers; no files and no network.

    DemoSource(DemoSettings(seed=0, count=256, size_px=256)).read(unit)

Each sample's image is a rendering, its caption states what can be seen, and its metadata say exactly what is where. The
exact maps are not part of the sample: extraction estimates them as for any other image. `extract.world.render` gives
them for the (seed, index) in the metadata.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from extract.sources import Failure, RawSample, Unit
from extract.world import Rendering, Scene, compose, render
from shards.core.errors import UsageError

WORLD_VERSION = 1
"""Raised whenever the same (seed, index) gives another picture."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The [source] table of the demo recipe."""

    seed: int = 0
    count: int = 256
    size_px: int = 256

    def __post_init__(self) -> None:
        for name, low, high in (("seed", 0, 2**31 - 1), ("count", 1, 999_999), ("size_px", 16, 4096)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"source.{name} is {value}; give a number from {low} to {high}")


@dataclass(frozen=True)
class DemoSource:
    """Scenes 0 .. count - 1 of a seed."""

    settings: DemoSettings

    def describe(self) -> dict[str, Any]:
        """What identifies the source: its settings, and the version of the world."""
        return {"kind": "demo", "world": WORLD_VERSION, **asdict(self.settings)}

    def total(self) -> int:
        """How many scenes there are."""
        return self.settings.count

    def units(self, shard_size: int, limit: int | None = None) -> Iterator[Unit]:
        """Units of `shard_size` scenes; their items are (first index, one past the last)."""
        count = self.settings.count if limit is None else min(limit, self.settings.count)
        for unit, first in enumerate(range(0, count, shard_size)):
            yield Unit(unit, (first, min(first + shard_size, count)))

    def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
        """Renders a unit's scenes, in order."""
        first, end = unit.items
        for index in range(first, end):
            scene = compose(self.settings.seed, index)
            rendering = render(scene, self.settings.size_px)
            key = f"demo-{self.settings.seed}-{index:06d}"
            yield RawSample(key, rendering.image, rendering.caption, metadata(scene, rendering))


def metadata(scene: Scene, rendering: Rendering) -> dict[str, Any]:
    """The scene in JSON values, with the same keys and types for every scene (readers infer a schema from the first).

    seed, index, focal_px, floor, wall and sky ("" where there is none), objects (see extract.world.rendering.describe_objects),
    relations: subject and object are `thing` numbers of objects, object -1 is the floor.
    """
    relations = [{"subject": r.subject, "relation": r.relation, "object": r.object} for r in scene.relations]
    return {
        "seed": scene.seed,
        "index": scene.index,
        "focal_px": float(rendering.focal_px),
        "floor": scene.floor,
        "wall": scene.wall,
        "sky": scene.sky,
        "objects": rendering.objects,
        "relations": relations,
    }
