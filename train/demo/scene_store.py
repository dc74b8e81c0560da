"""A store of rendered scenes on the local disk: rendered once by all cores, then read at random by training.

One folder a chunk, written under a temporary name and renamed when it is whole; a killed run continues.

    image (n, H, W, 3) uint8        depth (n, H, W) float16, metres, inf for the sky
    normal (n, H, W, 3) int8, x 127, 0 where there is none      segmentation, line (n, H, W) uint8
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from extract.world import compose, render

FIELDS = ("image", "depth", "normal", "segmentation", "line")


@dataclass(frozen=True, kw_only=True)
class SceneStore:
    """What is rendered: `chunks` of `chunk` scenes at `size_px`; a share `plain` of the plain world, the rest varied."""

    folder: Path
    seed: int
    chunks: int
    size_px: int
    chunk: int = 128
    plain: float = 0.5
    variety: float = 0.6

    def path(self, number: int) -> Path:
        return self.folder / f"{self.size_px}px-seed{self.seed}-{number:04d}"

    def ready(self) -> list[Path]:
        """The chunks that are there, in order."""
        return [path for path in map(self.path, range(self.chunks)) if path.is_dir()]

    def render_missing(self, workers: int) -> Iterator[int]:
        """Renders what is not there yet; yields the number of each chunk as it is done."""
        missing = [number for number in range(self.chunks) if not self.path(number).is_dir()]
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for task in as_completed([pool.submit(self.render_chunk, number) for number in missing]):
                yield task.result()

    def render_chunk(self, number: int) -> int:
        scenes: dict[str, list[np.ndarray]] = {name: [] for name in FIELDS}
        for index in range(number * self.chunk, (number + 1) * self.chunk):
            variety = 0.0 if index % 100 < 100 * self.plain else self.variety
            rendering = render(compose(self.seed, index, variety=variety), self.size_px)
            scenes["image"].append(rendering.image)
            scenes["depth"].append(np.minimum(rendering.depth_m, 60000).astype(np.float16))
            scenes["depth"][-1][np.isinf(rendering.depth_m)] = np.inf
            scenes["normal"].append(np.rint(np.nan_to_num(rendering.normal) * 127).astype(np.int8))
            scenes["segmentation"].append(np.minimum(rendering.segmentation, 255).astype(np.uint8))
            scenes["line"].append(np.rint(rendering.line * 255).astype(np.uint8))
        temporary = self.path(number).with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, arrays in scenes.items():
            np.save(temporary / f"{name}.npy", np.stack(arrays))
        temporary.rename(self.path(number))
        return number


def open_chunk(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a chunk, mapped into memory rather than read."""
    return {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in FIELDS}
