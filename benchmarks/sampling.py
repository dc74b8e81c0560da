"""What sampling with intrinsics costs beside the stock pipeline, in one run: time, ratio and peak memory.

    python -m benchmarks.sampling                                        small network, CPU, a minute
    python -m benchmarks.sampling --size full --steps 2 --pixels 512     SD 2.1's real configuration, random weights
    python -m benchmarks.sampling --size full --device cuda --dtype bfloat16 --pixels 768 --steps 25
    python -m benchmarks.sampling --size sdxl --dtype bfloat16           builds SDXL and loads a rank-32 run folder

Every row runs in a process of its own, so that its peak memory is its own: on the CPU the process's peak resident size
(imports included), on a GPU the peak allocated there. Text is random embeddings: text encoders cost all rows alike.
Goals (SD 2.1, 768 px, bfloat16, GPU): both streams <= 2.5x the base's time, image only with Gaussian <= 1.9x,
peak memory <= 1.6x.
"""

import json
import resource
import subprocess
import sys
import tempfile
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from rich.console import Console
from rich.table import Table

from infer.model.denoiser import JointDenoiser
from infer.model.vae import widen
from infer.run_folder import manifest_for, save_run
from infer.sampler import CoGenerator

RANK = 32
MODES = {
    "base pipeline": None,
    "both streams, joint (w = 1)": {"schedule": "joint"},
    "both streams, drop": {"schedule": "drop"},
    "both streams, gaussian": {"schedule": "gaussian"},
    "image only, gaussian": {"schedule": "gaussian", "intrinsics": False},
    "image only, off": {"schedule": "off", "intrinsics": False},
}

UNETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "sample_size": 32,
        "block_out_channels": (64, 128, 192, 192),
        "attention_head_dim": (2, 4, 6, 6),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
    },
    "mid": {
        "sample_size": 32,
        "block_out_channels": (128, 256, 512, 512),
        "attention_head_dim": (2, 4, 8, 8),
        "cross_attention_dim": 512,
        "use_linear_projection": True,
    },
    "full": {
        "sample_size": 96,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAES: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": (32, 32, 32, 32), "sample_size": 256},
    "mid": {"block_out_channels": (48, 96, 192, 192), "layers_per_block": 2, "norm_num_groups": 16, "sample_size": 256},
    "full": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 768},
    "sdxl": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
}


def build(size: str, device: str, dtype: torch.dtype) -> Any:
    """A stock pipeline of the named configuration with random weights, without text encoders."""
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[size])
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(latent_channels=4, **blocks, **VAES[size])
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    for network in (unet, vae):
        network.to_empty(device=device).eval().requires_grad_(False)
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon" if size == "sdxl" else "v_prediction",
    )
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "scheduler": scheduler, "tokenizer": None, "text_encoder": None}
    if size == "sdxl":
        pipeline: Any = StableDiffusionXLPipeline(**parts, tokenizer_2=None, text_encoder_2=None, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_run(pipeline: Any, folder: str) -> None:
    """A rank-32 run folder for this base, untrained."""
    denoiser = JointDenoiser.install(pipeline.unet, rank=RANK)
    weights = denoiser.lora_weights()
    prediction = pipeline.scheduler.config.prediction_type
    save_run(folder, manifest_for(pipeline.unet, "benchmark", prediction, weights), weights, widen(pipeline.vae))
    denoiser.uninstall()


def measure(
    size: str, mode: str, run: str, pixels: int, steps: int, batch: int, device: str, dtype: torch.dtype
) -> dict:
    """Seconds of one call (the best of two after a short warm-up) and the process's peak memory in GiB."""
    pipeline = build(size, device, dtype)
    width = UNETS[size]["cross_attention_dim"]
    generator = torch.Generator().manual_seed(0)
    embeds = [torch.randn(batch, 77, width, generator=generator).to(device, dtype) for _ in range(2)]
    text: dict[str, Any] = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    if size == "sdxl":
        text |= {
            f"{sign}pooled_prompt_embeds": torch.randn(batch, 1280).to(device, dtype) for sign in ("", "negative_")
        }
    options, seeds = MODES[mode], list(range(batch))
    if options is None:

        def call(steps: int) -> Any:
            given = [torch.Generator().manual_seed(seed) for seed in seeds]
            return pipeline(**text, height=pixels, width=pixels, num_inference_steps=steps, generator=given)
    else:
        generate = CoGenerator(pipeline, run)

        def call(steps: int) -> Any:
            return generate(**text, seeds=seeds, size=pixels, steps=steps, **options)

    with torch.no_grad():
        call(1)
        times = []
        for _ in range(1 if steps <= 2 and size != "tiny" else 2):
            _wait(device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = perf_counter()
            call(steps)
            _wait(device)
            times.append(perf_counter() - start)
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {"mode": mode, "seconds": min(times), "peak_gib": peak / 2**30}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def build_and_load(device: str, dtype: torch.dtype) -> dict[str, float]:
    """SDXL: seconds to build it, to write and to load a rank-32 run folder, and peak memory."""
    start = perf_counter()
    pipeline = build("sdxl", device, dtype)
    built = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        make_run(pipeline, folder)
        written = perf_counter()
        generate = CoGenerator(pipeline, folder)
        loaded = perf_counter()
    return {
        "parameters_M": sum(p.numel() for p in pipeline.unet.parameters()) / 1e6,
        "self_attention_layers": float(generate.denoiser.check()),
        "lora_parameters_M": sum(p.numel() for p in generate.denoiser.lora_parameters()) / 1e6,
        "build_s": built - start,
        "write_run_s": written - built,
        "load_run_s": loaded - written,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main(
    size: Annotated[str, typer.Option(help="tiny, full (SD 2.1), or sdxl (builds and loads only).")] = "tiny",
    pixels: Annotated[int, typer.Option(help="Height and width of the image.")] = 256,
    steps: int = 25,
    batch: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    only: Annotated[str, typer.Option(help="A comma-separated part of the rows' names.")] = "",
    one: Annotated[str, typer.Option(hidden=True)] = "",
    run: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Times the sampler beside the stock pipeline."""
    kind = getattr(torch, dtype)
    if size == "sdxl":
        print(json.dumps({name: round(value, 2) for name, value in build_and_load(device, kind).items()}, indent=1))
        return
    if one:
        print(json.dumps(measure(size, one, run, pixels, steps, batch, device, kind)))
        return
    chosen = [mode for mode in MODES if not only or any(part in mode for part in only.split(","))]
    with tempfile.TemporaryDirectory() as folder:
        make_run(build(size, "cpu", torch.float32), folder)
        arguments = [f"--size={size}", f"--pixels={pixels}", f"--steps={steps}", f"--batch={batch}"]
        arguments += [f"--device={device}", f"--dtype={dtype}", f"--run={folder}"]
        rows = [_in_a_process([*arguments, f"--one={mode}"]) for mode in chosen]
    table = Table(title=f"{size}, {pixels} px, {steps} steps, batch {batch}, {device} {dtype}, guidance 7.5")
    for heading in ("sampling", "seconds", "x base", "peak GiB", "x base"):
        table.add_column(heading, justify="left" if heading == "sampling" else "right")
    for row in rows:
        time, memory = (row[name] / rows[0][name] for name in ("seconds", "peak_gib"))
        table.add_row(row["mode"], f"{row['seconds']:.2f}", f"{time:.2f}", f"{row['peak_gib']:.2f}", f"{memory:.2f}")
    Console().print(table)


def _in_a_process(arguments: list[str]) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.sampling", *arguments], stdout=subprocess.PIPE, text=True
    )
    if result.returncode:
        raise SystemExit(result.returncode)
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    typer.run(main)
