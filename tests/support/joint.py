"""The tiny networks with both streams: what the tests of the joint denoiser share."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from infer.model.denoiser import JointDenoiser
from infer.model.lora import LoraWeights
from infer.model.processor import self_attention_layers
from infer.model.schedules import Gaussian
from tests.support import oracle, tiny

BASES = sorted(tiny.NETWORKS)
IMAGES, ROWS = 2, 8  # two guidance halves, two streams, two images
HALF = Gaussian(tau=500.0, alpha=0.4)  # w = 0.4 at the tests' timestep


def image_rows(x: Tensor) -> Tensor:
    """(G*2*B, ...) -> (G*B, ...)."""
    return x.unflatten(0, (-1, 2, IMAGES))[:, 0].flatten(0, 1)


def image_inputs(arguments: dict[str, Any]) -> dict[str, Any]:
    def pick(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: pick(value) for name, value in x.items()}
        return image_rows(x) if isinstance(x, Tensor) and x.ndim else x

    return {name: pick(value) for name, value in arguments.items()}


def at(network: nn.Module, arguments: dict[str, Any], timestep: float) -> Tensor:
    return tiny.forward(network, arguments | {"timestep": torch.full_like(arguments["timestep"], timestep)})


def trained(network: nn.Module, rank: int = 4, **options: Any) -> JointDenoiser:
    """Installed with adapters that do something."""
    denoiser = JointDenoiser.install(network, rank=rank, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.lora_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def by_oracle(
    network: nn.Module, arguments: dict[str, Any], weight: Any, lora: LoraWeights
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same network and arguments in float64, with the oracle in every self-attention layer; and the shares."""
    exact = copy.deepcopy(network).double()
    processors = {}
    for name, layer in self_attention_layers(exact).items():
        tensors, scale = dict(lora.tensors), lora.alpha / lora.rank
        layer.processor = processors[name] = oracle.Processor(name, IMAGES, weight, tensors, scale)

    def double(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: double(value) for key, value in x.items()}
        return x.double() if isinstance(x, Tensor) else x

    return tiny.forward(exact, double(arguments)), {name: p.share for name, p in processors.items()}
