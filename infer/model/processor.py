"""Self-attention of one layer over all streams: what takes the place of diffusers' processor. Installed by denoiser.py."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from infer.model.attention import Backend, attend, joint_attention
from infer.model.lora import StreamLinear
from shards.core.errors import UserError

Record = Literal["mean", "map"]


@dataclass
class Part:
    """What one layer must know during one forward of the network, and what it says back."""

    images: int  # B
    streams: int  # S, or 1 when only the image's rows are run
    weight: float | Tensor  # the int 0 or 1, or a tensor () or (P,) for anything else
    record: Record | None = None
    share: Tensor | None = None  # float32 (P,), or (P, N) for a map


class JointProcessor(nn.Module):
    """Self-attention of one layer over all streams; holds the layer's adapters, so they move with the network."""

    def __init__(self, layer: str = "", stage: int = 0, adapters: dict[str, StreamLinear] | None = None):
        """UserError without arguments, which is how diffusers would replace it for an IP-Adapter."""
        if adapters is None:
            raise UserError(
                "load IP-Adapters (pipeline.load_ip_adapter) before joint attention is installed, not after."
            )
        super().__init__()
        self.layer, self.stage, self.part = layer, stage, None
        self.adapters = nn.ModuleDict(adapters)

    part: Part | None  # set around each forward by a Step; None outside of one

    def project(self, target: str, base: nn.Module, x: Tensor, part: Part) -> Tensor:
        """One of the layer's linear maps: base on every row, and the adapter on the intrinsics'."""
        y = base(x)
        return y if part.streams == 1 or target not in self.adapters else self.adapters[target](y, x, part.images)

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(rows, N, C) or (rows, C, h, w) -> the same shape. As the stock processor, but for joint_attention."""
        part = self.part
        if part is None:
            raise UserError(
                f"joint attention in {self.layer} ran outside of the joint network's forward, whose wrapper is gone: "
                "uninstall it and install it again."
            )
        if encoder_hidden_states is not None or attention_mask is not None:
            raise UserError(
                f"joint attention in {self.layer} takes no attention mask and no encoder states: leave them out."
            )
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        q = self.heads(self.project("q", attn.to_q, hidden_states, part), attn.heads, attn.norm_q)
        k = self.heads(self.project("k", attn.to_k, hidden_states, part), attn.heads, attn.norm_k)
        v = self.heads(self.project("v", attn.to_v, hidden_states, part), attn.heads, None)
        out = attend(q, k, v).transpose(1, 2).flatten(2) if part.streams == 1 else self.joint(q, k, v, part)
        out = attn.to_out[1](self.project("out", attn.to_out[0], out.to(q.dtype), part))

        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor

    @staticmethod
    def heads(x: Tensor, heads: int, norm: nn.Module | None) -> Tensor:
        """(rows, N, C) -> (rows, H, N, D), normalised where the network does so."""
        x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        return x if norm is None else norm(x)

    @staticmethod
    def joint(q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
        """Rows to pairs, attention, and back. q, k, v: (G*S*B, H, N, D) -> (G*S*B, N, C)."""

        def pairs(x: Tensor) -> Tensor:  # laid out as (P, S, N, H, D), so that joining the streams' tokens is a view
            x = x.transpose(1, 2).unflatten(0, (-1, part.streams, part.images))
            return x.transpose(1, 2).flatten(0, 1).transpose(2, 3)

        # the differentiable form wherever a gradient may be asked for: the merged one has none
        backend: Backend = "bias" if torch.is_grad_enabled() else "merge"
        out, share = joint_attention(
            pairs(q), pairs(k), pairs(v), part.weight, backend=backend, share=part.record is not None
        )
        if share is not None:
            part.share = share.mean(1) if part.record == "map" else share.mean((1, 2))
        return out.transpose(2, 3).flatten(3).unflatten(0, (-1, part.images)).transpose(1, 2).flatten(0, 2)


class Holder:
    """Where the current step is left for what runs inside the network; None outside a joint forward."""

    step: "Step | None" = None

    def layout(self) -> tuple[int, int] | None:
        """(G, S) while all streams are in the batch, else None."""
        step = self.step
        return (step.guidance, step.streams) if step is not None and step.streams > 1 else None


@dataclass
class Step:
    """One forward of the network: a part for every layer. `with step:` hands them out, and puts back what was before."""

    holder: Holder
    guidance: int  # G
    streams: int  # S, or 1
    images: int  # B
    parts: list[tuple[JointProcessor, Part]]
    before: "list[Step | None]" = field(default_factory=list)

    @torch.compiler.disable
    def __enter__(self) -> None:
        self.before.append(self.holder.step)
        self.holder.step = self
        for processor, part in self.parts:
            processor.part = part

    @torch.compiler.disable
    def __exit__(self, *_: object) -> None:
        before = self.holder.step = self.before.pop()
        for processor, _part in self.parts:
            processor.part = None
        for processor, part in before.parts if before is not None else ():
            processor.part = part


class Recall:
    """An activation-checkpoint function whose blocks run again, in backward, with the step of their own forward."""

    def __init__(self, original: Callable[..., Any], holder: Holder):
        self.original, self.holder = original, holder

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        assert self.holder.step is not None
        return self.original(_Remembered(block, self.holder.step), *args)


class _Remembered:
    def __init__(self, block: Callable[..., Any], step: Step):
        self.block, self.step = block, step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.step.holder.step is self.step:
            return self.block(*args, **kwargs)
        with self.step:
            return self.block(*args, **kwargs)


def self_attention_layers(network: nn.Module) -> dict[str, Attention]:
    """Every self-attention layer of the network by name, in the order of its modules."""
    found = {n: m for n, m in network.named_modules() if isinstance(m, Attention) and not m.is_cross_attention}
    if not found:
        raise UserError(f"{type(network).__name__} has no self-attention layers that joint attention knows.")
    return found
