"""What the layers of a network must know while it runs: the forward context, handed to each layer and taken back.

The wrapper of the network's forward (denoiser.py) makes a ForwardContext and enters it; each layer's processor
(processor.py) finds its own LayerContext. Blocks that activation checkpointing runs again, in backward, get the context
of their own forward (ReplayInContext).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Record = Literal["mean", "map"]
"""How attention shares are kept: the mean over queries, or one value for each query."""


@dataclass
class LayerContext:
    """What one layer must know during one forward of the network, and what it says back."""

    images: int
    """B, the images of each guidance half."""
    streams: int
    """S, or 1 when only the image's rows are run."""
    weight: float | Tensor
    """w of eq. 4: the int 0 or 1, or a tensor () or (P,) for anything else."""
    record: Record | None = None
    """Whether to keep the attention share."""
    share: Tensor | None = None
    """The share of the attention that the image pays to the intrinsics: float32 (P,), or (P, N) for a map."""


class ContextSlot:
    """Where the current forward context is left for what runs inside the network; None outside of a joint forward."""

    current: "ForwardContext | None" = None

    def layout(self) -> tuple[int, int] | None:
        """(G, S) while all streams are in the batch, else None."""
        now = self.current
        return (now.guidance, now.streams) if now is not None and now.streams > 1 else None


@dataclass
class ForwardContext:
    """One forward of the network. `with context:` hands each layer its own, and puts back what was before."""

    slot: ContextSlot
    guidance: int
    """G, the halves of classifier-free guidance in the batch."""
    streams: int
    """S, or 1 when only the image's rows are run."""
    images: int
    """B, the images of each guidance half."""
    layers: list[tuple[Any, LayerContext]]
    """Each layer's processor with its context."""
    outer: "list[ForwardContext | None]" = field(default_factory=list)
    """The contexts that were current when this one was entered."""

    @torch.compiler.disable
    def __enter__(self) -> None:
        self.outer.append(self.slot.current)
        self.slot.current = self
        for processor, context in self.layers:
            processor.context = context

    @torch.compiler.disable
    def __exit__(self, *_: object) -> None:
        before = self.slot.current = self.outer.pop()
        for processor, _context in self.layers:
            processor.context = None
        for processor, context in before.layers if before is not None else ():
            processor.context = context


class ReplayInContext:
    """An activation-checkpoint function whose blocks run again, in backward, in the context of their own forward."""

    def __init__(self, original: Callable[..., Any], slot: ContextSlot):
        self.original, self.slot = original, slot

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        assert self.slot.current is not None
        return self.original(_BlockInContext(block, self.slot.current), *args)


class _BlockInContext:
    def __init__(self, block: Callable[..., Any], context: ForwardContext):
        self.block, self.context = block, context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.context.slot.current is self.context:
            return self.block(*args, **kwargs)
        with self.context:
            return self.block(*args, **kwargs)
