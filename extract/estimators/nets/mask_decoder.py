"""SAM's mask decoder for a whole grid of points: the published weights, the same function, less than half the work.

The decoder attends between a few tokens (n = 7 or 8 a prompt) and the T = 64 x 64 positions of the image. Written for one
prompt, it projects all positions for every prompt anew. For many prompts on one image the same sums can be ordered so
that positions are never projected:

    scores   q (X Wk)^T = (q Wk^T) X^T              the tokens move into the space of the positions, not the reverse
    values   A (X Wv) = (A X) Wv                    rows of A sum to one, so biases come out unchanged
    updates  (A V) Wo = A (V Wo)                    for the way back, from tokens to positions
    layer 1  X is still that of the image alone     its projections are made once an image, not once a prompt
    last     only four tokens are asked             the others need not look at the positions once more

Masks are drawn only for prompts of which some mask may survive; the rest of a chunk ends at its predicted quality.

Shapes: B images, P prompts each, n tokens, T positions, C channels, h heads, d channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ImageFeatures:
    """What the encoder says of B images, ready for any number of prompts.

    positions (B, T, C). half and quarter: what the mask head adds at 2 and 4 times the resolution, its biases and the
    encoder's finer features: (B, T * 4, C / 4) and (B, T * 16, C / 8) in the head's own order; (1, 1, ...) in SAM 1, which
    has no finer features.
    """

    positions: Tensor
    half: Tensor
    quarter: Tensor

    def __len__(self) -> int:
        return len(self.positions)


class GridDecoder:
    """The decoder of a Sam2Model, SamModel or EdgeTamModel of transformers, whose weights it shares."""

    def __init__(self, model: Any) -> None:
        self.prompt_encoder: Any = model.prompt_encoder
        self.decoder: Any = model.mask_decoder
        self.dtype = self.decoder.iou_token.weight.dtype
        with torch.no_grad():
            where: Tensor = model.get_image_wide_positional_embeddings()
            dense: Tensor = self.prompt_encoder.no_mask_embed.weight
        self.side = where.shape[-1]
        self.place = where.flatten(2).transpose(1, 2).to(self.dtype)  # (1, T, C)
        self.no_mask = dense.to(self.dtype)  # (1, C)
        own = [self.decoder.iou_token.weight, self.decoder.mask_tokens.weight]
        if hasattr(self.decoder, "obj_score_token"):
            own.insert(0, self.decoder.obj_score_token.weight)
        self.own_tokens = torch.cat(own).detach()
        quality = len(own) - 2  # that token; those of the masks come after it, the first is for unambiguous prompts
        self.asked = torch.tensor([quality, *range(quality + 2, len(self.own_tokens))], device=self.own_tokens.device)
        self.upscales_with_features = hasattr(self.decoder, "conv_s0")

    @property
    def mask_side(self) -> int:
        """Rows and columns of a mask's logits."""
        return 4 * self.side

    def features(self, maps: Sequence[Tensor]) -> ImageFeatures:
        """maps: the encoder's (B, C, 64, 64) last; before it (B, C / 8, 256, 256) and (B, C / 4, 128, 128), or nothing."""
        positions = maps[-1].to(self.dtype).flatten(2).transpose(1, 2) + self.no_mask
        fine = [layer.bias.view(1, 1, -1) for layer in (self.decoder.upscale_conv1, self.decoder.upscale_conv2)]
        if len(maps) > 1:
            fine = [
                self._to_blocks(m.to(self.dtype), halvings) + bias
                for m, halvings, bias in zip((maps[1], maps[0]), (1, 2), fine, strict=True)
            ]
        return ImageFeatures(positions, fine[0], fine[1])

    def _to_blocks(self, maps: Tensor, halvings: int) -> Tensor:
        """(B, c, H, W) -> (B, H * W, c), positions of the coarse grid first, then the 2 x 2 blocks within, recursively."""
        batch, channels = maps.shape[:2]
        side = self.side
        x = maps.view(batch, channels, side, *[2] * halvings, side, *[2] * halvings)
        rows, columns = range(3, 3 + halvings), range(4 + halvings, 4 + 2 * halvings)
        inner = [axis for pair in zip(rows, columns, strict=True) for axis in pair]
        return x.permute(0, 2, 3 + halvings, *inner, 1).reshape(batch, -1, channels)

    def tokens(self, points: Tensor) -> Tensor:
        """(B, P, 2) float32, x and y in the encoder's pixels -> (B, P, n, C): the decoder's own tokens, then the prompt's."""
        labels = torch.ones(*points.shape[:2], 1, dtype=torch.int, device=points.device)
        prompts, _ = self.prompt_encoder(points[:, :, None], labels, None, None)
        own = self.own_tokens.expand(*points.shape[:2], -1, -1)
        return torch.cat([own, prompts.to(self.dtype)], dim=2)

    def decode(self, image: ImageFeatures, tokens: Tensor, minimum: float) -> tuple[Tensor, Tensor, Tensor]:
        """Masks of the prompts (B, P, n, C) of which some mask has a predicted quality above `minimum`.

        Returns their indices (N,) into the B * P prompts, the predicted quality float32 (N, 3), and logits (N, 3, S, S)
        in the decoder's dtype, S = mask_side. The single mask for unambiguous prompts is not made.
        """
        prompts = tokens.shape[1]
        queries, x = self._two_way(image.positions, tokens)
        quality = self.decoder.iou_prediction_head(queries[:, 0]).float()[:, 1:]
        chosen = torch.nonzero((quality > minimum).any(1)).flatten()
        if len(chosen) < len(x):
            x, queries = x[chosen], queries[chosen]
        return chosen, quality[chosen], self._draw(x, queries[:, 1:], image, chosen // prompts)

    def _two_way(self, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C) and (B, P, n, C) -> tokens and positions (B * P, T, C) that have seen each other.

        Of the tokens those that are asked: (B * P, 4, C), for quality and the three masks.
        """
        transformer, place = self.decoder.transformer, self.place
        origin = tokens.flatten(0, 1)
        queries, x = origin, positions
        for number, layer in enumerate(transformer.layers):
            shared = number == 0
            placed = x + place
            queries = layer.layer_norm1(_self_attention(layer, queries, origin))
            look = _shared_look if shared else _look
            queries = layer.layer_norm2(queries + look(layer.cross_attn_token_to_image, queries + origin, x, placed))
            queries = layer.layer_norm3(queries + layer.mlp(queries))
            tell = _shared_tell if shared else _tell
            x = layer.layer_norm4(tell(layer.cross_attn_image_to_token, queries + origin, queries, x, placed))
        queries, origin = queries[:, self.asked], origin[:, self.asked]
        queries = queries + _look(transformer.final_attn_token_to_image, queries + origin, x, x + place)
        return transformer.layer_norm_final_attn(queries), x

    def _draw(self, x: Tensor, queries: Tensor, image: ImageFeatures, owner: Tensor) -> Tensor:
        """Logits (N, 3, S, S) from positions (N, T, C) and the masks' tokens (N, 3, C); owner (N,): each prompt's image.

        The transposed convolutions have stride = kernel = 2: each position makes its own 2 x 2 block, a plain product.
        """
        head, count = self.decoder, len(x)
        half, quarter = (f if len(f) == 1 else f[owner] for f in (image.half, image.quarter))
        norm = head.upscale_layer_norm
        y = _to_2x2(head.upscale_conv1, x).add_(half)
        y = F.gelu(F.layer_norm(y, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
        y = F.gelu(_to_2x2(head.upscale_conv2, y).add_(quarter))  # (N, T * 16, C / 8)
        mlps = list(head.output_hypernetworks_mlps)[1:]
        weights = torch.stack([mlp(queries[:, i]) for i, mlp in enumerate(mlps)], dim=1)  # (N, 3, C / 8)
        logits = torch.bmm(weights, y.transpose(1, 2)).view(count, len(mlps), self.side, self.side, 2, 2, 2, 2)
        return logits.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(count, len(mlps), self.mask_side, self.mask_side)


def _to_2x2(convolution: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """(N, T, C) -> (N, T * 4, c): the 2 x 2 block of every position, row by row, without the bias."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 * 2 * c, C)
    return F.linear(x, weight).view(len(x), x.shape[1] * 4, convolution.out_channels)


def _out(attention: Any) -> nn.Linear:
    return attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj  # the latter in SAM 1


def _heads(x: Tensor, heads: int) -> Tensor:
    """(N, m, h * d) -> (N, h, m, d)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _self_attention(layer: Any, queries: Tensor, origin: Tensor) -> Tensor:
    """The tokens (N, n, C) among themselves; the first layer knows neither the origin nor a residual."""
    a = layer.self_attn
    source = queries if layer.skip_first_layer_pe else queries + origin
    q, k, v = (
        _heads(p(s), a.num_attention_heads) for p, s in ((a.q_proj, source), (a.k_proj, source), (a.v_proj, queries))
    )
    mixed = _out(a)(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return mixed if layer.skip_first_layer_pe else queries + mixed


def _look(a: Any, queries: Tensor, x: Tensor, placed: Tensor) -> Tensor:
    """Tokens (N, n, C) attend to positions x (N, T, C), placed = x with its place added; returns (N, n, C)."""
    heads = a.num_attention_heads
    q = _heads(a.q_proj(queries), heads)  # (N, h, n, d)
    wk, wv = (p.weight.unflatten(0, (heads, -1)) for p in (a.k_proj, a.v_proj))  # (h, d, C)
    # The key's bias adds the same to all scores of a row, which the softmax takes out again.
    reach = (q @ wk).flatten(1, 2) * q.shape[-1] ** -0.5  # (N, h * n, C)
    attention = torch.softmax(torch.bmm(reach, placed.transpose(1, 2)), dim=2)
    seen = torch.bmm(attention, x).unflatten(1, (heads, -1))  # (N, h, n, C)
    values = (seen @ wv.transpose(1, 2)).transpose(1, 2).flatten(2) + a.v_proj.bias
    return _out(a)(values)


def _shared_look(a: Any, queries: Tensor, x: Tensor, placed: Tensor) -> Tensor:
    """_look while the positions (B, T, C) are still the same for all prompts of an image: queries (B * P, n, C)."""
    heads, batch, (count, n, _) = a.num_attention_heads, len(x), queries.shape
    q = _heads(a.q_proj(queries).view(batch, -1, a.q_proj.out_features), heads)
    k, v = _heads(a.k_proj(placed), heads), _heads(a.v_proj(x), heads)
    mixed = F.scaled_dot_product_attention(q, k, v)  # (B, h, P * n, d)
    return _out(a)(mixed.transpose(1, 2).reshape(count, n, -1))


def _updates(a: Any, told: Tensor) -> Tensor:
    """What each token (N, n, C) would add to a position that attends to it only: (N, h * n, C).

    A position's weights sum to one in each head, so that the output's bias is dealt out over the heads.
    """
    heads, out = a.num_attention_heads, _out(a)
    wo = out.weight.t().unflatten(0, (heads, -1))  # (h, d, C)
    return (_heads(a.v_proj(told), heads) @ wo + out.bias / heads).flatten(1, 2)


def _tell(a: Any, keys: Tensor, told: Tensor, x: Tensor, placed: Tensor) -> Tensor:
    """Positions x (N, T, C) attend to the tokens (N, n, C); returns x, changed, with what they learned added."""
    heads = a.num_attention_heads
    k = _heads(a.k_proj(keys), heads) * (a.k_proj.out_features // heads) ** -0.5  # (N, h, n, d)
    wq, bq = a.q_proj.weight.unflatten(0, (heads, -1)), a.q_proj.bias.view(heads, -1, 1)
    reach, offset = (k @ wq).flatten(1, 2), (k @ bq).flatten(1, 2)  # (N, h * n, C), (N, h * n, 1)
    scores = torch.baddbmm(offset, reach, placed.transpose(1, 2))
    return x.baddbmm_(_over_tokens(scores, heads).transpose(1, 2), _updates(a, told))


def _shared_tell(a: Any, keys: Tensor, told: Tensor, x: Tensor, placed: Tensor) -> Tensor:
    """_tell while the positions (B, T, C) are still the same for all prompts; returns (B * P, T, C)."""
    heads, batch, (count, n, _) = a.num_attention_heads, len(x), keys.shape
    q = _heads(a.q_proj(placed), heads)  # (B, h, T, d)
    k = _heads(a.k_proj(keys).view(batch, -1, a.k_proj.out_features), heads) * q.shape[-1] ** -0.5  # (B, h, P * n, d)
    scores = (k @ q.transpose(2, 3)).view(batch, heads, -1, n, q.shape[2]).transpose(1, 2)
    attention = _over_tokens(scores.reshape(count, heads * n, -1), heads)
    return (attention.transpose(1, 2) @ _updates(a, told)).unflatten(0, (batch, -1)).add_(x[:, None]).flatten(0, 1)


def _over_tokens(scores: Tensor, heads: int) -> Tensor:
    """(N, h * n, T): each position's weights over the n tokens of a head."""
    return torch.softmax(scores.unflatten(1, (heads, -1)), dim=2).flatten(1, 2)
