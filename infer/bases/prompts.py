"""What a stock pipeline is asked: prompts encoded once and repeated for each stream, noise, and step generators.

Rows of the pipeline's batch are (S, B): the B images' rows, then the same B again for their intrinsics (for each of them, where
the VAE is not shared). (Guidance doubles this once more inside the pipeline: (G, S, B).)
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor
from transformers import CLIPTextModel

from infer.bases.loading import network_of
from shards.core.errors import UsageError

_PIXART = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
ENCODED: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("prompt_embeds", "negative_prompt_embeds"),
    "StableDiffusionXLPipeline": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
}
"""What each pipeline's encode_prompt returns, in order: arguments of its call, each with one row an image."""


def as_batch(
    prompt: str | Sequence[str] | None, seeds: int | Sequence[int], options: Mapping[str, Any]
) -> tuple[list[str] | None, list[int]]:
    """Prompts (None where embeddings are given in `options`) and seeds, one of each an image; a single one is repeated.

    Raises UsageError if there are several of both, in different numbers, or neither prompt nor embeddings.
    """
    embeds = options.get("prompt_embeds")
    if (prompt is None) == (embeds is None):
        raise UsageError("give either a prompt or prompt_embeds")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if prompt is not None else None
    count = len(prompts) if prompts is not None else len(embeds)  # type: ignore[arg-type]
    chosen = [seeds] if isinstance(seeds, int) else [int(seed) for seed in seeds]
    images = max(count, len(chosen))
    if not count or not chosen or (count not in (1, images)) or (len(chosen) not in (1, images)):
        raise UsageError(f"{count} prompts and {len(chosen)} seeds do not pair; give one, or as many as the other")
    if prompts is None and count != images:
        raise UsageError(f"give prompt_embeds one row for each of the {images} seeds")
    return (prompts * (images // count) if prompts is not None else None), chosen * (images // len(chosen))


def encode_prompts(
    pipeline: DiffusionPipeline,
    prompts: list[str] | None,
    negative: str | Sequence[str] | None,
    guidance: float,
    options: dict[str, Any],
    streams: int = 2,
) -> dict[str, Any]:
    """The pipeline's own embeddings of B prompts, each (B, ...) -> (S B, ...), as arguments of its call.

    Takes out of `options` what the encoding uses (prompt_2, clip_skip, clean_caption, given embeddings, ...).
    """
    accepted = inspect.signature(pipeline.encode_prompt).parameters
    of_call = {name: item.default for name, item in inspect.signature(pipeline.__call__).parameters.items()}
    given = {
        name: of_call[name] for name in accepted if of_call.get(name, inspect.Parameter.empty) is not inspect._empty
    }
    given |= {name: options.pop(name) for name in list(options) if name in accepted}
    if negative is not None:
        alike = isinstance(negative, str) and prompts is not None
        given["negative_prompt"] = [negative] * len(prompts or ()) if alike else negative
    elif given.get("negative_prompt_embeds") is not None:
        given["negative_prompt"] = None
    guided = is_guided(pipeline, guidance)
    _check_clip_skip(pipeline, given.get("clip_skip"))
    given |= {
        "prompt": prompts,
        "device": get_module_execution_device(network_of(pipeline)),
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": guided,
    }
    if "lora_scale" in accepted and options.get("cross_attention_kwargs"):
        given["lora_scale"] = options["cross_attention_kwargs"].get("scale")
    with _final_norm_in_its_place(pipeline):
        encoded = pipeline.encode_prompt(**given)
    found = dict(zip(ENCODED[type(pipeline).__name__], encoded, strict=True))
    repeated = {
        name: torch.cat([rows] * streams)
        for name, rows in found.items()
        if rows is not None and (guided or "neg" not in name)
    }
    return repeated | {"prompt": None, "negative_prompt": None}


def is_guided(pipeline: DiffusionPipeline, guidance: float) -> bool:
    """Whether the pipeline runs twice the rows for this classifier-free guidance."""
    return guidance > 1 and getattr(network_of(pipeline).config, "time_cond_proj_dim", None) is None


def _check_clip_skip(pipeline: Any, clip_skip: int | None) -> None:
    """UsageError unless the text encoder has so many layers to skip."""
    if clip_skip is None:
        return
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    layers = min((encoder.config.num_hidden_layers for encoder in encoders if encoder is not None), default=0)
    if layers and not 0 <= clip_skip < layers:
        raise UsageError(f"clip_skip = {clip_skip}: the text encoder has {layers} layers, so give 0 to {layers - 1}")


@contextmanager
def _final_norm_in_its_place(pipeline: Any) -> Iterator[None]:
    """clip_skip of Stable Diffusion looks for text_encoder.text_model, which transformers 5.6 took away: its parts are the
    encoder's own now (diffusers issue 14124). For a while the encoder is its own text_model, though not its submodule."""
    encoder = getattr(pipeline, "text_encoder", None)
    flattened = isinstance(encoder, CLIPTextModel) and not hasattr(encoder, "text_model")
    if flattened:
        encoder.__dict__["text_model"] = encoder
    try:
        yield
    finally:
        if flattened:
            del encoder.__dict__["text_model"]


def image_size(pipeline: DiffusionPipeline, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) in pixels: as asked, a square of one number, or the base's own size.

    Raises UsageError unless both sides are multiples of what the base's latents stand for.
    """
    config: Any = network_of(pipeline).config
    if size is None:
        own = config.sample_size
        own = (own, own) if isinstance(own, int) else own
        return own[0] * pipeline.vae_scale_factor, own[1] * pipeline.vae_scale_factor
    height, width = (size, size) if isinstance(size, int) else size
    step = pipeline.vae_scale_factor * (config.get("patch_size") or 1)
    if height < step or width < step or height % step or width % step:
        raise UsageError(f"the size {width} x {height} does not fit this base: both sides must be multiples of {step}")
    return height, width


def noise_and_generators(
    seeds: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype, streams: int = 2
) -> tuple[Tensor, list[torch.Generator]]:
    """Initial noise (B, C, h, w), and S B generators for the steps of samplers that add noise, all on the CPU.

    Each image has a generator of its own, so a batch equals its images alone, on every device. It draws what the stock
    pipeline would draw with that generator; the intrinsics' one continues from the same state, so that all streams get
    the same noise at every step, as they do at the start.
    """
    images = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = torch.cat([torch.randn((1, *shape), generator=generator, dtype=dtype) for generator in images])
    intrinsics = []
    for generator in images * (streams - 1):
        twin = torch.Generator("cpu")
        twin.set_state(generator.get_state())
        intrinsics.append(twin)
    return noise, images + intrinsics
