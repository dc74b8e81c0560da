"""Self-attention of one layer over all streams: what takes the place of diffusers' processor. Installed by denoiser.py."""

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from infer.model.attention import Backend, attend, joint_attention
from infer.model.context import LayerContext
from infer.model.lora import StreamLinear
from shards.core.errors import UserError


class JointProcessor(nn.Module):
    """Self-attention of one layer over all streams; holds the layer's adapters, so they move with the network."""

    def __init__(self, layer: str = "", stage: int = 0, adapters: dict[str, StreamLinear] | None = None):
        """UserError without arguments, which is how diffusers would replace it for an IP-Adapter."""
        if adapters is None:
            raise UserError(
                "load IP-Adapters (pipeline.load_ip_adapter) before joint attention is installed, not after."
            )
        super().__init__()
        self.layer, self.stage, self.context = layer, stage, None
        self.adapters = nn.ModuleDict(adapters)

    context: LayerContext | None
    """Set around each forward by a ForwardContext; None outside of one."""

    def project(self, target: str, base: nn.Module, x: Tensor, context: LayerContext) -> Tensor:
        """One of the layer's linear maps: base on every row, and the adapter on the intrinsics'."""
        y = base(x)
        return y if context.streams == 1 or target not in self.adapters else self.adapters[target](y, x, context.images)

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(rows, N, C) or (rows, C, h, w) -> the same shape. As the stock processor, but for joint_attention."""
        context = self.context
        if context is None:
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

        q = self.heads(self.project("q", attn.to_q, hidden_states, context), attn.heads, attn.norm_q)
        k = self.heads(self.project("k", attn.to_k, hidden_states, context), attn.heads, attn.norm_k)
        v = self.heads(self.project("v", attn.to_v, hidden_states, context), attn.heads, None)
        out = attend(q, k, v).transpose(1, 2).flatten(2) if context.streams == 1 else self.joint(q, k, v, context)
        out = attn.to_out[1](self.project("out", attn.to_out[0], out.to(q.dtype), context))

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
    def joint(q: Tensor, k: Tensor, v: Tensor, context: LayerContext) -> Tensor:
        """Rows to pairs, attention, and back. q, k, v: (G*S*B, H, N, D) -> (G*S*B, N, C)."""

        def pairs(x: Tensor) -> Tensor:  # laid out as (P, S, N, H, D), so that joining the streams' tokens is a view
            x = x.transpose(1, 2).unflatten(0, (-1, context.streams, context.images))
            return x.transpose(1, 2).flatten(0, 1).transpose(2, 3)

        # the differentiable form wherever a gradient may be asked for: the merged one has none
        backend: Backend = "bias" if torch.is_grad_enabled() else "merge"
        out, share = joint_attention(
            pairs(q), pairs(k), pairs(v), context.weight, backend=backend, share=context.record is not None
        )
        if share is not None:
            context.share = share.mean(1) if context.record == "map" else share.mean((1, 2))
        return out.transpose(2, 3).flatten(3).unflatten(0, (-1, context.images)).transpose(1, 2).flatten(0, 2)


def self_attention_layers(network: nn.Module) -> dict[str, Attention]:
    """Every self-attention layer of the network by name, in the order of its modules."""
    found = {n: m for n, m in network.named_modules() if isinstance(m, Attention) and not m.is_cross_attention}
    if not found:
        raise UserError(f"{type(network).__name__} has no self-attention layers that joint attention knows.")
    return found
