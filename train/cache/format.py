"""Cached latents and text-encoder outputs: two more members of a sample, and how training reads them.

    latents.safetensors   image.mean, image.std, intrinsics.mean, intrinsics.std (C, h, w): the posteriors of the base's VAE
                          and of the intrinsic VAE, unscaled, so that sampling stays; with flips, flipped.image.mean and
                          so on as well, of the mirrored picture
    text.safetensors      what the base's own encode_prompt gives for the caption: prompt_embeds (L, D), for SDXL
                          pooled_prompt_embeds (D,), for PixArt prompt_attention_mask (L,)

Each member says in its metadata by what it was made ("by": the id of a spec below) and of what ("of": sha256 of the
sample's own members). A spec says what decides the values: digests of weights, and the geometry.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from infer.bases.prompts import ENCODED
from infer.model.vae import scaled
from shards.core.errors import UserError
from shards.dataset import Dataset
from shards.marks import digest
from shards.sample import CACHES, SampleError
from shards.stream import Item

LATENTS, TEXT = CACHES
STREAMS = ("image", "intrinsics")
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class LatentsSpec:
    """What decides cached latents. Pictures are cropped to the largest square in the centre and resized to size_px."""

    image_vae: str
    intrinsic_vae: str
    size_px: int
    flips: bool
    dtype: str
    crop: Literal["center"] = "center"

    @property
    def id(self) -> str:
        return digest(asdict(self))[:16]


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """What decides cached text-encoder outputs: the pipeline's class, and a digest of its encoders and tokenizers."""

    pipeline: str
    encoders: str
    dtype: str

    @property
    def id(self) -> str:
        return digest(asdict(self))[:16]


Spec = LatentsSpec | TextSpec


def weights_digest(*modules: nn.Module) -> str:
    """sha256 of the modules' parameters and buffers rounded to bfloat16: the same for one model in float32 and bfloat16."""
    found = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            found.update(f"{name} {list(value.shape)}\n".encode())
            plain = value.detach().to("cpu", torch.bfloat16 if value.is_floating_point() else value.dtype).contiguous()
            found.update(plain.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def describe_text(pipeline: DiffusionPipeline, dtype: str) -> TextSpec:
    """The spec of a base's text encoders; they must be in memory."""
    parts: dict[str, Any] = pipeline.components
    encoders = [part for name, part in sorted(parts.items()) if "text_encoder" in name and part is not None]
    if not encoders:
        raise UserError("this base has no text encoder, so there is no text to cache; leave text out (--only latents)")
    vocabularies = [
        digest({"vocabulary": part.get_vocab(), "length": part.model_max_length})
        for name, part in sorted(parts.items())
        if "tokenizer" in name and part is not None
    ]
    together = hashlib.sha256("\n".join([weights_digest(*encoders), *vocabularies]).encode()).hexdigest()
    return TextSpec(pipeline=type(pipeline).__name__, encoders=together, dtype=dtype)


def describe_latents(
    image_vae: nn.Module, intrinsic_vae: nn.Module, *, size_px: int, flips: bool, dtype: str
) -> LatentsSpec:
    """The spec of latents of these two VAEs."""
    return LatentsSpec(
        image_vae=weights_digest(image_vae),
        intrinsic_vae=weights_digest(intrinsic_vae),
        size_px=size_px,
        flips=flips,
        dtype=dtype,
    )


def encode_text(pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    """The base's own encoding of B captions, without guidance: (B, ...) by the names of ENCODED, on the encoders' device."""
    encoder = next(
        part for name, part in sorted(pipeline.components.items()) if "text_encoder" in name and part is not None
    )
    given = {"prompt": list(captions), "device": encoder.device, "num_images_per_prompt": 1}
    if "do_classifier_free_guidance" in inspect.signature(pipeline.encode_prompt).parameters:
        given["do_classifier_free_guidance"] = False
    found = zip(ENCODED[type(pipeline).__name__], pipeline.encode_prompt(**given), strict=True)
    return {name: rows for name, rows in found if rows is not None and "negative" not in name}


# ---- the members -----------------------------------------------------------------------------------------------------


def content_of(members: Mapping[str, bytes]) -> str:
    """sha256 of a sample's own members: what its caches were made of."""
    found = hashlib.sha256()
    for name in sorted(set(members) - set(CACHES)):
        found.update(f"{name} {len(members[name])}\n".encode())
        found.update(members[name])
    return found.hexdigest()


def encode_member(tensors: Mapping[str, Tensor], spec: Spec, content: str) -> bytes:
    """The member that holds these tensors, in the spec's dtype (masks and other integers as they are)."""
    stored = {
        name: (value.to(DTYPES[spec.dtype]) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in tensors.items()
    }
    made = json.dumps({"by": spec.id, "of": content})  # as one entry: safetensors writes several in any order
    return safetensors.torch.save(stored, {"made": made})


def header_of(data: bytes) -> dict[str, str]:
    """What a member says of itself, {"by": ..., "of": ...}; {} if it is damaged."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found = json.loads(header["__metadata__"]["made"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(item: Item, member: str, spec: Spec) -> dict[str, Tensor]:
    if member not in item.extras:
        raise UserError(f"sample {item.key} was streamed without {member}; ask for it with Stream(extras=...)")
    data = item.extras[member]
    if header_of(data).get("by") != spec.id:
        raise UserError(
            f"{item.key}.{member} was made with other weights or another geometry; run `python -m train cache` again"
        )
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise SampleError(f"{item.key}.{member} is damaged: {error}") from error


def cached_latents(item: Item, spec: LatentsSpec, flip: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
    """{"image": (mean, std), "intrinsics": (mean, std)}, float32 (C, h, w), unscaled; of the mirrored picture if `flip`.

    Raises UserError unless they were made with exactly this spec, or if a flip is wanted that was not cached.
    """
    tensors, prefix = _read(item, LATENTS, spec), "flipped." if flip else ""
    if flip and not spec.flips:
        raise UserError(
            f"{item.key}.{LATENTS} has no mirrored latents; make the caches with --flips, or set data.flip = 0"
        )
    return {name: (tensors[f"{prefix}{name}.mean"].float(), tensors[f"{prefix}{name}.std"].float()) for name in STREAMS}


def cached_text(item: Item, spec: TextSpec) -> dict[str, Tensor]:
    """The outputs for the sample's caption, by the names of encode_prompt, without the batch dimension.

    Raises UserError unless they were made with exactly this spec.
    """
    return _read(item, TEXT, spec)


def latents_of(vae: AutoencoderKL, mean: Tensor, std: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents (B, C, h, w) as the diffusion model reads them, of a cached posterior: its mode, or a sample of it.

    With the same generator the same sample as infer.model.vae.encode draws.
    """
    if generator is None:
        return scaled(vae, mean)
    noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
    return scaled(vae, mean + std * noise.to(mean.device))


def check_caches(dataset: Dataset, specs: Sequence[Spec]) -> None:
    """Raises UserError, naming what differs, unless the dataset has caches that were made with these specs."""
    caches = dataset.info.get("caches") or {}
    for spec in specs:
        name = "latents" if isinstance(spec, LatentsSpec) else "text"
        found = caches.get(name)
        if not isinstance(found, dict):
            raise UserError(f"{dataset.folder.url} has no cached {name}; make them with `python -m train cache`")
        wanted = asdict(spec)
        if differing := [key for key in wanted if found.get(key) != wanted[key]]:
            said = ", ".join(f"{key} was {found.get(key)!r}, is {wanted[key]!r}" for key in differing)
            raise UserError(
                f"the cached {name} of {dataset.folder.url} do not fit: {said}; run `python -m train cache` again, or "
                "train without caches"
            )


def fitting_caches(
    datasets: Sequence[Dataset], pipeline: DiffusionPipeline, intrinsic_vae: nn.Module, *, size_px: int, flip: bool
) -> tuple[LatentsSpec, TextSpec]:
    """What a training asks cached_latents and cached_text for. flip: whether it wants mirrored pictures, too.

    pipeline: the base, with its VAE and text encoders in memory. In which precision values are stored is the datasets' affair.
    Raises UserError, naming what differs, unless all datasets have caches that fit.
    """
    stored = {name: (datasets[0].info.get("caches") or {}).get(name) or {} for name in ("latents", "text")}
    latents = describe_latents(
        pipeline.vae,
        intrinsic_vae,
        size_px=size_px,
        flips=flip or bool(stored["latents"].get("flips")),
        dtype=str(stored["latents"].get("dtype", "float16")),
    )
    text = describe_text(pipeline, str(stored["text"].get("dtype", "float16")))
    for dataset in datasets:
        check_caches(dataset, (latents, text))
    return latents, text
