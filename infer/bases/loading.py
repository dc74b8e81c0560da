"""Base models: loading them as stock diffusers pipelines, and telling whether a run folder was made for one.

A base is the name of an embedded one, a diffusers folder, or a hub id. What can be a base is a table.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub.errors import HTTPError
from torch import nn

from infer.bases.files import from_file, split_base, variant_of
from infer.embedded import resolve
from shards.core.errors import UserError

PIPELINES: dict[str, str] = {
    "StableDiffusionPipeline": "unet",
    "StableDiffusionXLPipeline": "unet",
    "PixArtAlphaPipeline": "transformer",
    "PixArtSigmaPipeline": "transformer",
}
"""The stock pipelines that can be a base, and the component that is their denoising network."""

_ADDED = re.compile(r"\.processor\.|\.lora_|^encoder_hid_proj\.image_projection_layers\.")
"""Parameters that are not the base's: attention processors', LoRAs', IP-Adapters'."""

PROBES, PROBE_TOLERANCE = 64, 2.0**-7  # the tolerance is bfloat16's rounding, so that a base may be loaded in any dtype


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a run folder remembers of its base.

    weights: 64 of its weights, at fixed places, in float32: cheap to read, and the same for one model in float32, float16 and
    bfloat16 up to rounding, where a digest is not.
    """

    name: str
    """How it was loaded; information only."""
    network: str
    """The network's class."""
    architecture: str
    """sha256 of its configuration as written and of its parameters' names and shapes. Equal for equal files only."""
    weights: tuple[float, ...]
    config: dict[str, Any] = field(default_factory=dict)
    """What its configuration means (network_config): the same for one network in other words. {} in older manifests."""
    parameters: str = ""
    """sha256 of its parameters' names and shapes; "" in older manifests."""


def network_of(pipeline: DiffusionPipeline) -> nn.Module:
    """The denoising network of a supported pipeline. Raises UserError for any other pipeline."""
    kind = type(pipeline).__name__
    if kind not in PIPELINES:
        raise UserError(f"a {kind} cannot be a base; use one of {', '.join(PIPELINES)}")
    network = getattr(pipeline, PIPELINES[kind])
    if hasattr(network, "_orig_mod"):
        raise UserError("the base's network is compiled already; load it plain, then call generator.denoiser.compile()")
    return network


def prediction_type_of(pipeline: DiffusionPipeline) -> str:
    """What the network predicts ("epsilon", "v_prediction"), as the pipeline's scheduler takes it."""
    return str(pipeline.scheduler.config.get("prediction_type", "epsilon"))


def describe_base(network: nn.Module, name: str) -> Base:
    """The Base of a network: of its own weights, whatever adapters and processors were put into it.

    Raises UserError if its weights are not in memory (sequential offload).
    """
    named = ((key.replace(".base_layer.", "."), parameter) for key, parameter in network.named_parameters())
    parameters = sorted((key, parameter) for key, parameter in named if not _ADDED.search(key))
    if any(parameter.is_meta for _, parameter in parameters):
        raise UserError("the base's weights are not in memory; enable sequential offload after the run is loaded")
    config = {key: value for key, value in getattr(network, "config", {}).items() if not key.startswith("_")}
    shapes = [[key, list(parameter.shape)] for key, parameter in parameters]
    described = json.dumps([type(network).__name__, config, shapes], sort_keys=True, default=str)
    matrices = [parameter for _, parameter in parameters if parameter.ndim >= 2]
    places = [matrices[i * len(matrices) // PROBES] for i in range(PROBES)]
    weights = [place.detach().flatten()[place.numel() // 3].float().cpu() for place in places]
    return Base(
        name=name,
        network=type(network).__name__,
        architecture=hashlib.sha256(described.encode()).hexdigest(),
        weights=tuple(torch.stack(weights).tolist()),
        config=network_config(network),
        parameters=hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
    )


_PER_BLOCK = (
    "attention_head_dim",
    "cross_attention_dim",
    "layers_per_block",
    "only_cross_attention",
    "transformer_layers_per_block",
)
"""Settings of a U-Net that are one value for all of its blocks, or a list with one for each."""

_NO_MATTER: dict[str, tuple[str, ...]] = {
    # the size that a pipeline makes unless told; softmax precision, which our attention does not take; training only
    "UNet2DConditionModel": ("sample_size", "upcast_attention", "dropout"),
    "PixArtTransformer2DModel": ("upcast_attention", "dropout"),
}
"""Settings that change nothing that the network computes."""


def network_config(network: nn.Module) -> dict[str, Any]:
    """What a network's configuration means: equal for two networks of one class that compute alike, however it is written.

    Settings that have the default's value are left out, and so are those that change nothing; null and false are one.
    """
    kind = type(network)
    parameters = inspect.signature(kind.__init__).parameters.items()
    defaults = {name: item.default for name, item in parameters if item.default is not inspect.Parameter.empty}
    given = {name: value for name, value in getattr(network, "config", {}).items() if name in defaults}

    blocks = len(given.get("down_block_types", ()))
    settings, usual = (_spelled_out(kind.__name__, values, blocks) for values in (given, defaults))
    matter = sorted(set(settings) - set(_NO_MATTER.get(kind.__name__, ())))
    return {name: settings[name] for name in matter if settings[name] != usual[name]}


def _spelled_out(kind: str, config: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """A configuration in one spelling, JSON types only. blocks: of a U-Net, on its way down."""
    found = {name: _plain(value) for name, value in config.items()}
    if kind == "UNet2DConditionModel":
        for name in _PER_BLOCK:
            found[name] = found[name] if isinstance(found[name], list) else [found[name]] * blocks
        mirrored = found["transformer_layers_per_block"][::-1]
        found["reverse_transformer_layers_per_block"] = found["reverse_transformer_layers_per_block"] or mirrored
    elif kind == "PixArtTransformer2DModel":
        size = found["sample_size"]
        found["interpolation_scale"] = found["interpolation_scale"] or max(size // 64, 1)
        if config["use_additional_conditions"] is None:
            found["use_additional_conditions"] = _plain(size == 128)
        found["out_channels"] = found["out_channels"] or found["in_channels"]
    return found


def _plain(value: Any) -> Any:
    """Tuples as lists, 1.0 as 1, false as null, and nothing that JSON does not have."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is False:
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def misfit(made_for: Base, base: Base, *, other_weights: bool = False) -> str | None:
    """Why something made for one base does not fit another, naming the field; None if it fits.

    other_weights: accept another model of the same architecture (a fine-tuned variant of the base).
    """
    if made_for.network != base.network:
        return f"its base.network is {made_for.network}, but this base's is {base.network}"
    if made_for.architecture != base.architecture and (difference := _difference(made_for, base)):
        return difference
    pairs = zip(made_for.weights, base.weights, strict=True)
    if not other_weights and not all(abs(a - b) <= PROBE_TOLERANCE * max(abs(a), abs(b), 1e-2) for a, b in pairs):
        return (
            f"its base.weights are those of {made_for.name}, not this base's; if this is a fine-tuned variant, say so "
            "with other_weights (--other-weights)"
        )
    return None


def _difference(made_for: Base, base: Base) -> str | None:
    """How two networks of one class differ, naming the setting; None if they differ in words only."""
    if not made_for.parameters:  # of a manifest that holds no more than a digest
        return f"its base.architecture ({made_for.name}) is another configuration of {base.network} than this base's"
    for name in sorted({*made_for.config, *base.config}):
        theirs, ours = (one.config.get(name, "the default") for one in (made_for, base))
        if theirs != ours:
            return f"its base.config ({made_for.name}) has {name} = {theirs}, but this base has {ours}"
    if made_for.parameters != base.parameters:
        return f"its base.parameters ({made_for.name}) have other names or shapes than this base's"
    return None


def open_base(
    name: str,
    *,
    dtype: torch.dtype,
    variant: str | None = None,
    config: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """Loads a base: "demo", a diffusers folder, one .safetensors file, or a hub id. Nothing of it is ever unpickled.

    variant: of the weights' files, as in fp16; a folder that has only one is read without being told. config: for a single
    file, a diffusers folder of that kind of base. Both may stand in the name, as split_base has them.
    options: more arguments of DiffusionPipeline.from_pretrained.
    Raises UserError when it is missing, unreachable, damaged, or not a supported pipeline.
    """
    name, own_variant, own_config = split_base(name)
    variant, config = variant or own_variant, config or own_config
    source = resolve(name, "base")
    if Path(source).is_file():
        pipeline = from_file(Path(source), dtype=dtype, config=config)
        network_of(pipeline)
        return pipeline

    local = Path(source).is_dir()
    if local and not (Path(source) / "model_index.json").is_file():
        raise UserError(f"{source} is not a diffusers folder: it has no model_index.json")
    if not local and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise UserError(f"there is no base {source}: it is neither a folder here nor a hub id such as OWNER/NAME")
    settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "variant": variant} | dict(options or {})
    if local:
        settings["variant"] = variant_of(Path(source), settings["variant"])
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, **settings)
    except (OSError, ValueError, HTTPError) as error:
        advice = "check the folder" if local else "check the id and the network, or pass a local folder"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "no file named" in reason and not settings["variant"] and not local:
            advice = "if it has weights of a variant only, pass it, as in --variant fp16"
        raise UserError(f"cannot load the base {source}: {reason}; {advice}") from error
    network_of(pipeline)
    return pipeline
