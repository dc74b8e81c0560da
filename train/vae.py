"""Stage 1: the intrinsic VAE (paper, sec. 3.2): the base's VAE, widened to the packed intrinsics, fine-tuned; or another
run's, which learns on.

Each intrinsic is zeroed in the input with probability 0.1, independently, so that no single one dominates the latent. The
loss then asks for the intrinsics that were given (ours; `vae.missing` asks for the others too).
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from infer.bases.loading import open_base
from infer.model.vae import scaled, widen
from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from shards.inspect.display import SheetRow, sheet
from shards.intrinsics import INTRINSICS
from shards.packing import CHANNELS, SLICES, unpack
from train.config import TrainConfig, VaeConfig
from train.data import Batch, HeldOutSample, Samples, generator_of
from train.engine import Outcome, Validation, make_accelerator, train
from train.identity import MADE_FROM, Identity, check_latents, describe_vae
from train.lock import only_one
from train.metrics import compare, mean_of
from train.vae_loss import kl, reconstruction, weighted
from train.warm_start import ANEW, started_from

DRAWS = 1  # purpose of this stage's generators (train.data.generator_of)
TRAINING, STAGE, RESULT = "training", "training/vae", "vae"
_PICTURES = 16
"""So many pictures say what mean and deviation the base's latent channels have: roughly, but the KL term is weak."""
_LEAST_STD = 0.05  # of the mean deviation: a channel that the base leaves empty is not closed to the intrinsics


class Autoencoder(nn.Module):
    """One module for encoding, sampling and decoding, so that several processes can share its gradient."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, packed: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """packed (B, 8, H, W), noise (B, C, h, w) -> made (B, 8, H, W), and the posterior's mean and log variance."""
        posterior = self.vae.encode(packed).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        made = self.vae.decode(mean + (0.5 * logvar).exp() * noise).sample
        return made.float(), mean, logvar


def draw(positions: Sequence[int], *, drop: float, seed: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For B samples which intrinsics are given, bool (B, 4), and the posterior's noise, float32 (B, C, h, w)."""
    generators = [generator_of(seed, position, DRAWS) for position in positions]
    given = torch.stack([torch.rand(len(INTRINSICS), generator=g) >= drop for g in generators])
    return given, torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


@dataclasses.dataclass
class VaeTask:
    """What the engine trains in stage 1. image_latents: the base's, of pictures as large, (N, C, h, w), unscaled."""

    config: VaeConfig
    vae: AutoencoderKL
    held: Sequence[HeldOutSample]
    image_latents: Tensor
    seed: int
    device: torch.device
    name: str = "vae"

    def __post_init__(self) -> None:
        self.module = Autoencoder(self.vae)
        if self.config.loop.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        if self.config.loop.channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.config.loop.compile:
            self.module.compile()
        std, self._prior_mean = torch.std_mean(self.image_latents, dim=(0, 2, 3), keepdim=True)
        self._prior_std = std.clamp(min=_LEAST_STD * float(std.mean()))
        self._weights = {name: float(getattr(self.config, name)) for name in INTRINSICS}
        self.draw = partial(draw, drop=self.config.drop, seed=self.seed, shape=self.image_latents.shape[1:])
        self._lpips = None if not self.config.lpips else _perceptual(self.device)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.vae.named_parameters())

    def losses(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """depth, normal, segmentation, line, kl and their weighted sum, each (B,)."""
        x, valid = batch.packed().to(self.device), batch.valid().to(self.device)
        given, noise = (drawn.to(self.device) for drawn in batch.drawn)
        shown = x * channels_of(given)[..., None, None]
        if self.config.loop.channels_last:
            shown = shown.contiguous(memory_format=torch.channels_last)
        made, mean, logvar = module(shown, noise)
        terms = reconstruction(made, x, valid)
        terms["kl"] = kl(mean, logvar, self._prior_mean, self._prior_std)
        loss = weighted(terms, self._weights, given, self.config.missing) + self.config.kl * terms["kl"]
        if self._lpips is not None:
            terms["lpips"] = perceptual(self._lpips, made, x)
            loss = loss + self.config.lpips * terms["lpips"]
        return terms | {"loss": loss}

    @torch.no_grad()
    def validate(self, sheets: int) -> Validation:
        """Every measure with all intrinsics given, and with each one missing ("without_depth/normal/angle", ...)."""
        metrics: dict[str, float] = {}
        score, shown = 0.0, list[SheetRow]()
        for missing in (None, *INTRINSICS):
            rows, latents = list[dict[str, float]](), list[Tensor]()
            losses = list[float]()
            for start in range(0, len(self.held), self.config.loop.batch):
                some = self.held[start : start + self.config.loop.batch]
                batch = Batch([one.sample for one in some])
                x = batch.packed().to(self.device)
                given = x.clone()
                if missing is not None:
                    given[:, SLICES[missing]] = 0
                z = self.vae.encode(given).latent_dist.mode()
                made = self.vae.decode(z).sample.float()
                terms = reconstruction(made, x, batch.valid().to(self.device))
                everything = torch.ones(len(some), len(INTRINSICS), dtype=torch.bool, device=self.device)
                losses += weighted(terms, self._weights, everything, 0.0).tolist()
                latents.append(scaled(self.vae, z.float()))
                for one, channels in zip(some, made.cpu().numpy(), strict=True):
                    maps = unpack(channels, one.depth, blurred=True)
                    rows.append(compare(maps, one.maps))
                    if missing is None and len(shown) < 2 * sheets:
                        shown += [(one.image, one.maps, one.sample.caption), (one.image, maps, "reconstructed")]
            prefix = "" if missing is None else f"without_{missing}/"
            metrics |= {prefix + name: value for name, value in mean_of(rows).items()}
            if missing is None:
                score = sum(losses) / len(losses)
                every = torch.cat(latents)
                metrics |= {"latent/std": float(every.std()), "latent/mean": float(every.mean())}
        metrics["latent/std_of_images"] = float(scaled(self.vae, self.image_latents).std())
        pictures: dict[str, Image.Image] = {"reconstructions": sheet(shown, 192)} if shown else {}
        return Validation(score, metrics, pictures)


def channels_of(given: Tensor) -> Tensor:
    """bool (B, 4), by intrinsic -> bool (B, 8), by packed channel."""
    widths = torch.tensor([row.channels for row in INTRINSICS.values()], device=given.device)
    return given.repeat_interleave(widths, dim=1)


def _perceptual(device: torch.device) -> nn.Module:
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise UserError("vae.lpips needs the package lpips: install it, or set vae.lpips = 0") from error
    made: nn.Module = LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)
    return made


def perceptual(lpips: nn.Module, made: Tensor, x: Tensor) -> Tensor:
    """(B,): LPIPS of every intrinsic shown as a picture of three channels, averaged."""
    total = torch.zeros(len(x), device=x.device)
    for channels in SLICES.values():
        pictures = (part[:, channels].expand(-1, 3, -1, -1) for part in (made, x))
        total = total + lpips(*pictures).flatten()
    return total / len(SLICES)


def train_vae(config: TrainConfig) -> Outcome:
    """Trains stage 1 and writes RUN/vae, a diffusers folder. The same call again continues."""
    if not config.lora.shared_vae:
        raise UsageError("with lora.shared_vae = false there is no stage 1: run `python -m train lora` alone")
    accelerator = make_accelerator()
    with only_one(config.folder / TRAINING) if accelerator.is_main_process else contextlib.nullcontext():
        return _train_vae(config, accelerator)


def _train_vae(config: TrainConfig, accelerator: Accelerator) -> Outcome:
    device = accelerator.device
    torch.manual_seed(config.seed)
    pipeline: Any = open_base(config.base, dtype=torch.float32)
    samples = Samples(config.shards, config.data, config.seed, str(config.folder / TRAINING / "selection"))
    held = samples.held_out()
    base_vae = pipeline.vae.to(device).eval()
    vae = _begin(config, pipeline, base_vae)
    with torch.no_grad():
        images = Batch([one.sample for one in held[:_PICTURES]]).image().to(device)
        image_latents = base_vae.encode(images).latent_dist.mode()
    task = VaeTask(config.vae, vae.to(device).train(), held, image_latents, config.seed, device)
    made_from = describe_vae(base_vae)

    def finish(average: Mapping[str, Tensor], step: int) -> None:
        save_result(with_weights(vae, average), config.folder / RESULT, made_from)

    return train(
        task,
        config.vae.loop,
        samples,
        accelerator=accelerator,
        folder=config.folder / STAGE,
        identity=Identity(
            settings=config.identity("vae", accelerator.num_processes),
            base={"vae": made_from},
            defaults=config.defaults("vae"),
        ),
        seed=config.seed,
        result={"vae": json.loads(vae.to_json_string())},
        finish=finish,
    )


def _begin(config: TrainConfig, pipeline: Any, base_vae: AutoencoderKL) -> AutoencoderKL:
    """The intrinsic VAE before its first step: that of the run to start from, or the base's own, widened."""
    run = started_from(config, pipeline)
    if run is None:
        return widen(base_vae)
    vae = intrinsic_vae(run / RESULT)
    check_latents(run / RESULT, vae, base_vae, other_weights=config.other_weights, advice=ANEW)
    return vae


def with_weights(vae: AutoencoderKL, values: Mapping[str, Tensor]) -> AutoencoderKL:
    """The VAE with these values in its parameters."""
    state = vae.state_dict()
    for name, value in values.items():
        state[name].copy_(value)
    return vae


def save_result(vae: AutoencoderKL, folder: Path, made_from: Mapping[str, Any] | None = None) -> None:
    """Writes the trained VAE as a diffusers folder, in one go. Raises UserError (a full disk, ...); what was there stays.

    made_from: describe_vae of the base's VAE beside which it was trained.
    """
    parent, temporary = Folder(folder.parent), f".{folder.name}.tmp"
    parent.remove(temporary)
    parent.make(temporary)
    parent.write(f"{temporary}/{CONFIG_NAME}", vae.to_json_string().encode())
    tensors = {name: value.detach().cpu().contiguous() for name, value in vae.state_dict().items()}
    parent.write(f"{temporary}/{SAFETENSORS_WEIGHTS_NAME}", save(tensors, {"format": "pt"}))
    if made_from is not None:
        parent.write(f"{temporary}/{MADE_FROM}", json.dumps(made_from, indent=1, sort_keys=True).encode())
    parent.remove(folder.name)
    parent.publish(temporary, folder.name)


def trained_vae(config: TrainConfig) -> AutoencoderKL:
    """The result of stage 1 of this run. Raises UserError when there is none."""
    folder = config.folder / RESULT
    if not (folder / "config.json").exists():
        raise UserError(f"{config.out} has no finished intrinsic VAE; train it first with `python -m train vae`")
    return intrinsic_vae(folder)


def intrinsic_vae(folder: Path) -> AutoencoderKL:
    """The intrinsic VAE in a diffusers folder, in float32.

    Raises UserError when it cannot be loaded or reads no packed intrinsics.
    """
    try:
        vae: Any = AutoencoderKL.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded: {error}") from error
    if vae.config["in_channels"] != CHANNELS:
        raise UserError(f"{folder} reads {vae.config['in_channels']} channels; an intrinsic VAE reads {CHANNELS}")
    return vae.float()
