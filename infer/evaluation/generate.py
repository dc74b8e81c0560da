"""The images of an evaluation: every method, seed and prompt, made in blocks, each block a file that is made once.

    OUT/images/METHOD/s0-0000-1a2b3c4d.npz     image uint8 (N, H, W, 3), and the maps of the methods that make them

The name ends in a digest of all that decides what is in it (models, settings, prompts), so that a run that was stopped
continues, a larger one uses what is there, and results of other settings are never mixed in.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import diffusers
import numpy as np
import transformers

from extract.world import Rendering, compose, render
from infer.bases.files import split_base
from infer.bases.prompts import image_size
from infer.condition import HOLDS, Given, Hold
from infer.content import of_embeddings, of_model
from infer.embedded import GUIDANCE, resolve
from infer.evaluation.sets import UNSEEN, PromptSet
from infer.jobs import DTYPES, LATER
from infer.outputs import maker
from infer.run_folder import load_manifest
from infer.sampler import CoGenerator
from shards.core.errors import UsageError
from shards.core.storage import Folder
from shards.intrinsics import IntrinsicMap
from shards.marks import digest

BASE = "base"
APART = 1000
"""How far the seeds of two prompts that follow each other are apart: image n of prompt i has seed + n + 1000 i. Noise makes
some layouts easy and others hard: were it the same for all prompts, a table would tell of a few noises, with the intervals of
many."""
Arrays = dict[str, np.ndarray]


ORACLE = "oracle-"
"""Before a schedule's name: the scene's exact maps are given in every step."""


@dataclass(frozen=True)
class Method:
    """A way to draw. The base alone is the schedule off."""

    name: str
    schedule: str
    times_steps: int = 1
    oracle: bool = False
    """Whether the intrinsics are the exact maps of the caption's scene: what any co-generated maps could do at best."""

    @property
    def makes_maps(self) -> bool:
        return self.schedule != "off" and not self.oracle

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.+=-]+", "-", self.name.lower()).strip("-")


def parse_methods(text: str) -> tuple[Method, ...]:
    """ "base,base-2x,drop,gaussian:tau=700,sigma=80" -> methods; a part with = and without : belongs to the one before it.

    Raises UsageError where there is none, or one twice.
    """
    names: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if "=" in part and ":" not in part and names:
            names[-1] += f",{part}"
        else:
            names.append(part)
    if not names or len(set(names)) != len(names):
        raise UsageError(f"--methods {text!r}: name one or several different methods, as in base,base-2x,drop,gaussian")
    return tuple(_method(name) for name in names)


def _method(name: str) -> Method:
    if name == BASE:
        return Method(name, "off")
    if name.startswith(ORACLE):
        return Method(name, name.removeprefix(ORACLE), oracle=True)
    times = re.fullmatch(r"base-(\d+)x", name)
    return Method(name, "off", int(times[1])) if times else Method(name, name)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How images are drawn. seeds: images of every prompt, `seed` that of the first (APART says those of the others); maps
    are kept for the first `map_seeds`."""

    base: str = "demo"
    run: str = "demo"
    steps: int = 25
    guidance: float = GUIDANCE
    scheduler: str | None = None
    size: tuple[int, int] | None = None  # (height, width)
    seed: int = 0
    seeds: int = 3
    map_seeds: int = 1
    batch: int = 32
    hold: Hold | None = None
    """How the oracle's maps are held (infer.condition); None: as the run was trained."""
    device: str | None = None
    dtype: str | None = None
    other_weights: bool = False
    variant: str | None = None
    base_config: str | None = None
    embeddings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.hold not in (None, *HOLDS):
            raise UsageError(f"--hold {self.hold} is not one of {', '.join(HOLDS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        if min(self.steps, self.seeds, self.batch) < 1 or self.map_seeds < 0:
            raise UsageError("--steps, --seeds and --batch are 1 or more, --map-seeds 0 or more")
        if self.seeds > APART:
            raise UsageError(f"--seeds {self.seeds}: {APART} is the most")


@dataclass(frozen=True)
class Block:
    """One image of each of some prompts by one method: one file. first: the number of its first prompt in the set. seed: that
    of the set's first prompt, from which `seeds` counts."""

    method: Method
    seed: int
    first: int
    prompts: tuple[str, ...]
    maps: bool
    file: str
    scenes: tuple[int, ...] = ()
    """Of an oracle: the scenes of its prompts in the world's seed UNSEEN."""

    @property
    def numbers(self) -> range:
        """Of its prompts in the set."""
        return range(self.first, self.first + len(self.prompts))

    @property
    def seeds(self) -> list[int]:
        return [self.seed + APART * number for number in self.numbers]


class EvaluationSampler:
    """Plans the blocks and draws those that are missing; loads the models with the first one that is."""

    def __init__(self, drawing: EvaluationOptions, folder: Folder) -> None:
        """Raises UserError when the base or the run is not there."""
        self.drawing, self.folder = drawing, folder
        self._manifest = load_manifest(resolve(drawing.run, "run"))
        resolve(drawing.base, "base")

    def blocks(self, methods: Sequence[Method], prompts: PromptSet) -> list[Block]:
        """All blocks, the first image of every prompt first.

        Raises UserError for a schedule that there is not, and UsageError for an oracle of prompts whose scenes are not known.
        """
        drawing = self.drawing
        if not prompts.scenes and (oracle := next((method for method in methods if method.oracle), None)):
            raise UsageError(f"{oracle.name} needs scenes whose maps are known: give --set demo or depth")
        decisive = {k: v for k, v in asdict(drawing).items() if k not in _INDIFFERENT and (v or k not in LATER)}
        base, _, config = split_base(drawing.base)
        decisive |= {"run": maker(self._manifest)["id"], "base": drawing.base.replace(base, of_model(base), 1)}
        if config := drawing.base_config or config:
            decisive["base_config"] = of_model(config)
        if drawing.embeddings:
            decisive["embeddings"] = of_embeddings(drawing.embeddings)
        schedules = {method: self._manifest.stage_map.schedule(method.schedule).to_dict() for method in methods}
        found = []
        for number in range(drawing.seeds):
            for method in methods:
                for first in range(0, len(prompts.prompts), drawing.batch):
                    part = prompts.prompts[first : first + drawing.batch]
                    scenes = prompts.scenes[first : first + drawing.batch] if method.oracle else ()
                    seed, maps = drawing.seed + number, method.makes_maps and number < drawing.map_seeds
                    about = decisive | {"schedule": schedules[method], "times_steps": method.times_steps}
                    about |= {"seed": seed, "first": first, "apart": APART, "prompts": list(part), "maps": maps}
                    if method.oracle:
                        about |= {"scenes": list(scenes), "world": UNSEEN, "hold": drawing.hold}
                    name = f"s{seed}-{first // drawing.batch:04d}-{digest(about)[:8]}"
                    found.append(Block(method, seed, first, part, maps, f"images/{method.slug}/{name}.npz", scenes))
        return found

    def draw(self, blocks: Sequence[Block], done: Callable[[Block, bool], None]) -> None:
        """Makes the blocks that are not there. done: told of each block, and whether it was made just now."""
        for block in blocks:
            missing = not self.folder.exists(block.file)
            if missing:
                self.folder.make(f"images/{block.method.slug}")
                write_arrays(self.folder, block.file, self._make(block))
            done(block, missing)

    def _make(self, block: Block) -> Arrays:
        drawing, generator = self.drawing, self._generator
        made = generator(
            list(block.prompts),
            seeds=block.seeds,
            steps=drawing.steps * block.method.times_steps,
            guidance=drawing.guidance,
            size=drawing.size,
            schedule=block.method.schedule,
            scheduler=drawing.scheduler,
            intrinsics=block.maps,
            given=self._exact_maps(block) if block.method.oracle else None,
            hold=drawing.hold if block.method.oracle else None,
        )
        arrays = {"image": np.stack([np.asarray(image.convert("RGB")) for image in made.images])}
        for name in made.intrinsics[0] if made.intrinsics else ():
            arrays[name] = np.stack([maps[name].values for maps in made.intrinsics]).astype(_STORED[name])
        return arrays

    def _exact_maps(self, block: Block) -> list[Given]:
        """Of each prompt the maps of its scene, at the size that is drawn."""
        size = image_size(self._generator.pipeline, self.drawing.size)
        arrays = arrays_of([render(compose(UNSEEN, scene), size) for scene in block.scenes])
        return [Given(maps=maps_of(arrays, row)) for row in range(len(block.scenes))]

    @cached_property
    def _generator(self) -> CoGenerator:
        for library in (diffusers, transformers):  # the command line has a progress bar of its own
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        drawing = self.drawing
        generator = CoGenerator.from_pretrained(
            drawing.base,
            drawing.run,
            device=drawing.device,
            dtype=DTYPES[drawing.dtype] if drawing.dtype else None,
            other_weights=drawing.other_weights,
            variant=drawing.variant,
            base_config=drawing.base_config,
            embeddings=drawing.embeddings,
        )
        generator.pipeline.set_progress_bar_config(disable=True)
        return generator


_INDIFFERENT = ("seed", "seeds", "map_seeds", "batch", "device", "run", "hold")
_STORED: Mapping[str, Any] = {"depth": np.float32, "normal": np.float16, "segmentation": np.uint16, "line": np.float16}
_READ: Mapping[str, Any] = {**_STORED, "normal": np.float32, "line": np.float32}
_SAID = {"depth": {"kind": "metric"}}  # of maps that the sampler makes of noise alone, and of renderings


def maps_of(arrays: Arrays, row: int) -> dict[str, IntrinsicMap]:
    """The maps of one image of a block."""
    return {
        name: IntrinsicMap(arrays[name][row].astype(_READ[name]), _SAID.get(name, {}))
        for name in _READ
        if name in arrays
    }


def arrays_of(renderings: Sequence[Rendering]) -> Arrays:
    """Renderings as a block's arrays: images and exact maps."""
    return {
        "image": np.stack([one.image for one in renderings]),
        "depth": np.stack([one.depth_m for one in renderings]),
        "normal": np.stack([one.normal for one in renderings]).astype(np.float16),
        "segmentation": np.stack([one.segmentation for one in renderings]),
        "line": np.stack([one.line for one in renderings]).astype(np.float16),
    }


def write_arrays(folder: Folder, name: str, arrays: Arrays) -> None:
    """Writes an .npz file, whole or not at all."""
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)  # type: ignore[arg-type]
    folder.write(name, data.getvalue())


def read_arrays(folder: Folder, name: str) -> Arrays:
    """The arrays of an .npz file; nothing in it is ever unpickled."""
    with np.load(io.BytesIO(folder.read(name)), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def chunks(count: int, size: int) -> Iterator[range]:
    """0..count-1 in ranges of `size`."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))
