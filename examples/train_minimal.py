"""Stage 2 of the method on one page: the LoRA of the intrinsic stream (paper, eq. 5), loop in sight.

    python examples/train_minimal.py data/demo runs/minimal --steps 200

What `python -m train lora` adds: exact resume, several GPUs, held-out losses, caches, aspect buckets, every kind of base.
"""

import argparse

import torch
from diffusers import StableDiffusionPipeline
from torch.nn.functional import mse_loss

from infer.embedded import resolve
from infer.model.denoiser import JointDenoiser
from infer.model.vae import encode
from infer.run_folder import load_run, manifest_for, save_run
from shards.geometry import square
from shards.packing import pack
from shards.stream import Stream

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("shards", help="a dataset, as python -m extract writes it")
parser.add_argument("out", help="the run folder to write")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--rate", type=float, default=2e-3)
args = parser.parse_args()
torch.manual_seed(0)

# The base with its text encoder, and the intrinsic VAE of stage 1: all frozen
base = resolve("demo", "base")  # a diffusers folder
pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
intrinsic_vae = load_run(resolve("demo", "run")).vae
for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder, intrinsic_vae):
    network.requires_grad_(False).eval()

# Untrained adapters on the self-attention; they act on the intrinsic rows of the batch only
denoiser = JointDenoiser.install(pipeline.unet, rank=16, dtype=torch.float32)
denoiser.freeze()
weights = denoiser.lora_weights()
optimiser = torch.optim.AdamW(weights.tensors.values(), lr=args.rate)

stream = Stream([args.shards], seed=0)  # endless and shuffled; position n is always the same sample
size_px = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
kept = pipeline.scheduler.alphas_cumprod  # (T,): the signal's share of the variance at each timestep

for step in range(args.steps):
    # Images (B, 3, S, S) and their packed intrinsics (B, 8, S, S), both in [-1, 1]
    items = stream.__getitems__(range(step * args.batch, (step + 1) * args.batch))
    geometries = [square(*item.image.shape[:2], size_px) for item in items]
    images = torch.stack([torch.from_numpy(g.image(i.image).copy()) for g, i in zip(geometries, items, strict=True)])
    images = images.permute(0, 3, 1, 2) / 127.5 - 1
    packed = torch.stack([torch.from_numpy(pack(g.maps(i.maps))[0]) for g, i in zip(geometries, items, strict=True)])

    # Clean latents of both streams (2B, 4, h, w), noised at one timestep with independent noises
    with torch.no_grad():
        clean = torch.cat([encode(pipeline.vae, images), encode(intrinsic_vae, packed)])
        tokens = pipeline.tokenizer([item.caption for item in items], padding="max_length", truncation=True)
        text = pipeline.text_encoder(torch.tensor(tokens["input_ids"]))[0]
    t = torch.randint(len(kept), (args.batch,)).repeat(2)
    signal, sigma = (level[t, None, None, None] for level in (kept.sqrt(), (1 - kept).sqrt()))
    noise = torch.randn_like(clean)
    noisy, target = signal * clean + sigma * noise, signal * noise - sigma * clean  # v prediction

    # Both streams through the network, joint attention at w = 1; the image's term trains the LoRA, too
    denoiser.prepare(args.batch)
    predicted = pipeline.unet(noisy, t, text.repeat(2, 1, 1), return_dict=False)[0]
    image_loss, intrinsic_loss = (mse_loss(p, v) for p, v in zip(predicted.chunk(2), target.chunk(2), strict=True))
    optimiser.zero_grad()
    (image_loss + intrinsic_loss).backward()
    optimiser.step()
    if step % 10 == 0 or step + 1 == args.steps:
        print(f"step {step}: image {image_loss:.3f}, intrinsics {intrinsic_loss:.3f}")

# A run folder: `python -m infer sample --run OUT` and stock diffusers load it
learned = denoiser.lora_weights()
denoiser.uninstall()
manifest = manifest_for(pipeline.unet, base, "v_prediction", learned, training={"example": "train_minimal"})
save_run(args.out, manifest, learned, intrinsic_vae)
