"""Sampling of the method on one page: an image and its four intrinsics, denoised together (paper, sec. 3.3), loop in sight.

    python examples/sample_minimal.py "a red sphere left of a blue cube" --seed 0 --out samples/minimal.png

What `python -m infer sample` adds: every kind of base, samplers, given images and maps, many prompts, files of each map.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from infer.embedded import resolve, usual_guidance
from infer.model.denoiser import JointDenoiser
from infer.model.schedules import Gaussian
from infer.model.vae import decode
from infer.run_folder import load_run
from shards.inspect.display import sheet
from shards.packing import unpack

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt")
parser.add_argument("--run", default=resolve("demo", "run"))
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--out", type=Path, default=Path("samples/minimal.png"))
args = parser.parse_args()

# The stock base, and the run that was trained for it
pipeline = StableDiffusionPipeline.from_pretrained(resolve("demo", "base"), torch_dtype=torch.float32)
run = load_run(args.run)
denoiser = JointDenoiser.install(pipeline.unet, lora=run.lora)
scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
scheduler.set_timesteps(args.steps)
guidance = usual_guidance("demo")

with torch.no_grad():
    # The prompt and the empty prompt, for classifier-free guidance: (2, tokens, width)
    tokens = pipeline.tokenizer(["", args.prompt], padding="max_length", truncation=True)
    text = pipeline.text_encoder(torch.tensor(tokens["input_ids"]))[0]

    # One noise for both streams; rows: image, intrinsics
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    noise = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(args.seed))
    latents = torch.cat([noise, noise])

    # w(l, t) of the schedule is looked up for each block and timestep inside the network
    denoiser.prepare(1, Gaussian())
    for t in scheduler.timesteps:
        rows = torch.cat([latents, latents])  # (guidance, stream): without text, with text
        predicted = pipeline.unet(rows, t, text.repeat_interleave(2, dim=0), return_dict=False)[0]
        without, with_text = predicted.chunk(2)
        latents = scheduler.step(without + guidance * (with_text - without), t, latents, return_dict=False)[0]

    # The image by the base's VAE, the four maps by the intrinsic VAE
    pixels = decode(pipeline.vae, latents[:1])[0]
    packed = decode(run.vae, latents[1:])[0]

image = ((pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
args.out.parent.mkdir(parents=True, exist_ok=True)
sheet([(image, unpack(packed.numpy()), args.prompt)]).save(args.out)
print(args.out)
