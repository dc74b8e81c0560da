"""Forward and backward of a network as CUDA graphs, for networks whose kernels take longer to launch than to run."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from shards.core.errors import UserError


class GraphedNetwork(nn.Module):
    """Stands where a diffusers network stands. With gradients, the first call is captured, and further ones replay it.

    They must have the first one's shapes, and nothing in the network may look at values or change from call to call. Without
    gradients the network is called as it is. Gradients may lie in the graph's own memory, which the next call overwrites: one
    backward to a step, and no accumulation.
    """

    def __init__(self, network: nn.Module, precision: torch.dtype) -> None:
        """precision: what autocast makes matrix products in. Raises UserError without a CUDA device."""
        super().__init__()
        if next(network.parameters()).device.type != "cuda":
            raise UserError("CUDA graphs need an NVIDIA GPU: leave lora.cuda_graph off")
        self.network, self._precision = network, precision
        self._graphed: Any = None

    def forward(self, noisy: Tensor, timestep: Tensor, return_dict: bool = False, **conditions: Any) -> tuple[Tensor]:
        """noisy (B, C, h, w), timestep (B,) -> what the network predicts, (B, C or 2C, h, w); a tuple whatever return_dict."""
        if not torch.is_grad_enabled():
            plain: tuple[Tensor] = self.network(noisy, timestep=timestep, return_dict=False, **conditions)
            return plain
        arguments = (noisy, timestep, conditions)
        if self._graphed is None:
            self._graphed = self._capture(arguments)
        return (self._graphed(*arguments),)

    def _capture(self, arguments: Any) -> Any:
        if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(arguments)):
            raise UserError("this base takes more than tensors, which a CUDA graph cannot: leave lora.cuda_graph off")
        examples = tree_map(lambda t: t.detach().clone().requires_grad_(t.requires_grad), arguments)
        # autograd's nodes of the weights are made in capture, on a stream of its own: no mistake
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        # weights that autocast had cast once would be kept over the capture, and not be cast again after they learned
        with torch.autocast("cuda", self._precision, self._precision != torch.float32, cache_enabled=False):
            graphed: Any = torch.cuda.make_graphed_callables(_Call(self.network), examples)
        return graphed.forward  # not the module itself: it would become a part of this one


class _Call(nn.Module):
    """The network by positional arguments, as capture wants it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, noisy: Tensor, timestep: Tensor, conditions: dict[str, Any]) -> Tensor:
        predicted: Tensor = self.network(noisy, timestep=timestep, return_dict=False, **conditions)[0]
        return predicted
