"""Eqs. 1 and 4 in float64, written out with a full weight matrix, SN x SN: what the product is compared with."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
    """q, k, v: (P, S, H, N, D); weight a number or (P,). Returns (P, S, H, N, D) and the image's share (P, H, N), float64."""
    pairs, streams, tokens = q.shape[0], q.shape[1], q.shape[3]
    q, k, v = (torch.cat(x.double().unbind(1), -2) for x in (q, k, v))  # (P, H, SN, D)
    matrix = torch.ones(pairs, 1, streams * tokens, streams * tokens, dtype=torch.float64)
    matrix[:, :, :tokens, tokens:] = torch.as_tensor(weight, dtype=torch.float64).reshape(-1, 1, 1, 1)
    logits = q @ k.mT / q.shape[-1] ** 0.5
    mass = torch.softmax(logits + matrix.log(), -1)
    return torch.stack((mass @ v).chunk(streams, -2), 1), mass[:, :, :tokens, tokens:].sum(-1)


class Processor:
    """A diffusers processor that computes one layer by the oracle. Rows are (G, S, B); for networks in float64."""

    def __init__(
        self, layer: str, images: int, weight: float | Tensor, lora: dict[str, Tensor], scale: float, streams: int = 2
    ):
        self.layer, self.images, self.weight, self.lora, self.scale = layer, images, weight, lora, scale
        self.streams = streams

    def project(self, base: Any, path: str, x: Tensor) -> Tensor:
        y = base(x)
        key = f"{self.layer}.{path}"
        if f"{key}.lora_A.weight" in self.lora:
            down, up = (self.lora[f"{key}.lora_{half}.weight"].double() for half in "AB")
            stream = torch.arange(len(x)) // self.images % self.streams  # of each row
            part = torch.arange(len(down)) * (self.streams - 1) // len(down) + 1  # the stream that each rank is for
            own = (stream[:, None] == part).double()[:, None]
            y = y + self.scale * ((x @ down.mT * own) @ up.mT)
        return y

    def __call__(self, attn: Attention, hidden_states: Tensor, **_: Any) -> Tensor:
        rows, tokens, _width = hidden_states.shape
        q, k, v = (
            self.project(base, path, hidden_states).reshape(
                -1, self.streams, self.images, tokens, attn.heads, _width // attn.heads
            )
            for base, path in ((attn.to_q, "to_q"), (attn.to_k, "to_k"), (attn.to_v, "to_v"))
        )  # (G, S, B, N, H, D)
        q, k, v = (x.permute(0, 2, 1, 4, 3, 5).flatten(0, 1) for x in (q, k, v))  # (P, S, H, N, D)
        out, self.share = attention(q, k, v, self.weight)
        out = out.unflatten(0, (-1, self.images)).permute(0, 2, 1, 4, 3, 5).reshape(rows, tokens, -1)
        return self.project(attn.to_out[0], "to_out.0", out)
