"""A training step of stage 2 beside diffusers' own text-to-image LoRA step: time and peak memory, in one run.

    python -m benchmarks.train_step                                  mid-size network, CPU, two to five minutes
    python -m benchmarks.train_step --size full --device cuda --dtype bfloat16 --pixels 512 --batch 8

Both steps have the same base (random weights), batch, precision, optimiser, LoRA rank, and learn from the same pictures and
captions. diffusers' step is written here plainly, as its example train_text_to_image_lora.py does it: the VAE encodes the
images, the text encoder the captions, one stream is denoised, a peft LoRA on the attention learns. Ours encodes images and
intrinsics, denoises both streams, and learns from both. "cached" is with posteriors and text remembered, as `python -m train
cache` gives them; diffusers' example has no such thing: that row only says what of ours is not the encoders'.
Every row runs in a process of its own, so that its peak memory is its own (on the CPU the process's peak resident size, with
imports and models). The floating-point operations of one step, counted in a further step, say what a ratio can be; CPU time
says more than wall time on a machine that is busy. The mid-size VAE and U-Net share them as SD 2.1's do (1.2 and 1.4 to one).
Goals, against diffusers' step as it is: <= 2.4x without caches, <= 2.0x with, peak memory <= 2.0x.
"""

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import DDPMScheduler
from peft import LoraConfig as PeftConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.sampling import UNETS, build
from infer.model.vae import widen
from train.config import load_train_config
from train.data import Batch, Sample
from train.demo.base_networks import make_tokenizer
from train.lora import make_task

RANK, TOKENS = 32, 77
MODES = ("diffusers", "ours", "ours, cached", "diffusers, cached")
TEXT_LAYERS = {"tiny": 2, "mid": 6, "full": 23}


def make_base(size: str, device: str, dtype: torch.dtype) -> Any:
    """A Stable Diffusion pipeline with random weights and a text encoder of the real one's size."""
    pipeline = build(size, device, dtype)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = TOKENS
    width = UNETS[size]["cross_attention_dim"]
    shape = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=TEXT_LAYERS[size],
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=TOKENS,
    )
    with torch.device(device):  # drawing 340 million weights on the CPU takes longer than the benchmark
        encoder = CLIPTextModel(shape)
    pipeline.register_modules(tokenizer=tokenizer, text_encoder=encoder.to(device, dtype).eval().requires_grad_(False))
    return pipeline


def make_batch(batch: int, pixels: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(
            key=f"sample-{i}",
            position=i,
            image=torch.randint(256, (3, pixels, pixels), generator=generator).to(torch.uint8),
            packed=torch.rand(8, pixels, pixels, generator=generator).mul(2).sub(1).half(),
            valid=torch.ones(4, pixels, pixels, dtype=torch.bool),
            caption="a red sphere left of a blue cube on a wooden floor",
            sizes=(pixels, pixels, 0, 0, pixels, pixels),
        )
        for i in range(batch)
    ]
    return Batch(samples)


def diffusers_step(pipeline: Any, batch: Batch, device: str, dtype: torch.dtype, cached: bool) -> Callable[[], None]:
    """The step of diffusers' example, for v or epsilon prediction, with LoRA weights in float32."""
    unet, vae, encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    unet.requires_grad_(False)
    unet.add_adapter(PeftConfig(r=RANK, lora_alpha=RANK, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    learning = [p for p in unet.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.data = parameter.data.float()
    optimiser = torch.optim.AdamW(learning, lr=1e-4, fused=True)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    ids = pipeline.tokenizer(
        [sample.caption for sample in batch.samples], max_length=TOKENS, padding="max_length", truncation=True
    )

    @torch.no_grad()
    def encoded() -> tuple[Any, torch.Tensor]:
        posterior = vae.encode(batch.image().to(device, dtype)).latent_dist
        return posterior, encoder(torch.tensor(ids["input_ids"], device=device), return_dict=False)[0]

    kept = encoded() if cached else None

    def step() -> None:
        posterior, text = kept or encoded()
        latents = posterior.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (len(latents),), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        is_epsilon = scheduler.config.prediction_type == "epsilon"
        wanted = noise if is_epsilon else scheduler.get_velocity(latents, noise, timesteps)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            made = unet(noisy, timesteps, text, return_dict=False)[0]
            loss = F.mse_loss(made.float(), wanted.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def our_step(pipeline: Any, batch: Batch, device: str, dtype: torch.dtype, cached: bool) -> Callable[[], None]:
    pixels = batch.samples[0].image.shape[-1]
    settings = [f"data.size_px={pixels}", f"lora.rank={RANK}"]
    settings.append(f"lora.loop.precision={'float32' if dtype == torch.float32 else 'bf16'}")
    config = load_train_config("demo", base="", shards=["none"], out="none", start="", settings=settings)
    task = make_task(config, pipeline, widen(pipeline.vae), [], torch.device(device), keep=cached)
    learning = list(task.trainable().values())
    optimiser = torch.optim.AdamW(learning, lr=1e-4, fused=True)
    positions = [sample.position for sample in batch.samples]

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = task.losses(task.module, Batch(batch.samples, task.draw(positions)))["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def measure(mode: str, size: str, batch: int, pixels: int, steps: int, device: str, dtype: torch.dtype) -> dict:
    """Median seconds (wall and CPU) of a step after two to warm up, its FLOP, and the process's peak memory in GiB."""
    pipeline, data = make_base(size, device, dtype), make_batch(batch, pixels)
    make_step = diffusers_step if "diffusers" in mode else our_step
    step = make_step(pipeline, data, device, dtype, cached="cached" in mode)
    walls, cpus = [], []
    for _ in range(2 + steps):
        wall, cpu = perf_counter(), process_time()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        walls.append(perf_counter() - wall)
        cpus.append(process_time() - cpu)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF)[2]
    with FlopCounterMode(display=False) as counter:
        step()
    return {
        "seconds": statistics.median(walls[2:]),
        "cpu": statistics.median(cpus[2:]),
        "tflop": counter.get_total_flops() / 1e12,
        "gib": peak / 2**30,
    }


def main(
    size: Annotated[str, typer.Option(help="tiny, mid, or full (SD 2.1's own configuration).")] = "mid",
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 4,
    pixels: Annotated[int, typer.Option(help="Side of the images.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps to time, after two to warm up.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    mode: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Prints a row as soon as it is measured."""
    if mode is not None:
        print(json.dumps(measure(mode, size, batch, pixels, steps, device, getattr(torch, dtype))))
        return
    where = torch.cuda.get_device_name() if device == "cuda" else device
    print(
        f"One training step, {size}, batch {batch}, {pixels} px, {dtype}, {where}; each figure beside its ratio to diffusers'"
    )
    print(f"{'step':18}" + "".join(f"{column:>16}" for column in ("seconds", "CPU s", "TFLOP", "peak GiB")), flush=True)
    first: dict[str, float] = {}
    for name in MODES:
        command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--mode", name]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        first = first or found
        print(f"{name:18}" + "".join(f"{found[key]:10.3f}{found[key] / first[key]:6.2f}" for key in found), flush=True)


if __name__ == "__main__":
    typer.run(main)
