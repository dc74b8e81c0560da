"""The two ways to train the LoRA: within joint attention (the method), or alone (the paper's ablation "LoRA-only")."""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from infer.model.denoiser import JointDenoiser
from infer.model.lora import TARGETS, LoraWeights
from infer.model.processor import self_attention_layers
from infer.model.schedules import Joint
from infer.model.stages import stage_map_of
from train.config import LoraConfig


class Streams(Protocol):
    """used: which streams' rows are in a batch, 0 the image's, from 1 on the intrinsics'. denoiser: None if not joint."""

    @property
    def used(self) -> tuple[int, ...]: ...

    @property
    def denoiser(self) -> JointDenoiser | None: ...

    def trainable(self) -> dict[str, nn.Parameter]: ...

    def predict(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Any]) -> Tensor: ...

    def weights(self, values: Mapping[str, Tensor]) -> LoraWeights: ...

    def compile(self) -> None: ...


def make_streams(network: nn.Module, config: LoraConfig) -> Streams:
    """Installs untrained adapters on the network's self-attention and freezes all else."""
    return JointStreams(network, config) if config.image_stream else IntrinsicsAlone(network, config)


class JointStreams:
    """All streams in one batch, image rows first, with joint attention at w = 1 (or at the schedule of the ablation)."""

    def __init__(self, network: nn.Module, config: LoraConfig) -> None:
        self.used, others = tuple(range(config.streams)), config.streams - 1
        self.denoiser = JointDenoiser.install(
            network,
            rank=others * config.rank,
            alpha=others * config.alpha or None,
            targets=config.targets,
            dtype=torch.float32,
            streams=config.streams,
        )
        self.denoiser.freeze()
        stages = stage_map_of(network)
        self._schedule = stages.schedule(config.train_schedule) if config.train_schedule else Joint()

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.denoiser.lora_weights().tensors)  # type: ignore[arg-type]

    def predict(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """noisy: (S B, C, h, w), timesteps: (S B,) -> (S B, C or 2C, h, w)."""
        self.denoiser.prepare(len(noisy) // self.denoiser.streams, self._schedule)
        return _call(module, noisy, timesteps, conditions)

    def weights(self, values: Mapping[str, Tensor]) -> LoraWeights:
        mine = self.denoiser.lora_weights()
        return LoraWeights(dict(values), mine.rank, mine.alpha)

    def compile(self) -> None:
        self.denoiser.compile()


class IntrinsicsAlone:
    """The intrinsics' rows only, through the stock network with a stock peft LoRA."""

    used: tuple[int, ...] = (1,)
    denoiser: JointDenoiser | None = None

    def __init__(self, network: nn.Module, config: LoraConfig) -> None:
        self._network = cast(Any, network)
        self._rank, self._alpha = config.rank, config.alpha or float(config.rank)
        layers = [f"{name}.{TARGETS[t]}" for name in self_attention_layers(network) for t in config.targets]
        self._network.requires_grad_(False)
        made: Any = {"r": self._rank, "lora_alpha": self._alpha, "target_modules": layers}
        self._network.add_adapter(PeftConfig(**made))

    def trainable(self) -> dict[str, nn.Parameter]:
        wanted = get_peft_model_state_dict(self._network)
        by_place = {tensor.data_ptr(): name for name, tensor in wanted.items()}
        learning = [p for p in self._network.parameters() if p.requires_grad]
        return {by_place[p.data_ptr()]: p for p in learning}

    def predict(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """noisy: (B, C, h, w), timesteps: (B,) -> (B, C or 2C, h, w)."""
        return _call(module, noisy, timesteps, conditions)

    def weights(self, values: Mapping[str, Tensor]) -> LoraWeights:
        return LoraWeights(dict(values), self._rank, self._alpha)

    def compile(self) -> None:
        self._network.compile(dynamic=False)  # as the joint network: each kind of batch by itself


def _call(module: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Any]) -> Tensor:
    first: Tensor = module(noisy, timestep=timesteps, return_dict=False, **conditions)[0]
    return first
