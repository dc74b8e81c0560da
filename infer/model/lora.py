"""LoRA that acts on one stream only: ours on the intrinsics, other people's on the image.

StreamLinear is the method's adapter: y = W x for all streams, plus (alpha / r) B A x on the intrinsics' rows. Where there are
several intrinsic streams (the ablation without the shared VAE), each has weights of its own: equal parts of one A and B, so
that a file is the same stock LoRA in either case. It holds A and B only and is handed what the base layer gave, so the base
network's modules, names and weights stay what they are, and stock `load_lora_weights` finds the layers that it looks for,
before or after ours is installed.

confine() does the opposite for an adapter layer that peft has put into the network: the image's rows go through it, the
intrinsics' rows through the base layer below it.

Rows of a network batch are (G, S, B): G guidance halves, S streams (0 image, the others intrinsics), B images.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shards.core.errors import UserError

RANK = 32
TARGETS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}  # our name -> module inside a self-attention layer
METADATA_KEY = "lora_adapter_metadata"  # where diffusers looks for rank and alpha inside the file


class StreamLinear(nn.Module):
    """y = base(x), plus (alpha / rank) B A x on the intrinsic rows. B starts at 0: untrained, it changes nothing.

    Of S streams, intrinsic stream k = 1..S-1 uses the k-th of S - 1 equal parts of A's rows and of B's columns, and no other.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int = RANK,
        alpha: float | None = None,
        dtype: torch.dtype | None = None,
        streams: int = 2,
    ):
        """Takes sizes, device and (unless given) dtype from `base`, and does not keep it.

        rank: of all intrinsic streams together. alpha: rank unless given. streams: S.
        """
        super().__init__()
        if rank % (streams - 1):
            raise UserError(f"a LoRA of rank {rank} cannot be shared out evenly among {streams - 1} intrinsic streams.")
        self.streams = streams
        made: dict[str, Any] = {"device": base.weight.device, "dtype": dtype or base.weight.dtype}
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.down = nn.Parameter(torch.empty(rank, base.in_features, **made))  # A
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, **made))  # B
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, y: Tensor, x: Tensor, images: int) -> Tensor:
        """y = base(x), (G*S*B, N, C_out), of x, (G*S*B, N, C_in), with B = images. Adds to y in place, and returns it."""
        others = self.streams - 1
        parts = zip(self.down.chunk(others), self.up.chunk(others, dim=1), strict=True)
        for stream, (down, up) in enumerate(parts, 1):
            own = x.unflatten(0, (-1, self.streams, images))[:, stream].to(down.dtype)
            delta = (own @ down.mT) @ up.mT * (self.alpha / self.rank)
            y.unflatten(0, (-1, self.streams, images))[:, stream] += delta.to(y.dtype)
        return y


def confine(layer: BaseTunerLayer, layout: Callable[[], tuple[int, int] | None]) -> None:
    """Make a peft layer act on the image's rows only. layout(): (G, S) while a batch holds all streams, else None.

    A layer may see several rows for each of the batch's, one after the other (PixArt embeds a picture's height and width
    so): (G, S, B * m).

    The layer's own forward is shadowed on this instance, so peft's switches (strengths, enabling, unloading) keep working
    and unloading the adapter leaves nothing behind. Harmless when repeated.
    """
    if "_ildm_forward" in layer.__dict__:
        return
    confined = _Confined(layer, layout)
    layer.__dict__["_ildm_forward"] = confined.original
    layer.__dict__["forward"] = confined


class _Confined:
    """The forward of a confined layer: an object, so that a copy of the layer has one with the copy's weights."""

    def __init__(self, layer: BaseTunerLayer, layout: Callable[[], tuple[int, int] | None]) -> None:
        self.layer, self.layout = layer, layout
        self.original: Callable[..., Tensor] = layer.forward  # type: ignore[attr-defined]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = self.layout()
        if rows is None:
            return self.original(x, *args, **kwargs)
        groups, streams = rows
        image, intrinsics = x.unflatten(0, (groups, streams, -1)).split((1, streams - 1), dim=1)
        adapted = self.original(image.flatten(0, 2), *args, **kwargs).unflatten(0, (groups, 1, -1))
        plain = self.layer.get_base_layer()(intrinsics.flatten(0, 2)).unflatten(0, (groups, streams - 1, -1))
        return torch.cat([adapted, plain], 1).flatten(0, 2)


def release(layer: BaseTunerLayer) -> None:
    """Undo confine(); harmless when there is nothing to undo."""
    if layer.__dict__.pop("_ildm_forward", None) is not None:
        layer.__dict__.pop("forward", None)


def adapter_layers(network: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers that peft has put into the network, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


@dataclass(frozen=True)
class LoraWeights:
    """What a lora.safetensors holds: tensors by peft key without prefix ("....attn1.to_q.lora_A.weight"), rank, alpha."""

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float

    @property
    def targets(self) -> tuple[str, ...]:
        """Which of q, k, v, out the file adapts, in this order."""
        return tuple(name for name, path in TARGETS.items() if any(f".{path}.lora_A." in key for key in self.tensors))


def save_lora(path: str | Path, weights: LoraWeights, prefix: str) -> None:
    """Write a file that stock diffusers and peft load. prefix: "unet" or "transformer". Other files are left alone."""
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in weights.tensors})
    described = {"r": weights.rank, "lora_alpha": weights.alpha, "target_modules": modules, "bias": "none"}
    about = json.dumps({f"{prefix}.{k}": v for k, v in described.items()}, sort_keys=True)
    metadata = {METADATA_KEY: about}  # of several entries the order differs from run to run, and so would the file
    tensors = {f"{prefix}.{key}": tensor.detach().cpu().contiguous() for key, tensor in weights.tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata)


def read_lora(path: str | Path) -> LoraWeights:
    """Read such a file (safetensors only: no code is run). UserError if it is not a LoRA of one rank."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} could not be read as a LoRA ({error}): give a lora.safetensors that training wrote."
        ) from error
    plain = {key.removeprefix("unet.").removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    ranks = {tensor.shape[0] for key, tensor in plain.items() if key.endswith(".lora_A.weight")}
    if len(ranks) != 1 or any(not key.endswith((".lora_A.weight", ".lora_B.weight")) for key in plain):
        raise UserError(
            f"{path} is not a LoRA of one rank with lora_A and lora_B weights: give one that training wrote."
        )
    rank = ranks.pop()
    alphas = [float(value) for key, value in metadata.items() if key.split(".")[-1] == "lora_alpha"]
    return LoraWeights(plain, rank, alphas[0] if alphas else float(rank))
