"""Stage 2: the LoRA of the intrinsic stream (paper, eq. 5), with the base frozen and both VAEs frozen.

    L = ||eps_x_hat - eps_x||^2 + lambda ||eps_i_hat - eps_i||^2

One timestep for both streams, two independent noises, w = 1 everywhere. What is drawn at random for a sample depends on
(seed, position) alone. Without the shared VAE (the paper's ablation) each intrinsic has a stream, with a noise of its own, and
the intrinsic term is the mean of theirs.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from infer.bases.loading import network_of, open_base, prediction_type_of
from infer.model.separate_vae import SeparateVae
from infer.run_folder import manifest_for, save_run
from shards.core.errors import UserError
from shards.dataset import Dataset
from shards.packing import SLICES
from train.cache.format import fitting_caches, weights_digest
from train.config import LoraConfig, TrainConfig
from train.cuda_graph import GraphedNetwork
from train.data import Batch, Caches, Sample, Samples, generator_of
from train.diffusion_loss import noised, snr_weight, stream_loss, target
from train.engine import Outcome, Validation, make_accelerator, precision, train
from train.identity import Identity, check_latents, describe_pipeline, says_its_base
from train.latents import Encoder
from train.lock import only_one
from train.network import encode_nothing, network_arguments, signal_levels
from train.sheets import TrainingGenerator, sample_sheet
from train.streams import Streams, make_streams
from train.vae import RESULT, TRAINING, trained_vae
from train.vae import STAGE as STAGE_ONE
from train.warm_start import begin_with, started_from

DRAWS, MEASURE = 2, 3  # purposes of this stage's generators (train.data.generator_of)
SEEN_OFTEN, SEEN_OFTEN_ON_CPU = 4, 10
"""Epochs from which on it pays to keep latents in memory. On a CPU each sample is then encoded alone (train/latents.py), each
flip by itself: 15 ms, where one of a batch takes 3 in bfloat16."""
REPEATS = 4  # timesteps at which each held-out sample is measured
STAGE = "training/lora"


@dataclass(frozen=True)
class Draws:
    """What is drawn for B samples: timesteps and noises of all streams, posteriors' noises, whether the caption stays.

    Streams: image, intrinsics.
    """

    timesteps: Tensor
    """int64 (S, B); 0 for a known stream."""
    noise: Tensor
    """float32 (S, B, C, h, w)."""
    posterior: Tensor
    """float32 (S, B, C, h, w)."""
    captioned: Tensor
    """bool (B,)."""
    known: Tensor
    """bool (2, B): whether the image, and whether the intrinsics are known, and so have no loss."""

    def to(self, device: torch.device) -> "Draws":
        return Draws(*(value.to(device, non_blocking=True) for value in vars(self).values()))


def draw(
    positions: Sequence[int],
    *,
    config: LoraConfig,
    seed: int,
    shape: tuple[int, int, int],
    levels: int,
    purpose: int = DRAWS,
) -> Draws:
    """shape: (C, h, w) of a latent. levels: how many timesteps there are."""
    streams = config.streams
    times, captions, normals, offsets, alike, given = [], [], [], [], [], []
    for position in positions:  # this runs for every sample of every step: as few calls as can be
        g = generator_of(seed, position, purpose)
        times.append(torch.randint(levels, (2,), generator=g))
        captions.append(torch.rand((), generator=g))
        normals.append(torch.randn((2, streams, *shape), generator=g))  # noise and posterior of all streams
        if config.noise_offset:
            offsets.append(torch.randn((streams, shape[0], 1, 1), generator=g))
        if config.independent_timesteps:
            alike.append(torch.rand((), generator=g) >= config.independent_timesteps)
        if config.known_stream:  # drawn last, so that all else is the same without it
            given.append(torch.rand(2, generator=g))
    noise, posterior = torch.stack(normals, dim=2)
    if config.noise_offset:
        noise = noise + config.noise_offset * torch.stack(offsets, dim=1)
    timesteps = torch.stack(times, dim=1)
    timesteps[1] = torch.where(torch.stack(alike), timesteps[0], timesteps[1]) if alike else timesteps[0]
    known = torch.zeros(2, len(positions), dtype=torch.bool)
    if given:
        chosen, side = torch.stack(given, dim=1)
        known = (chosen < config.known_stream) & torch.stack([side < 0.5, side >= 0.5])
    timesteps = timesteps.masked_fill(known, 0)
    timesteps = timesteps[[0] + [1] * (streams - 1)]  # the same for all intrinsics
    return Draws(timesteps, noise, posterior, torch.stack(captions) >= config.caption_drop, known)


@dataclass
class LoraTask:
    """What the engine trains in stage 2."""

    config: LoraConfig
    pipeline: Any
    streams: Streams
    encoder: Encoder
    vae: AutoencoderKL
    held: Sequence[Sample]
    generator: TrainingGenerator | None
    seed: int
    device: torch.device
    size_px: int
    name: str = "lora"

    def __post_init__(self) -> None:
        self.module: nn.Module = network_of(self.pipeline)
        self.levels = signal_levels(self.pipeline).to(self.device)
        self.prediction = prediction_type_of(self.pipeline)
        self.nothing = encode_nothing(self.pipeline)
        shape, levels = self.encoder.shape, len(self.levels)
        self.draw = partial(draw, config=self.config, seed=self.seed, shape=shape, levels=levels)
        if self.config.loop.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()  # type: ignore[operator]
        if self.config.loop.compile:
            self.streams.compile()
        if self.config.cuda_graph:
            self.module = GraphedNetwork(self.module, self.amp)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.streams.trainable()

    def losses(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """image, intrinsic (unweighted) and "loss" of eq. 5, each (B,)."""
        encoded, draws = self.encoder(batch), batch.drawn.to(self.device)
        clean = encoded.sample(draws.posterior)  # (S, B, C, h, w)
        levels = self.levels[draws.timesteps]  # (S, B)
        noisy, wanted = [], []
        for stream in range(len(clean)):
            noisy.append(noised(clean[stream], draws.noise[stream], levels[stream]))
            wanted.append(target(clean[stream], draws.noise[stream], levels[stream], self.prediction))
        text = {
            name: torch.where(_like(draws.captioned, rows), rows, self.nothing[name].to(rows))
            for name, rows in encoded.text.items()
        }
        sizes = torch.tensor([sample.sizes for sample in batch.samples]).to(self.device, non_blocking=True)
        used = self.streams.used
        conditions = network_arguments(
            self.pipeline,
            {name: torch.cat([rows] * len(used)) for name, rows in text.items()},
            sizes.repeat(len(used), 1),
        )
        predicted = self.streams.predict(
            module,
            torch.cat([noisy[stream] for stream in used]),
            torch.cat([draws.timesteps[stream] for stream in used]),
            conditions,
        )
        weight = [snr_weight(levels[stream], self.config.snr_gamma, self.prediction) for stream in range(2)]
        weight = [rows.masked_fill(known, 0) for rows, known in zip(weight, draws.known, strict=True)]
        found = {
            stream: stream_loss(rows, wanted[stream])
            for stream, rows in zip(used, predicted.chunk(len(used)), strict=True)
        }
        terms = {
            "image": found.pop(0, torch.zeros_like(weight[0])),
            "intrinsic": torch.stack(list(found.values())).mean(dim=0),
        }
        loss = weight[0] * terms["image"] + self.config.intrinsic_weight * weight[1] * terms["intrinsic"]
        return terms | {"loss": loss}

    @torch.no_grad()
    def validate(self, sheets: int) -> Validation:
        """Both terms on the held-out samples, each at timesteps spread evenly; the same draws at every call.

        Where known streams are trained, also each term beside the other stream at timestep 0.
        """
        means = self._measure()
        score = means.pop("loss")
        if self.config.known_stream:
            means["image_beside_known"] = self._measure(known=1)["image"]
            means["intrinsic_beside_known"] = self._measure(known=0)["intrinsic"]
        pictures = {}
        if sheets and self.generator is not None:
            prompts = self.config.prompts or tuple(sample.caption for sample in self.held[:sheets])
            pictures = sample_sheet(self.generator, prompts[:sheets], self.config, self.size_px)
        return Validation(score, means, pictures)

    def _measure(self, known: int | None = None) -> dict[str, float]:
        """The means of all terms on the held-out samples. known: 0 or 1, the image or the intrinsics at timestep 0."""
        totals: dict[str, list[Tensor]] = {}
        count = len(self.held) * REPEATS
        for start in range(0, count, self.config.loop.batch):
            numbers = range(start, min(start + self.config.loop.batch, count))
            draws = self.draw(numbers, purpose=MEASURE)
            places = torch.tensor(
                [(number % REPEATS + (number // REPEATS + 0.5) / len(self.held)) for number in numbers]
            )
            spread = (places / REPEATS * len(self.levels)).long().clamp(max=len(self.levels) - 1)
            timesteps = spread.repeat(len(draws.timesteps), 1)
            if known is not None:
                timesteps[0 if known == 0 else slice(1, None)] = 0
            everything, nothing = torch.ones_like(draws.captioned), torch.zeros_like(draws.known)
            draws = Draws(timesteps, draws.noise, draws.posterior, everything, nothing)
            batch = Batch([self.held[number // REPEATS] for number in numbers], draws)
            with torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32):
                for name, value in self.losses(self.module, batch).items():
                    totals.setdefault(name, []).append(value.float().cpu())
        return {name: float(torch.cat(values).mean()) for name, values in totals.items()}

    @property
    def amp(self) -> torch.dtype:
        return precision(self.config.loop, self.device)


def _like(flags: Tensor, rows: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...), to choose among rows (B, ...)."""
    return flags.view(-1, *[1] * (rows.ndim - 1))


def load_task(config: TrainConfig, device: torch.device, world: int) -> tuple[LoraTask, Samples]:
    """The task of stage 2 with its base and the VAE of its intrinsics, and what it learns from.

    Raises UserError when there is no intrinsic VAE, or it does not fit the base, or caches do not fit either.
    """
    if config.lora.cuda_graph and world > 1:
        raise UserError("lora.cuda_graph is for one process: leave it off, or train on one GPU")
    vae = vae_of_intrinsics(config)
    pipeline: Any = open_base(config.base, dtype=precision(config.lora.loop, device))
    if config.lora.shared_vae:
        advice = "train stage 1 beside this base, in another --out"
        folder = config.folder / RESULT
        check_latents(folder, vae, pipeline.vae, other_weights=config.other_weights, advice=advice)
    caches = None
    if config.lora.cache:
        datasets = [Dataset.open(url) for url in config.shards]
        size_px, flip = config.data.size_px, config.data.flip > 0
        caches = Caches(*fitting_caches(datasets, pipeline, vae, size_px=size_px, flip=flip))
    selection = str(config.folder / "training" / "selection")
    samples = Samples(config.shards, config.data, config.seed, selection, caches)
    seen = config.lora.loop.steps * config.lora.loop.batch * config.lora.loop.accumulate * world
    often = SEEN_OFTEN_ON_CPU if device.type == "cpu" else SEEN_OFTEN
    keep = samples.in_memory and seen >= often * len(samples)
    task = make_task(config, pipeline, vae, samples.held_out_samples(), device, keep)
    if keep and device.type != "cpu" and config.data.workers:
        samples.read_ahead(task.encoder.remember)  # a GPU learns from samples faster than they are decoded
    return task, samples


def make_task(
    config: TrainConfig, pipeline: Any, vae: AutoencoderKL, held: Sequence[Sample], device: torch.device, keep: bool
) -> LoraTask:
    """Freezes the base and both VAEs, and puts untrained adapters on the self-attention.

    keep: whether latents and text are remembered once they are encoded.
    """
    lora = config.lora
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    vae = _frozen(nn.Module.to(vae, device=device, dtype=precision(lora.loop, device)))
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            _frozen(part)
    torch.manual_seed(config.seed)  # the adapters begin alike in every process
    streams = make_streams(network_of(pipeline), lora)
    if device.type == "cpu" and precision(lora.loop, device) == torch.bfloat16:
        for layer in network_of(pipeline).modules():
            if isinstance(layer, Attention) and layer.is_cross_attention:
                layer.set_processor(AttnProcessor())  # as infer.model.attention.attend: plain products are faster
    if run := started_from(config, pipeline):
        begin_with(run, streams, config)
    without = tuple(SLICES[name] for name in lora.without)
    return LoraTask(
        config=lora,
        pipeline=pipeline,
        streams=streams,
        encoder=Encoder(pipeline, vae, without=without, size_px=config.data.size_px, keep=keep),
        vae=vae,
        held=held,
        generator=TrainingGenerator(pipeline, streams.denoiser, vae) if streams.denoiser else None,
        seed=config.seed,
        device=device,
        size_px=config.data.size_px,
    )


def vae_of_intrinsics(config: TrainConfig) -> AutoencoderKL:
    """The trained VAE of stage 1; without a shared VAE the base's own, for which no stage 1 is needed. float32.

    Raises UserError when stage 1 is not finished, or when its result would be overwritten.
    """
    if config.lora.shared_vae:
        return trained_vae(config)
    if (config.folder / STAGE_ONE).exists():
        raise UserError(f"{config.out} has a stage 1, which lora.shared_vae = false does not use; choose another --out")
    pipeline: Any = open_base(config.base, dtype=torch.float32)
    return SeparateVae.of(pipeline.vae)


def train_lora(config: TrainConfig) -> Outcome:
    """Trains stage 2, and writes the run folder. The same call again continues."""
    accelerator = make_accelerator()
    with only_one(config.folder / TRAINING) if accelerator.is_main_process else contextlib.nullcontext():
        return _train_lora(config, accelerator)


def _train_lora(config: TrainConfig, accelerator: Accelerator) -> Outcome:
    world = accelerator.num_processes
    task, samples = load_task(config, accelerator.device, world)
    network = network_of(task.pipeline)
    if accelerator.is_main_process and config.lora.shared_vae and not says_its_base(config.folder / RESULT):
        print(
            f"note: {config.folder / RESULT} does not say beside which base it was trained: only its scale was compared",
            file=sys.stderr,
        )
    settings = config.identity("lora", world) | {"vae": weights_digest(task.vae)}
    untrained = task.streams.weights({name: p.detach() for name, p in task.trainable().items()})
    prediction, shared_vae = prediction_type_of(task.pipeline), config.lora.shared_vae
    manifest = manifest_for(network, config.base, prediction, untrained, shared_vae=shared_vae)
    training = settings | {"base": manifest.base.architecture, "recipe": config.name}

    def finish(average: Mapping[str, Tensor], step: int) -> None:
        weights = task.streams.weights(average)
        finished = dataclasses.replace(manifest, training=training | {"steps": step})
        save_run(config.out, finished, weights, vae_of_intrinsics(config))

    return train(
        task,
        config.lora.loop,
        samples,
        accelerator=accelerator,
        folder=config.folder / STAGE,
        identity=Identity(
            settings=settings,
            base=describe_pipeline(task.pipeline, config.base),
            defaults=config.defaults("lora"),
        ),
        seed=config.seed,
        result={"manifest": dataclasses.asdict(dataclasses.replace(manifest, training=training))},
        finish=finish,
    )


def _frozen(module: Any) -> Any:
    return module.requires_grad_(False).eval()
