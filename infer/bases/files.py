"""Bases as people have them: folders whose weights are of a variant (fp16) only, one .safetensors file, textual inversions."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shards.core.errors import UsageError, UserError

_WEIGHTS = re.compile(
    r"(?:model|diffusion_pytorch_model)"
    r"(?:\.(?P<first>(?!index)\w+))?(?:-\d+-of-\d+)?(?:\.(?P<last>(?!index)\w+))?\.safetensors"
)
"""model.safetensors, model.fp16.safetensors, and shards with the variant before their number or, formerly, behind it."""

_SINGLE: Mapping[str, tuple[str, type[Any]]] = {
    "StableDiffusionXLPipeline": ("conditioner.embedders.1.", StableDiffusionXLPipeline),
    "StableDiffusionPipeline": ("cond_stage_model.", StableDiffusionPipeline),
}
"""The bases that come as one file: how the names of a text encoder's weights begin there."""
_UNET = "model.diffusion_model.input_blocks.0.0.weight"

NEEDS_CONFIG = (
    "a single file holds no tokenizer: pass --base-config FOLDER, a diffusers folder of that kind of base, or, where there is "
    "no such option, --base 'FILE?config=FOLDER'"
)


def split_base(name: str) -> tuple[str, str | None, str | None]:
    """Name, variant and config of a base that may be written NAME?variant=fp16&config=FOLDER. Raises UsageError."""
    name, _, query = name.partition("?")
    said = {key: value for key, _, value in (part.partition("=") for part in query.split("&") if part)}
    if unknown := sorted(set(said) - {"variant", "config"}):
        raise UsageError(f"--base {name}?{query}: {unknown[0]!r} is neither variant nor config")
    return name, said.get("variant") or None, said.get("config") or None


def variant_of(folder: Path, wanted: str | None) -> str | None:
    """The variant in which the weights of a diffusers folder are there: None where all have plain files.

    Raises UserError when there are several, or not the one that is wanted.
    """
    found: dict[str, set[str | None]] = {}
    for file in folder.glob("*/*.safetensors"):
        if name := _WEIGHTS.fullmatch(file.name):
            found.setdefault(file.parent.name, set()).add(name["first"] or name["last"])
    named = sorted({variant for there in found.values() for variant in there if variant})
    if wanted is not None:
        if wanted not in named:
            raise UserError(f"{folder} has no weights of the variant {wanted}; it has {', '.join(named) or 'none'}")
        return wanted

    lacking = [there for there in found.values() if None not in there]
    if not lacking:
        return None
    fitting = [variant for variant in named if all(variant in there for there in lacking)]
    if len(fitting) != 1:
        raise UserError(
            f"{folder} has weights of the variants {', '.join(named)} only; pass one of them with --variant, or, where there "
            f"is no such option, as in --base '{folder}?variant={named[0]}'"
        )
    return fitting[0]


def from_file(path: Path, *, dtype: torch.dtype, config: str | None) -> DiffusionPipeline:
    """A pipeline of one .safetensors file. config: a diffusers folder of that kind of base; the hub's by default.

    Raises UserError.
    """
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the base {path}: {error}") from error
    kind = next((kind for start, kind in _SINGLE.values() if any(name.startswith(start) for name in names)), None)
    if kind is None or _UNET not in names:
        raise UserError(f"{path} does not hold a whole base: its weights are not those of Stable Diffusion or SDXL")

    if config is not None and not (Path(config) / "model_index.json").is_file():
        raise UserError(f"--base-config {config} is not a diffusers folder: it has no model_index.json")
    try:
        return kind.from_single_file(str(path), dtype=dtype, config=config)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, HTTPError, SingleFileComponentError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = NEEDS_CONFIG if config is None else f"is {config} of that kind of base?"
        raise UserError(f"cannot load the base {path}: {reason}; {advice}") from error


def add_embedding(pipeline: Any, text: str) -> None:
    """Loads a textual inversion, "TOKEN=FILE" or "FILE" (its own token, else the file's name). Raises UserError.

    Safetensors only: other formats are pickles.
    """
    token, equals, name = text.rpartition("=")
    path = Path(name)
    if path.suffix != ".safetensors":
        raise UsageError(f"--embedding {text}: a textual inversion must be a .safetensors file; others can run code")
    if not hasattr(pipeline, "load_textual_inversion"):
        raise UserError(f"--embedding {text}: a {type(pipeline).__name__} takes no textual inversions")
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the textual inversion {path}: {error}") from error

    named = [key for key in tensors if key not in ("emb_params", "clip_l", "clip_g")]
    token = token if equals else named[0] if len(tensors) == 1 and named else path.stem
    try:
        for tensor, encoder, tokenizer in _parts(pipeline, tensors):
            pipeline.load_textual_inversion(tensor, token=token, text_encoder=encoder, tokenizer=tokenizer)
    except ValueError as error:
        raise UserError(f"the textual inversion {path} does not fit this base: {error}") from error


def _parts(pipeline: Any, tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Any, Any]]:
    """Each vector with the text encoder and the tokenizer that it is for. Raises ValueError."""
    if hasattr(pipeline, "text_encoder_2"):
        if set(tensors) != {"clip_l", "clip_g"}:
            raise ValueError(f"SDXL's hold clip_l and clip_g, this one {', '.join(tensors)}")
        return [
            (tensors["clip_l"], pipeline.text_encoder, pipeline.tokenizer),
            (tensors["clip_g"], pipeline.text_encoder_2, pipeline.tokenizer_2),
        ]
    if len(tensors) != 1:
        raise ValueError(f"it holds {', '.join(tensors)}, where one vector is expected")
    return [(next(iter(tensors.values())), pipeline.text_encoder, pipeline.tokenizer)]
