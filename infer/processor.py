"""Self-attention of one layer over both streams: what takes the place of diffusers' processor. Installed by denoiser.py."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from infer.attention import Backend, attend, joint_attention
from infer.lora import StreamLinear
from shards.errors import UserError

Record = Literal["mean", "map"]


@dataclass
class Step:
    """What the processors must know during one forward of the network."""

    images: int  # B
    streams: int  # 2, or 1 when only the image's rows are run
    weights: tuple[float | None, ...]  # by stage - 1: 0.0 or 1.0, or None: the value is in `mixed`
    mixed: Tensor  # (stages,) or (stages, P) float32 on the network's device
    record: Record | None = None
    shares: dict[str, Tensor] = field(default_factory=dict)  # layer -> (P,) or (P, N)


class Holder:
    """Where the wrapper leaves the current step for the processors; None outside a joint forward."""

    step: Step | None = None

    def images(self) -> int | None:
        """B while both streams are in the batch, else None."""
        return self.step.images if self.step is not None and self.step.streams == 2 else None


class JointProcessor(nn.Module):
    """Self-attention of one layer over both streams; holds the layer's adapters, so they move with the network."""

    def __init__(self, layer: str, stage: int, holder: Holder, adapters: dict[str, StreamLinear]):
        super().__init__()
        self.layer, self.stage, self.holder = layer, stage, holder
        self.adapters = nn.ModuleDict(adapters)

    def project(self, target: str, base: nn.Module, x: Tensor, step: Step) -> Tensor:
        """One of the layer's linear maps: base on every row, and the adapter on the intrinsics'."""
        if step.streams == 1 or target not in self.adapters:
            return base(x)
        return self.adapters[target](base, x, step.images)

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(rows, N, C) or (rows, C, h, w) -> the same shape. As the stock processor, but for joint_attention."""
        step = self.holder.step
        if step is None:
            raise UserError(
                f"joint attention in {self.layer} ran outside of the joint network's forward, whose wrapper is gone: "
                "call uninstall() and install it again."
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

        projections = (("q", attn.to_q, attn.norm_q), ("k", attn.to_k, attn.norm_k), ("v", attn.to_v, None))
        q, k, v = (
            self.heads(self.project(target, base, hidden_states, step), attn.heads, norm)
            for target, base, norm in projections
        )
        out = attend(q, k, v).transpose(1, 2).flatten(2) if step.streams == 1 else self.joint(q, k, v, step)

        out = attn.to_out[1](self.project("out", attn.to_out[0], out.to(q.dtype), step))
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

    def joint(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Rows to pairs, attention, and back. q, k, v: (G*2*B, H, N, D) -> (G*2*B, N, C)."""
        # laid out as (P, 2, N, H, D), so that joining the streams' tokens is a view
        q, k, v = (
            x.transpose(1, 2).unflatten(0, (-1, 2, step.images)).transpose(1, 2).flatten(0, 1).transpose(2, 3)
            for x in (q, k, v)
        )
        known = step.weights[self.stage - 1]
        weight = step.mixed[self.stage - 1] if known is None else known
        # the differentiable form wherever a gradient may be asked for: the merged one has none
        backend: Backend = "bias" if torch.is_grad_enabled() else "merge"
        out, share = joint_attention(q, k, v, weight, backend=backend, share=step.record is not None)
        if share is not None:
            step.shares[self.layer] = share.mean(1) if step.record == "map" else share.mean((1, 2))
        return out.transpose(2, 3).flatten(3).unflatten(0, (-1, step.images)).transpose(1, 2).flatten(0, 2)


class Recall:
    """A checkpoint function that runs its block with the step at hand when it was called, whenever it is run again."""

    def __init__(self, original: Callable[..., Any], holder: Holder):
        self.original, self.holder = original, holder

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        step, holder = self.holder.step, self.holder

        class Block:  # diffusers calls block.__call__, as of a module
            def __call__(self, *inner: Any, **kwargs: Any) -> Any:
                before, holder.step = holder.step, step
                try:
                    return block(*inner, **kwargs)
                finally:
                    holder.step = before

        return self.original(Block(), *args)


def self_attention_layers(network: nn.Module) -> dict[str, Attention]:
    """Every self-attention layer of the network by name, in the order of its modules."""
    found = {n: m for n, m in network.named_modules() if isinstance(m, Attention) and not m.is_cross_attention}
    if not found:
        raise UserError(f"{type(network).__name__} has no self-attention layers that joint attention knows.")
    return found
