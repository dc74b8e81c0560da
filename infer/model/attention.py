"""Cross-domain self-attention of two streams (paper, eq. 1), weighted (eq. 4), exact and without a mask.

Shape letters: P pairs (one image and its intrinsics), S streams (0 image, the others intrinsics), H heads, N tokens of one
stream, D width of a head. The method has S = 2; its ablation without the shared VAE has S = 5, a stream for each intrinsic.
Every function here is pure; what knows about networks is in denoiser.py.

    eq. 1   all streams' queries read the keys and values of all streams (S N tokens)
    eq. 4   Attn_x = softmax(q_x k^T / sqrt(D) + log W) v,   W = 1 on the image's columns, w on the intrinsics' columns

Eq. 4 for the image, with Z_self = sum exp over its own columns and Z_cross over the intrinsics' columns, is the convex mix

    o = (Z_self o_self + w Z_cross o_cross) / (Z_self + w Z_cross) = o_self + g (o_cross - o_self),
    g = w Z_cross / (Z_self + w Z_cross) = sigmoid(lse_cross + log w - lse_self),         lse = log Z

so two ordinary attention calls that also return their log-sum-exp give it exactly. g is the share of its attention that
an image token pays to the intrinsics. Intrinsic streams always use weight 1.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.core.errors import UserError

Backend = Literal["merge", "bias"]
LseKernel = Literal["cpu", "flash", "efficient", "chunked"]

PLAIN_LOGITS = 2**18
"""Up to so many products of a query and a key (512 x 512 tokens), plain products are faster than the CPU's fused kernel in
bfloat16 with its gradient: 9 to 2 times for 16 to 256 tokens. From 1,024 on they are slower."""
CHUNK_LOGITS = 2**24  # the plain-torch form holds at most about this many float32 logits at a time (64 MiB)


def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: float | Tensor, *, backend: Backend = "merge", share: bool = False
) -> tuple[Tensor, Tensor | None]:
    """All streams' attention: the image by eq. 4 with this weight, the intrinsics by eq. 1.

    q, k, v: (P, S, H, N, D), one floating dtype. weight: w >= 0, a number, or a tensor () or (P,); a tensor always takes
    the general path (no look at its values, so no wait for the device and no recompilation), a number 0 or 1 the plain
    calls. backend, for fractional w: "merge" (fastest, no gradient: the fused kernels give none for the log-sum-exp) or
    "bias" (a row bias of log w; differentiable, in q, k, v and in w; in half precision log w itself is rounded to it).

    Returns (P, S, H, N, D), and g (P, H, N) float32 in [0, 1] if `share`, else None. Raises UserError for merge under
    autograd, an unknown backend, or a negative number as weight.
    """
    if backend not in ("merge", "bias"):
        raise UserError(f"joint attention has no backend {backend!r}: use 'merge' or 'bias'.")
    differentiates = torch.is_grad_enabled() and any(
        t.requires_grad for t in (q, k, v, weight) if isinstance(t, Tensor)
    )

    # The plain calls, for a weight that is known to be 0 or 1
    if not isinstance(weight, Tensor):
        if not 0 <= weight < math.inf:
            raise UserError(f"the weight of joint attention is {weight}: it must be a finite number, 0 or more.")
        if weight == 0:
            return apart(q, k, v), q.new_zeros(q.shape[0], *q.shape[2:4], dtype=torch.float32) if share else None
        if weight == 1 and (differentiates or not share):
            return concatenated(q, k, v), attention_share(q, k, weight) if share else None

    # The image by eq. 4, the intrinsics by eq. 1
    if backend == "bias":
        image = attend(q[:, 0], joined(k), joined(v), row_bias(q, weight))
        g = attention_share(q, k, weight) if share else None
    elif differentiates:
        raise UserError(
            f"joint attention with weight {weight} by backend 'merge' has no gradient: use weight 1, or backend 'bias'."
        )
    else:
        image, g = merged(q, k, v, weight)
    return together(image, attend(joined(q[:, 1:]), joined(k), joined(v))), g if share else None


def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """w = 0: the image attends to itself, as in the base. q, k, v and the result: (P, S, H, N, D)."""
    return together(attend(q[:, 0], k[:, 0], v[:, 0]), attend(joined(q[:, 1:]), joined(k), joined(v)))


def concatenated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """w = 1 (eq. 1): every stream attends to the tokens of all. q, k, v and the result: (P, S, H, N, D)."""
    return attend(joined(q), joined(k), joined(v)).unflatten(2, (q.shape[1], -1)).transpose(1, 2)


def merged(q: Tensor, k: Tensor, v: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4 for the image from two calls. q, k, v: (P, S, H, N, D). Returns (P, H, N, D) and g (P, H, N) float32."""
    own, lse_own = attend_with_lse(q[:, 0], k[:, 0], v[:, 0])
    cross, lse_cross = attend_with_lse(q[:, 0], joined(k[:, 1:]), joined(v[:, 1:]))
    g = torch.sigmoid(lse_cross + log_weight(weight, lse_own) - lse_own)
    return torch.lerp(own.to(g.dtype), cross.to(g.dtype), g[..., None]).to(q.dtype), g


def attention_share(q: Tensor, k: Tensor, weight: float | Tensor) -> Tensor:
    """g (P, H, N), without gradient: the mass that eq. 4 puts on the intrinsics' columns, for each image query."""
    with torch.no_grad():
        q, k = q.detach(), k.detach()
        weight = weight.detach() if isinstance(weight, Tensor) else weight
        return merged(q, k, k, weight)[1]


def joined(x: Tensor) -> Tensor:
    """(P, S, H, N, D) -> (P, H, S N, D): the streams' tokens in turn. A view if S is 1, or laid out as (P, S, N, H, D)."""
    return x.transpose(2, 3).flatten(1, 2).transpose(1, 2)


def together(image: Tensor, intrinsics: Tensor) -> Tensor:
    """(P, H, N, D), (P, H, (S - 1) N, D) -> (P, S, H, N, D), laid out as (P, S, N, H, D) like the kernels' own results."""
    tokens = torch.cat([image.transpose(1, 2), intrinsics.transpose(1, 2)], 1)
    return tokens.unflatten(1, (-1, image.shape[2])).transpose(2, 3)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v by the stock kernel. q (P, H, N, D), k and v (P, H, M, D), bias (1|P, 1, 1, M).

    On the CPU in bfloat16, where a gradient may be asked for and tokens are few, by plain products.
    """
    few = q.shape[-2] * k.shape[-2] <= PLAIN_LOGITS
    if few and q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled():
        logits = (q * q.shape[-1] ** -0.5) @ k.mT
        return (logits if bias is None else logits + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def log_weight(weight: float | Tensor, like: Tensor) -> Tensor:
    """log w as (1 or P, 1, 1), in the dtype and on the device of `like`; -inf for 0."""
    return torch.as_tensor(weight, dtype=like.dtype, device=like.device).reshape(-1, 1, 1).log()


def row_bias(q: Tensor, weight: float | Tensor) -> Tensor:
    """log W of eq. 4: (1 or P, 1, 1, S N) for q (P, S, H, N, D): 0 on the image's columns, log w on the intrinsics'."""
    accurate = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
    log_w = log_weight(weight, accurate)[..., None].expand(-1, 1, 1, (q.shape[1] - 1) * q.shape[3])
    return torch.cat([torch.zeros_like(log_w[..., : q.shape[3]]), log_w], -1).to(q.dtype)


def lse_kernel(q: Tensor) -> LseKernel:
    """Which implementation gives attention and its log-sum-exp for q (P, H, N, D). No kernel fits: plain torch, chunked."""
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type == "cuda" and torch.version.cuda is not None and q.shape[-1] <= 256:
        ampere = torch.cuda.get_device_capability(q.device) >= (8, 0)
        if ampere and q.dtype in (torch.float16, torch.bfloat16):
            return "flash"
        if q.dtype in (torch.float32, torch.float16):
            return "efficient"
    return "chunked"


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, kernel: LseKernel | None = None) -> tuple[Tensor, Tensor]:
    """Attention and lse = log sum exp(q k^T / sqrt(D)). q: (P, H, N, D), k and v: (P, H, M, D); no gradient for lse.

    Returns (P, H, N, D) in q's dtype and (P, H, N), float32 (float64 for float64 input).
    """
    kernel, width, scale = kernel or lse_kernel(q), q.shape[-1], q.shape[-1] ** -0.5
    if kernel == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    if kernel == "chunked":
        return attend_in_chunks(q, k, v)
    q, k, v = (F.pad(t, (0, -width % 8)) if width % 8 else t for t in (q, k, v))  # zeros change no product
    if kernel == "flash":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    return out[..., :width], lse[..., : q.shape[2]]  # the efficient kernel pads its rows to a multiple of 32


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch, float32 (or float64), a chunk of queries at a time: for devices without a kernel."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = max(1, CHUNK_LOGITS // (k.shape[0] * k.shape[1] * k.shape[2]))
    outs, lses = [], []
    for part in q.split(rows, dim=2):
        logits = part.to(dtype) @ k.to(dtype).mT * q.shape[-1] ** -0.5
        lse = torch.logsumexp(logits, -1)
        outs.append((torch.exp(logits - lse[..., None]) @ v.to(dtype)).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)
