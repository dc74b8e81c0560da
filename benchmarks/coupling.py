"""Whether the streams read each other: each one's loss beside its own partner, and beside that of another picture.

    python -m benchmarks.coupling [--base demo] [--run demo] [--scenes 64] [--places]

Unseen scenes of the demo world with exact maps; all streams at the same timestep, w = 1, as in training (eq. 5). A stream
that reads its partner does worse beside a wrong one, and better beside one without noise. Where the numbers are the same, no
schedule can change a picture, and maps do not belong to it.

--places also says where the intrinsics' queries look in a clean image: a stream can only take outlines from the other if its
queries find their own place there.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from extract.world import compose, render
from infer.bases.loading import network_of, open_base, prediction_type_of
from infer.embedded import resolve
from infer.model.attention import joined
from infer.model.denoiser import JointDenoiser
from infer.model.processor import JointProcessor
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


@dataclass(frozen=True)
class Look:
    """Where the intrinsics' queries of one layer look. heads: means over scenes and queries."""

    layer: str
    tokens: int
    """N, of one stream: attention that finds no place has 1 / N of what it pays the image on the query's own."""
    on_image: Tensor
    """(H,): the fraction of attention that is on the image's tokens."""
    on_place: Tensor
    """(H,): of that, the fraction on the token at the query's own place."""


@torch.no_grad()
def looks(streams: Streams, timestep: int) -> list[Look]:
    """A Look of every self-attention layer, in the order in which they run: a clean image, intrinsics at a timestep."""
    found, stock = list[Look](), JointProcessor.joint
    names = {id(processor): name for name, processor in streams.denoiser.processors.items()}

    def watched(processor: JointProcessor, q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        query, keys = (_by_stream(x, context) for x in (q, k))
        logits = query[:, 1] @ joined(keys).mT * q.shape[-1] ** -0.5
        image = logits.softmax(-1)[..., : q.shape[2]]  # (P, H, N, N)
        on_image, on_place = image.sum(-1), image.diagonal(dim1=-2, dim2=-1)
        fraction = on_place.mean((0, 2)) / on_image.mean((0, 2)).clamp(min=1e-9)
        found.append(Look(names[id(processor)], q.shape[2], on_image.mean((0, 2)), fraction))
        return stock(q, k, v, context)

    for processor in streams.denoiser.processors.values():
        processor.joint = partial(watched, processor)  # type: ignore[method-assign]
    streams.losses(streams.clean, (0, timestep))
    for processor in streams.denoiser.processors.values():
        del processor.joint
    return found


def _by_stream(x: Tensor, context: Any) -> Tensor:
    """(S B, H, N, D) -> (B, S, H, N, D)."""
    return x.unflatten(0, (context.streams, context.images)).transpose(0, 1)


def places_table(found: Sequence[Look]) -> Table:
    table = Table(title="where the intrinsics look: the head of each layer that finds its place best")
    for column in ("layer", "tokens", "on the image", "on its own place there", "that of no place"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for look in found:
        head = int(look.on_place.argmax())
        values = (float(look.on_image[head]), float(look.on_place[head]), 1 / look.tokens)
        table.add_row(look.layer, str(look.tokens), *(f"{value:.3f}" for value in values))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--run", default="demo")
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--places", action="store_true", help="also where the intrinsics' queries look")
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
    if given.places:
        Console(width=140).print(places_table(looks(streams, 700)))


if __name__ == "__main__":
    main()
