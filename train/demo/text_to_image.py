"""Trains the embedded base on the demo world: first its VAE, then text to image. Its result ships as infer/embedded/demo/base.

    python -m train scenes --out runs/truth --count 24000
    python -m train base --shards runs/truth --out runs/base

    torchrun --nproc-per-node 2 -m train base ...      the same by two processes, each with its half of every batch; on one
                                                       machine, threads are faster
    python -m train base --vae demo ...                        takes the VAE of a finished pipeline, and trains the rest
    python -m train base --pretrained demo --steps 9000 ...    goes on from a finished pipeline, whose VAE stays as it is

On a GPU where there is one; the U-Net's kernels are then replayed as CUDA graphs. Each stage is a pure function of (seed,
step) and goes on from its last checkpoint.
"""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from extract.world.grammar import parse
from infer.model.denoiser import JointDenoiser
from infer.model.schedules import Joint
from shards.core.cores import cores
from shards.core.errors import UsageError, UserError
from shards.dataset import Dataset
from train.cuda_graph import GraphedNetwork
from train.data import CPU, generator_of, mirrored
from train.demo.base_networks import (
    ARCHITECTURES,
    EMBEDDED,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
    save_base,
)
from train.demo.ground_truth import fully_named
from train.demo.latent_channels import weigh_channels
from train.demo.loop import SmallLoop, run_loop
from train.demo.state import STATE, settings_of
from train.lock import only_one
from train.muon import StackedMuon, has_bf16

NOISE, TWINS = 4, 5  # purposes of train.data.generator_of
DECAY, BETAS = 0.01, (0.9, 0.99)  # of both optimisers


@dataclass(frozen=True, kw_only=True)
class BaseTraining:
    """The recipe: vae_* of the first stage, the rest of the second.

    pretrained: a finished pipeline, whose VAE is kept and whose U-Net and text encoder learn on; vae: one of which only the VAE
    is taken; neither: all is new.
    cooldown: the last share of the steps, in which the rate falls to zero. Before it the rate is constant, so that a run
    may be given more steps as long as it has not reached it.
    held_out: pictures at the end of the shards that nothing learns from (at most a quarter of them); the VAE is measured on
    them. timesteps: the beta distribution, in 0..1, of those that the U-Net learns at: where things are, and of what shape, is
    decided between 0.35 and 0.9; near 0, where much of a uniform draw's loss is, only their grain.
    dropout: the share of captions that are left empty. compile: the U-Net by torch.compile, on a CPU only (a GPU replays its
    kernels as CUDA graphs).
    architecture: a row of train.demo.base_networks.ARCHITECTURES.
    stop_at: end after this step of the second stage and write the pipeline of the averaged weights so far; the same training
    without it, or with a later step, continues to the same result.
    """

    shards: str
    out: Path = Path("runs/base")
    pretrained: Path | None = None
    vae: Path | None = None
    seed: int = 0
    held_out: int = 256
    vae_steps: int = 30_000
    vae_batch: int = 8
    vae_rate: float = 2e-3
    kl: float = 1e-6
    steps: int = 5_900
    batch: int = 128
    rate: float = 2.5e-3
    timesteps: tuple[float, float] = (2.0, 1.5)
    dropout: float = 0.1
    ema: float = 0.998
    warmup: int = 100
    cooldown: float = 0.6
    save_every: int = 100
    compile: bool = False
    architecture: str = EMBEDDED
    stop_at: int | None = None
    twins: float = 0.0
    """The fraction of steps in which each image is there twice, with noise and a timestep of each one's own, and
    self-attention reads both (eq. 1). Without it self-attention has no need to find the same place in another image, which
    is what joint attention asks of the frozen base."""

    def __post_init__(self) -> None:
        if not 0 <= self.twins <= 1:
            raise UsageError(f"--twins {self.twins}: give a fraction from 0 to 1")
        if self.twins and self.batch % 2:
            raise UsageError(f"--twins needs an even batch, not {self.batch}")
        if self.twins and self.compile:
            raise UsageError("--twins changes the network from step to step: leave --compile out")
        if self.architecture not in ARCHITECTURES:
            raise UsageError(
                f"there is no architecture {self.architecture!r} of a base; choose one of {', '.join(ARCHITECTURES)}"
            )


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """images: uint8 (N, H, W, 3), and their captions."""

    images: np.ndarray
    captions: list[str]

    @staticmethod
    def read(url: str) -> "Pictures":
        """Of a dataset of `train scenes` those whose captions name all that is there, into memory (12 KB a picture of 64 px).

        Half of the plain world's scenes are so: things that no word asked for would be most of what there is to learn.
        Raises UserError if there are none.
        """
        shards = Dataset.open(url).shard_names()
        with ProcessPoolExecutor(max(1, min(len(shards), cores())), get_context("spawn")) as pool:
            found = [pair for pairs in pool.map(partial(fully_named, url), shards) for pair in pairs]
        if not found:
            raise UserError(f"{url} holds no scenes; make some with: python -m train scenes --out {url}")
        return Pictures(np.stack([image for image, _ in found]), [caption for _, caption in found])

    def split(self, held_out: int) -> tuple["Pictures", "Pictures"]:
        """Those to learn from, each also mirrored with its caption, and the last `held_out` ones (at most a quarter)."""
        count = len(self.images) - min(held_out, len(self.images) // 4)
        images, captions = self.images[:count], self.captions[:count]
        learned = Pictures(np.concatenate([images, images[:, :, ::-1]]), [*captions, *map(mirrored, captions)])
        return learned, Pictures(self.images[count:], self.captions[count:])


def evenly(captions: Sequence[str]) -> np.ndarray:
    """How often each caption is drawn, float64 (N,) with sum 1: rare relations more often than they are there.

    A relation's share is as the root of its number: to the side are ten times as many as behind or on top.
    """
    kinds = [tuple(stated.relation for stated in parse(caption).relations) for caption in captions]
    counts = Counter(kinds)
    shares = np.array([counts[kind] ** -0.5 for kind in kinds])
    return shares / shares.sum()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pixels(images: np.ndarray, device: torch.device = CPU) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---- the loop --------------------------------------------------------------------------------------------------------


def _rate(step: int, steps: int, config: BaseTraining) -> float:
    """Linear warm-up, a constant, and in the end a straight line to zero."""
    return min(1, (step + 1) / config.warmup, (steps - step) / max(1, config.cooldown * steps))


def _train(
    net: nn.Module,
    loss_of: Callable[[int, slice], Tensor],
    optimiser: torch.optim.Optimizer,
    *,
    steps: int,
    rate: float,
    config: BaseTraining,
    folder: Path,
    title: str,
    stop_at: int | None = None,
) -> None:
    """Minimises loss_of(step, rows) over the parameters of `net`, which ends with its averaged weights.

    rows: this process's part of the step's batch. stop_at: as SmallLoop has it.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    no_result = ("shards", "out", "held_out", "steps", "vae_steps", "stop_at", "save_every", "compile")
    loop = SmallLoop(
        title=title,
        state=folder / STATE,
        settings=settings_of(config, no_result) | {"steps": steps},
        steps=steps,
        rate=lambda step: rate * _rate(step, steps, config),
        ema=config.ema,
        save_every=config.save_every,
        stop_at=stop_at,
        autocast=torch.bfloat16 if has_bf16(next(net.parameters()).device) else None,
    )
    run_loop(net, optimiser, count, lambda step, _: {"loss": loss_of(step, slice(rank, None, world))}, loop)


# ---- stage one: the VAE ----------------------------------------------------------------------------------------------


def train_vae(config: BaseTraining, pictures: Pictures, held_out: Pictures) -> AutoencoderKL:
    """Squared error of pixels, and a little KL. Returns the VAE with its channels weighed and its scaling_factor measured."""
    torch.manual_seed(config.seed)
    device = _device()
    architecture = ARCHITECTURES[config.architecture]
    vae = make_vae(architecture)
    shape = (architecture.latent_channels, architecture.latent_px, architecture.latent_px)
    nn.Module.to(vae, device)

    def loss_of(step: int, part: slice) -> Tensor:
        rng = np.random.default_rng([config.seed, 1, step])
        rows = rng.integers(len(pictures.images), size=config.vae_batch)
        noise = rng.standard_normal((config.vae_batch, *shape), np.float32)
        x = pixels(pictures.images[rows[part]], device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.mean + posterior.std * torch.from_numpy(noise[part]).to(device)).sample
        return 4 * F.mse_loss(y, x) + config.kl * posterior.kl().mean()

    _train(
        vae,
        loss_of,
        torch.optim.AdamW(vae.parameters(), weight_decay=DECAY, betas=BETAS, fused=True),
        steps=config.vae_steps,
        rate=config.vae_rate,
        config=config,
        folder=config.out / "vae",
        title="VAE",
    )
    vae.cpu()
    weigh_channels(vae, pixels(pictures.images[:256]))
    z = _means(vae, pictures.images[:1024])
    vae.register_to_config(scaling_factor=float(1 / z.std()))
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"VAE: {psnr(vae.eval(), held_out.images):.1f} dB on pictures that it has not seen")
    return vae.eval().requires_grad_(False)


def _finished_vae(folder: Path) -> AutoencoderKL:
    """Raises UserError if there is no pipeline."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is no diffusers folder: it has no model_index.json")
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """How well a VAE gives images back, uint8 (N, H, W, 3): the mean of their PSNRs, in dB."""
    x = pixels(images)
    y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    return float((10 * torch.log10(4 / (y - x).square().mean(dim=(1, 2, 3)))).mean())


def _means(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """The posterior means (N, C, h, w) of images uint8 (N, H, W, 3), unscaled, on the CPU."""
    device, parts = vae.device, []
    batch = 64 if device.type == "cpu" else 1024  # what fits a cache, and what keeps a GPU busy
    with torch.no_grad():
        for start in range(0, len(images), batch):
            parts.append(vae.encode(pixels(images[start : start + batch], device)).latent_dist.mean.cpu())
    return torch.cat(parts).contiguous()


def _latents(config: BaseTraining, vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """_means, kept in config.out: encoding all pictures takes minutes, and every process and every start needs them."""
    path = config.out / "latents.safetensors"
    weights = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in vae.state_dict().values()))
    made_of = f"{weights.hexdigest()} {hashlib.sha256(images.tobytes()).hexdigest()}"
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata()["made_of"] == made_of:
                return file.get_tensor("mean")
    means = _means(vae, images)
    if not dist.is_initialized() or dist.get_rank() == 0:
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({"mean": means}, temporary, {"made_of": made_of})
        temporary.replace(path)
    return means


# ---- stage two: text to image ----------------------------------------------------------------------------------------


def _muon(net: nn.Module) -> torch.optim.Optimizer:
    """Muon for matrices and convolutions, AdamW for vectors, embeddings and the first and the last layer.

    What that is worth beside AdamW alone: docs/training.md, "The optimiser".
    """
    ends = ("embedding.weight", "conv_in.weight", "conv_out.weight")
    parameters = list(net.named_parameters())
    inner = {"params": [value for name, value in parameters if not name.endswith(ends)]}
    outer = {"params": [value for name, value in parameters if name.endswith(ends)], "use_fallback": True}
    return StackedMuon([inner, outer], weight_decay=DECAY, betas=BETAS)


def train_text_to_image(config: BaseTraining, pictures: Pictures, vae: AutoencoderKL) -> None:
    """v prediction of the latents, with the text encoder; writes the finished pipeline to config.out."""
    tokenizer, scheduler = make_tokenizer(), make_scheduler()
    torch.manual_seed(config.seed + 1)
    unet, text = make_unet(ARCHITECTURES[config.architecture]), make_text_encoder(tokenizer)
    if config.pretrained:
        unet = UNet2DConditionModel.from_pretrained(config.pretrained, subfolder="unet", torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(config.pretrained, subfolder="text_encoder").float()
    device = _device()
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # of 64 tokens, plain products are faster than the fused kernel
    net = nn.ModuleDict({"unet": unet, "text": text}).to(device)
    graph = device.type == "cuda" and not dist.is_initialized() and not config.twins
    denoise = GraphedNetwork(unet, torch.bfloat16) if graph else unet
    if config.compile:
        unet.compile()
    nn.Module.to(vae, device)
    latents = (_latents(config, vae, pictures.images) * vae.config["scaling_factor"]).to(device)

    def tokens_of(captions: list[str]) -> Tensor:
        return torch.as_tensor(tokenizer(captions, padding="max_length", truncation=True)["input_ids"]).to(device)

    tokens, empty = tokens_of(pictures.captions), tokens_of([""])
    chances = np.cumsum(evenly(pictures.captions))
    kept = scheduler.alphas_cumprod.to(device)  # the share of the signal's variance that is left at each timestep

    def loss_of(step: int, part: slice) -> Tensor:
        rng = np.random.default_rng([config.seed, 2, step])
        numbers = np.searchsorted(chances, rng.random(config.batch) * chances[-1], side="right").clip(
            max=len(chances) - 1
        )
        empties = rng.random(config.batch) < config.dropout
        times = (rng.beta(*config.timesteps, size=config.batch) * len(kept)).astype(int)
        twins = _are_twins(config, step)
        if twins is not None:
            half = config.batch // 2
            numbers[half:], empties[half:] = numbers[:half], empties[:half]
            times[half:] = times[half:] * twins  # cleaner as a rule: a twin that is worth reading
        # a copy that is waited for waits for all that the GPU has to do
        drawn = (torch.from_numpy(values).to(device, non_blocking=True) for values in (numbers, empties, times))
        rows, dropped, t = drawn
        z, ids = latents[rows], tokens[rows]
        ids = torch.where(dropped[:, None], empty, ids)
        noise = torch.randn(z.shape, device=device, generator=generator_of(config.seed, step, NOISE, device))
        signal, sigma = (level[t, None, None, None] for level in (kept.sqrt(), (1 - kept).sqrt()))
        noisy, target = signal * z + sigma * noise, signal * noise - sigma * z
        words = text(ids[part])[0]
        with _joint(unet, len(words) // 2) if twins is not None else nullcontext():
            made = denoise(noisy[part], t[part], encoder_hidden_states=words, return_dict=False)[0]
        return F.mse_loss(made, target[part])

    _train(
        net,
        loss_of,
        _muon(net),
        steps=config.steps,
        rate=config.rate,
        config=config,
        folder=config.out / "unet",
        title="text to image",
        stop_at=config.stop_at,
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_base(config.out / "pipeline", vae.cpu(), unet.cpu(), text.cpu(), tokenizer)


def _are_twins(config: BaseTraining, step: int) -> np.ndarray | None:
    """None for a step without twins; else by how much each second one's timestep is brought down, (B / 2,) in 0..1."""
    if not config.twins:
        return None
    rng = np.random.default_rng([config.seed, TWINS, step])
    return rng.random(config.batch // 2) if rng.random() < config.twins else None


@contextmanager
def _joint(unet: UNet2DConditionModel, images: int) -> Iterator[None]:
    """For one call, self-attention over the two rows of each image."""
    denoiser = JointDenoiser.install(unet)
    denoiser.prepare(images, Joint())
    try:
        yield
    finally:
        denoiser.uninstall()


def train_base(config: BaseTraining) -> Path:
    """Both stages; returns the folder of the finished pipeline. Resumes by itself.

    Raises UserError if there is nothing to learn from, or config.compile is set on a GPU.
    """
    if config.compile and _device().type != "cpu":
        raise UserError("--compile is for a CPU: a GPU replays the U-Net's kernels as CUDA graphs; leave it out")
    if config.twins and config.batch // 2 % int(os.environ.get("WORLD_SIZE", 1)):
        raise UsageError("--twins: half of the batch must be a multiple of the number of processes")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    main = not dist.is_initialized() or dist.get_rank() == 0
    with only_one(config.out) if main else contextlib.nullcontext():
        return _train_both(config)


def _train_both(config: BaseTraining) -> Path:
    pictures, held_out = Pictures.read(config.shards).split(config.held_out)
    print(f"{len(pictures.captions)} pictures to learn from, half of them mirrored; {len(held_out.captions)} held out")
    config.out.mkdir(parents=True, exist_ok=True)
    given = config.pretrained or config.vae
    vae = _finished_vae(given) if given else train_vae(config, pictures, held_out)
    train_text_to_image(config, pictures, vae)
    return config.out / "pipeline"
