"""Base models: loading them as stock diffusers pipelines, and telling whether a run folder was made for one.

A base is the name of an embedded one, a diffusers folder, or a hub id. What can be a base is a table.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub.errors import HTTPError
from torch import nn

from infer.shipped import resolve
from shards.errors import UserError

PIPELINES: dict[str, str] = {
    "StableDiffusionPipeline": "unet",
    "StableDiffusionXLPipeline": "unet",
    "PixArtAlphaPipeline": "transformer",
    "PixArtSigmaPipeline": "transformer",
}
"""The stock pipelines that can be a base, and the component that is their denoising network."""

_ADDED = re.compile(r"\.processor\.|\.lora_")  # parameters that are not the base's

PROBES, PROBE_TOLERANCE = 64, 2.0**-7  # the tolerance is bfloat16's rounding, so that a base may be loaded in any dtype


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a run folder remembers of its base.

    name: how it was loaded; information only. network: the network's class. architecture: sha256 of its configuration
    and of the names and shapes of its parameters. weights: 64 of its weights, at fixed places, in float32: cheap to
    read, and the same for one model in float32, float16 and bfloat16 up to rounding, where a digest is not.
    """

    name: str
    network: str
    architecture: str
    weights: tuple[float, ...]


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
    )


def misfit(made_for: Base, base: Base, *, other_weights: bool = False) -> str | None:
    """Why something made for one base does not fit another, naming the field; None if it fits.

    other_weights: accept another model of the same architecture (a fine-tuned variant of the base).
    """
    if made_for.network != base.network:
        return f"its base.network is {made_for.network}, but this base's is {base.network}"
    if made_for.architecture != base.architecture:
        return f"its base.architecture ({made_for.name}) is another configuration of {base.network} than this base's"
    pairs = zip(made_for.weights, base.weights, strict=True)
    if not other_weights and not all(abs(a - b) <= PROBE_TOLERANCE * max(abs(a), abs(b), 1e-2) for a, b in pairs):
        return (
            f"its base.weights are those of {made_for.name}, not this base's; if this is a fine-tuned variant, say so "
            "with other_weights (--other-weights)"
        )
    return None


def open_base(name: str, *, dtype: torch.dtype, options: Mapping[str, Any] | None = None) -> DiffusionPipeline:
    """Loads a base: "demo", a diffusers folder, or a hub id. Safetensors only: nothing of it is ever unpickled.

    options: more arguments of DiffusionPipeline.from_pretrained (variant, revision, ...). Raises UserError with a sentence
    when it is missing, unreachable, damaged, or not a supported pipeline.
    """
    source = resolve(name, "base")
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise UserError(f"{source} is not a diffusers folder: it has no model_index.json")
    if not Path(source).is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise UserError(f"there is no base {source}: it is neither a folder here nor a hub id such as OWNER/NAME")
    try:
        settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True} | dict(options or {})
        pipeline = DiffusionPipeline.from_pretrained(source, **settings)
    except (OSError, ValueError, HTTPError) as error:
        advice = "check the folder" if Path(source).is_dir() else "check the id and the network, or pass a local folder"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot load the base {source}: {reason}; {advice}") from error
    network_of(pipeline)
    return pipeline
