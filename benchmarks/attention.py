"""What weighted joint attention costs: our mask-free form against an N x 2N mask, and the whole network's arithmetic.

    python -m benchmarks.attention              4,096 and 9,216 tokens a stream, as in SD 2.1's top level at 512 and 768 px
    python -m benchmarks.attention --small      the same at 256 and 1,024 tokens, in seconds
    python -m benchmarks.attention --flops      FLOPs of SD 2.1 and SDXL at full size, without running them
    python -m benchmarks.attention --gradient   training on the CPU in bfloat16: plain products against the fused kernel

Every case runs in a process of its own, in turn with the others; time is the median of the repeats, memory the peak over
what the inputs take. On a GPU (--device cuda) in bfloat16, on a CPU in float32, unless --dtype says otherwise.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from infer.model import attention
from infer.model.attention import attend, joined, joint_attention
from infer.model.denoiser import JointDenoiser
from infer.model.schedules import Gaussian, Joint, Off, Schedule

WEIGHT = 0.3


def separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two streams that never meet: twice the base's cost, the yardstick."""
    return attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Eq. 4 as it is usually written: log W as a full N x 2N mask of the image's attention."""
    tokens = q.shape[3]
    mask = torch.zeros(tokens, 2 * tokens, dtype=q.dtype, device=q.device)
    mask[:, tokens:] = torch.log(torch.tensor(WEIGHT))
    return torch.stack([attend(q[:, 0], joined(k), joined(v), mask), attend(q[:, 1], joined(k), joined(v))], 1)


CASES: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "two streams apart": separate,
    "w = 0": lambda q, k, v: joint_attention(q, k, v, 0),
    "w = 1": lambda q, k, v: joint_attention(q, k, v, 1),
    "fractional w, merged": lambda q, k, v: joint_attention(q, k, v, WEIGHT),
    "fractional w, merged, with shares": lambda q, k, v: joint_attention(q, k, v, WEIGHT, share=True),
    "fractional w, row bias": lambda q, k, v: joint_attention(q, k, v, WEIGHT, backend="bias"),
    "fractional w, N x 2N mask": masked,
}


def measure(case: str, tokens: int, device: str, dtype: str, repeats: int) -> dict[str, float]:
    """Median seconds and peak MiB of one case: one pair, guidance on, 5 heads of 64 as in SD 2.1's top level."""
    made = {"device": device, "dtype": getattr(torch, dtype)}
    q, k, v = (torch.randn(2, 2, tokens, 5, 64, **made).transpose(2, 3) for _ in range(3))  # (P, 2, H, N, D)
    seconds = []
    with torch.no_grad():
        CASES[case](*(x[..., :64, :] for x in (q, k, v)))  # loads the kernels
        before = reset_peak(device)
        for _ in range(repeats):
            start = time.perf_counter()
            CASES[case](q, k, v)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "mib": (peak(device) - before) / 2**20}


def reset_peak(device: str) -> int:
    """Forget the peak so far; returns the bytes in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is resident now
    return peak(device)


def peak(device: str) -> int:
    """Peak bytes since reset_peak()."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def compare(tokens: list[int], device: str, dtype: str, repeats: int) -> None:
    """Print a table of every case at every size, each in a fresh process."""
    print(f"{device}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}; 2 pairs, 5 heads of 64")
    for count in tokens:
        print(f"\n{count} tokens a stream\n{'':36}{'ms':>10}{'x apart':>10}{'peak MiB':>10}")
        yardstick = 0.0
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.attention", "--case", case, "--tokens", str(count)]
            command += ["--device", device, "--dtype", dtype, "--repeats", str(repeats)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            yardstick = yardstick or found["seconds"]
            ratio = found["seconds"] / yardstick
            print(f"{case:36}{1e3 * found['seconds']:10.1f}{ratio:10.2f}{found['mib']:10.0f}", flush=True)


TRAINED = {  # rows, heads, queries, keys, width of a head
    "embedded base, 8 x 8, to text": (256, 3, 64, 32, 32),
    "embedded base, 8 x 8": (256, 3, 64, 64, 32),
    "the same, joint": (128, 3, 128, 128, 32),
    "embedded base, 4 x 4": (256, 6, 16, 16, 32),
    "16 x 16": (8, 8, 256, 256, 40),
    "32 x 32": (2, 8, 1024, 1024, 40),
    "64 x 64": (1, 8, 4096, 4096, 40),
}


def compare_gradients(repeats: int) -> None:
    """Print milliseconds forward and backward, in bfloat16 on the CPU, by the fused kernel and by plain products, in turn."""
    print(f"cpu, bfloat16, {torch.get_num_threads()} threads\n{'':36}{'fused':>10}{'plain':>10}{'ratio':>10}  ms")
    for name, (rows, heads, queries, keys, width) in TRAINED.items():
        q, k, v = (
            torch.randn(rows, n, heads, width, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for n in (queries, keys, keys)
        )
        gradient = torch.randn(rows, heads, queries, width, dtype=torch.bfloat16)
        seconds: dict[int, list[float]] = {0: [], queries * keys: []}
        for _ in range(repeats + 1):  # the first loads the kernels
            for limit, found in seconds.items():
                attention.PLAIN_LOGITS = limit
                start = time.perf_counter()
                torch.autograd.grad(attend(q, k, v), (q, k, v), gradient)
                found.append(time.perf_counter() - start)
        fused, plain = (1e3 * statistics.median(found[1:]) for found in seconds.values())
        print(f"{name:36}{fused:10.1f}{plain:10.1f}{fused / plain:10.2f}", flush=True)


SD21 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def flops(config: dict, latent: int, schedule: Schedule | None) -> int:
    """FLOPs of one step for one image with guidance: the stock network (None), or both streams with LoRA of rank 32."""
    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
        rows = 2 if schedule is None else 4
        arguments = {
            "sample": torch.empty(rows, 4, latent, latent),
            "encoder_hidden_states": torch.empty(rows, 77, config["cross_attention_dim"]),
            "added_cond_kwargs": {"text_embeds": torch.empty(rows, 1280), "time_ids": torch.empty(rows, 6)},
        }
    if schedule is not None:
        JointDenoiser.install(network, rank=32).prepare(1, schedule)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(timestep=torch.tensor(700.0), **arguments)
    return counter.get_total_flops()


def count_flops() -> None:
    """Print the arithmetic of whole steps against the stock network's."""
    steps = {"base": None, "image apart (w = 0)": Off(), "all layers join (w = 1)": Joint(), "fractional w": Gaussian()}
    for name, config, latent in (("SD 2.1 at 768 px", SD21, 96), ("SDXL at 1024 px", SDXL, 128)):
        print(f"\n{name}, one image with guidance, one step\n{'':28}{'TFLOP':>10}{'x base':>10}")
        base = 0
        for step, schedule in steps.items():
            found = flops(config, latent, schedule)
            base = base or found
            print(f"{step:28}{found / 1e12:10.3f}{found / base:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 9216])
    parser.add_argument("--small", action="store_true", help="256 and 1,024 tokens")
    parser.add_argument("--flops", action="store_true", help="count whole networks' FLOPs instead")
    parser.add_argument("--gradient", action="store_true", help="training on the CPU in bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    dtype = given.dtype or ("bfloat16" if given.device == "cuda" else "float32")
    if given.case:
        print(json.dumps(measure(given.case, given.tokens[0], given.device, dtype, given.repeats)))
    elif given.flops:
        count_flops()
    elif given.gradient:
        compare_gradients(given.repeats)
    else:
        compare([256, 1024] if given.small else given.tokens, given.device, dtype, given.repeats)


if __name__ == "__main__":
    main()
