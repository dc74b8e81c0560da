"""Whether the streams read each other: each one's loss beside its own partner, and beside that of another picture.

    python -m benchmarks.coupling [--base demo] [--run demo] [--scenes 64]

Unseen scenes of the demo world with exact maps; all streams at the same timestep, w = 1, as in training (eq. 5). A stream
that reads its partner does worse beside a wrong one, and better beside one without noise. Where the numbers are the same, no
schedule can change a picture, and maps do not belong to it.
"""

import argparse

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from extract.world import compose, render
from infer.bases.loading import network_of, open_base, prediction_type_of
from infer.embedded import resolve
from infer.model.denoiser import JointDenoiser
from infer.model.schedules import Joint
from infer.model.vae import encode
from infer.run_folder import load_run
from shards.packing import pack
from train.cache.format import encode_text
from train.demo.ground_truth import exact_maps
from train.demo.text_to_image import pixels
from train.diffusion_loss import noised, stream_loss, target
from train.network import network_arguments, signal_levels

SEED, PX = 909, 64
TIMESTEPS = 100, 300, 500, 700, 900


class Streams:
    """All streams of some scenes, ready to be noised. clean, noise: (S, N, C, h, w), image and intrinsics."""

    @torch.no_grad()
    def __init__(self, base: str, run: str, scenes: int) -> None:
        self.pipeline = open_base(resolve(base, "base"), dtype=torch.float32)
        trained = load_run(resolve(run, "run"))
        self.network = network_of(self.pipeline)
        self.denoiser = JointDenoiser.install(self.network, lora=trained.lora, streams=trained.manifest.streams)
        composed = [compose(SEED, index) for index in range(scenes)]
        rendered = [render(scene, PX) for scene in composed]
        images = pixels(np.stack([one.image for one in rendered]))
        packed = torch.from_numpy(np.stack([pack(exact_maps(one))[0] for one in rendered]))
        encoded = torch.cat([encode(self.pipeline.vae, images), encode(trained.vae, packed)])
        self.clean = encoded.unflatten(0, (-1, scenes))
        self.noise = torch.randn(self.clean.shape, generator=torch.Generator().manual_seed(0))
        self.text = encode_text(self.pipeline, [scene.caption for scene in composed])
        self.levels, self.prediction = signal_levels(self.pipeline), prediction_type_of(self.pipeline)

    @torch.no_grad()
    def losses(self, clean: Tensor, timesteps: tuple[int, int]) -> tuple[float, float]:
        """The mean losses of image and intrinsics at their timesteps, of clean latents (S, N, C, h, w)."""
        streams, count = clean.shape[:2]
        steps = torch.tensor([timesteps[0]] + [timesteps[1]] * (streams - 1)).repeat_interleave(count)
        levels, noise = self.levels[steps], self.noise.flatten(0, 1)
        wanted = target(clean.flatten(0, 1), noise, levels, self.prediction)
        sizes = torch.tensor([[PX, PX, 0, 0, PX, PX]]).repeat(streams * count, 1)
        text = {name: torch.cat([rows] * streams) for name, rows in self.text.items()}
        conditions = network_arguments(self.pipeline, text, sizes)
        self.denoiser.prepare(count, Joint())
        noisy = noised(clean.flatten(0, 1), noise, levels)
        predicted = self.network(noisy, timestep=steps, return_dict=False, **conditions)[0]
        found = stream_loss(predicted, wanted).view(streams, count)
        return float(found[0].mean()), float(found[1:].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--run", default="demo")
    parser.add_argument("--scenes", type=int, default=64)
    given = parser.parse_args()
    streams = Streams(given.base, given.run, given.scenes)
    others = [streams.clean.clone(), streams.clean.clone()]  # with another's image; with another's intrinsics
    others[0][0] = others[0][0].roll(1, dims=0)
    others[1][1:] = others[1][1:].roll(1, dims=1)
    table = Table(title="loss beside a partner that is")
    for column in ("timestep", "image: its own", "another's", "clean", "intrinsics: its own", "another's", "clean"):
        table.add_column(column, justify="right")
    for t in TIMESTEPS:
        own = streams.losses(streams.clean, (t, t))
        wrong = streams.losses(others[1], (t, t))[0], streams.losses(others[0], (t, t))[1]
        clean = streams.losses(streams.clean, (t, 0))[0], streams.losses(streams.clean, (0, t))[1]
        values = [f"{value:.3f}" for stream in range(2) for value in (own[stream], wrong[stream], clean[stream])]
        table.add_row(str(t), *values)
    Console().print(table)


if __name__ == "__main__":
    main()
