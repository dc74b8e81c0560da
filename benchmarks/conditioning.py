"""Whether a known stream is obeyed: image -> maps and maps -> image, on unseen scenes with exact maps.

    python -m benchmarks.conditioning [--base demo] [--run demo] [--scenes 64] [--hold clean] [--sheet FILE.png]

Each row holds maps against maps by the measures of `infer evaluate` (AbsRel, degrees of normals, F of segment borders and of
lines). Two rows are limits: exact maps after a round trip through the run's VAE, and the estimators on the renderings. A stream
that obeys is far nearer to its own partner than to another scene's.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from extract.world import compose, render
from infer.condition import HOLDS, Given
from infer.embedded import usual_guidance
from infer.evaluation.agreement import MEASURES, Estimators, Maps, agreement
from infer.model.vae import decode, encode
from infer.sampler import CoGenerator
from shards.inspect.display import SheetRow, sheet
from shards.packing import pack, unpack
from train.demo.ground_truth import exact_maps

SEED, PX, BATCH = 909, 64, 32
SHEET_SCENES = 8


def row(table: Table, title: str, made: Sequence[Maps], truth: Sequence[Maps]) -> None:
    """Adds the means of MEASURES."""
    found = [agreement(one, other) for one, other in zip(made, truth, strict=True)]
    means = [np.nanmean([values[name] for values in found]) for name in MEASURES]
    table.add_row(
        title,
        *(f"{mean:.1f}" if name == "normal_deg" else f"{mean:.3f}" for name, mean in zip(MEASURES, means, strict=True)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--run", default="demo")
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, help="as `infer sample`")
    parser.add_argument("--hold", choices=HOLDS, help="how what is given is seen; as the run was trained")
    parser.add_argument("--sheet", type=Path, help=f"draw the first {SHEET_SCENES} scenes into this file")
    given = parser.parse_args()

    scenes = [compose(SEED, index) for index in range(given.scenes)]
    renderings = [render(scene, PX) for scene in scenes]
    captions, truth = [scene.caption for scene in scenes], [exact_maps(one) for one in renderings]
    estimators = Estimators()
    generator = CoGenerator.from_pretrained(given.base, given.run, device="cpu")
    generator.pipeline.set_progress_bar_config(disable=True)
    guidance = usual_guidance(given.base) if given.guidance is None else given.guidance
    options = {"steps": given.steps, "guidance": guidance, "schedule": "joint", "hold": given.hold}

    # Draw the maps of each rendering, and an image of its exact maps.
    of_images, of_maps = list[Maps](), list[np.ndarray]()
    for start in range(0, len(scenes), BATCH):
        numbers = range(start, min(start + BATCH, len(scenes)))
        prompts, seeds = captions[start : start + BATCH], list(numbers)
        images = [Given(image=Image.fromarray(renderings[i].image)) for i in numbers]
        of_images += generator(prompts, seeds=seeds, given=images, **options).intrinsics
        maps = [Given(maps=truth[i]) for i in numbers]
        of_maps += [np.asarray(image) for image in generator(prompts, seeds=seeds, given=maps, **options).images]
    packed = torch.from_numpy(np.stack([pack(maps)[0] for maps in truth]))
    with torch.no_grad():
        decoded = decode(generator.vae, encode(generator.vae, packed)).numpy()

    table = Table(title=f"{given.scenes} unseen scenes")
    table.add_column("")
    for name in MEASURES:
        table.add_column(name, justify="right")
    others = [*truth[1:], truth[0]]
    row(table, "exact maps through the VAE", [unpack(one, blurred=True) for one in decoded], truth)
    row(table, "estimators on the rendering", estimators([one.image for one in renderings]), truth)
    row(table, "image -> maps, against the image's own", of_images, truth)
    row(table, "image -> maps, against another's", of_images, others)
    seen = estimators(of_maps)
    row(table, "maps -> image, against the maps given", seen, truth)
    row(table, "maps -> image, against another's", seen, others)
    Console(width=120).print(table)
    if given.sheet:
        drawn = list[SheetRow]()
        for i in range(min(SHEET_SCENES, given.scenes)):
            drawn.append((renderings[i].image, truth[i], captions[i]))
            drawn.append((renderings[i].image, of_images[i], "maps made of the image"))
            drawn.append((of_maps[i], truth[i], "image made of the maps"))
        sheet(drawn, 128).save(given.sheet)


if __name__ == "__main__":
    main()
