"""Caches of one shard: the frozen models that make them, and the shard written again with them."""

import contextlib
import gc
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from infer.bases.loading import PIPELINES, open_base
from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from shards.dataset import Dataset
from shards.geometry import square
from shards.intrinsics import MapError
from shards.marks import shard_name
from shards.packing import CHANNELS, pack
from shards.sample import Sample, SampleError, member_names
from shards.writer import ShardWriter, read_mark, recover
from train.cache.format import (
    DTYPES,
    LATENTS,
    STREAMS,
    TEXT,
    Spec,
    content_of,
    describe_latents,
    describe_text,
    encode_member,
    encode_text,
    header_of,
)

MEMBERS: dict[str, str] = {"latents": LATENTS, "text": TEXT}


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What is cached. out: another folder for the new dataset; None: the shards themselves are written again.

    vae: the folder of the intrinsic VAE (RUN/vae); only latents need it. flips: latents of the mirrored pictures, too.
    dtype: how values are stored. batch: pictures that are encoded together.
    """

    shards: str
    base: str
    vae: str | None
    out: str | None = None
    only: tuple[str, ...] = ("latents", "text")
    size_px: int = 512
    flips: bool = True
    dtype: str = "float16"
    batch: int = 8
    workers: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus_per_worker: float = 1.0
    address: str = "local"

    def __post_init__(self) -> None:
        if not self.only or set(self.only) - set(MEMBERS):
            raise UsageError(f"--only {','.join(self.only)}: what can be cached is {' and '.join(MEMBERS)}")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype}: give one of {', '.join(DTYPES)}")
        if "latents" in self.only and self.vae is None:
            raise UsageError("latents need --vae, the intrinsic VAE of a run (RUN/vae); or give --only text")
        if self.size_px < 8 or self.size_px % 8 or self.batch < 1:
            raise UsageError(f"--size {self.size_px} must be a multiple of 8, and --batch {self.batch} at least 1")


class Models:
    """The frozen models of a base that make caches, on one device."""

    def __init__(self, config: CacheConfig, device: str, dtype: torch.dtype) -> None:
        """dtype: of the text encoders; VAEs compute in float32, which some of them need."""
        pipeline: Any = open_base(config.base, dtype=dtype)
        pipeline.register_modules(**{PIPELINES[type(pipeline).__name__]: None})  # the large part is not needed
        self.pipeline = pipeline
        self.vaes: dict[str, AutoencoderKL] = {}
        for name, part in pipeline.components.items():
            if "text_encoder" in name and part is not None:
                nn.Module.to(part, device)
        if "latents" in config.only:
            self.vaes = dict(zip(STREAMS, (pipeline.vae, open_intrinsic_vae(str(config.vae))), strict=True))
            for vae in self.vaes.values():
                nn.Module.to(vae.eval(), device, torch.float32)
        gc.collect()

    def specs(self, config: CacheConfig) -> dict[str, Spec]:
        """By what the caches are known, by their names."""
        found: dict[str, Spec] = {}
        if "latents" in config.only:
            found["latents"] = describe_latents(
                *(self.vaes[name] for name in STREAMS), size_px=config.size_px, flips=config.flips, dtype=config.dtype
            )
        if "text" in config.only:
            found["text"] = describe_text(self.pipeline, config.dtype)
        return found

    @torch.inference_mode()
    def text(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """For each caption the tensors of its member."""
        found = encode_text(self.pipeline, captions)
        return [{name: rows[i] for name, rows in found.items()} for i in range(len(captions))]

    @torch.inference_mode()
    def latents(self, pixels: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """pixels: {"image": (B, 3, S, S), "intrinsics": (B, 8, S, S)} in [-1, 1]. For each the tensors of its member."""
        found: dict[str, Tensor] = {}
        for name, vae in self.vaes.items():
            posterior = vae.encode(pixels[name].to(vae.device)).latent_dist
            found |= {f"{name}.mean": posterior.mean, f"{name}.std": posterior.std}
        return [{name: rows[i] for name, rows in found.items()} for i in range(len(pixels["image"]))]


def open_intrinsic_vae(folder: str) -> AutoencoderKL:
    """The intrinsic VAE of a run: RUN/vae, a diffusers folder. Safetensors only. Raises UserError."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{folder} is not a VAE's folder: it has no config.json; give RUN/vae of a `python -m train vae` run"
        )
    try:
        vae = AutoencoderKL.from_pretrained(path, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded: {error}") from error
    if vae.config["in_channels"] != CHANNELS:
        raise UserError(f"{folder} reads {vae.config['in_channels']} channels; an intrinsic VAE reads {CHANNELS}")
    return vae


def pixels_of(sample: Sample, size_px: int, flip: bool) -> dict[str, Tensor]:
    """{"image": (3, S, S), "intrinsics": (8, S, S)} float32 in [-1, 1], as training sees them. Raises SampleError, MapError."""
    image, maps = sample.image(), sample.maps()
    height, width = image.shape[:2]
    geometry = square(height, width, size_px, flip=flip)
    packed, _ = pack(geometry.maps(maps))
    pixels = torch.from_numpy(geometry.image(image)).permute(2, 0, 1)
    return {"image": pixels.float() / 127.5 - 1, "intrinsics": torch.from_numpy(packed).half().float()}


# ---- one shard -------------------------------------------------------------------------------------------------------


@dataclass
class Counted:
    """How far a shard is; another thread may look."""

    done: int = 0
    failed: int = 0


def cache_shard(
    dataset: Dataset,
    out: Folder,
    index: int,
    config: CacheConfig,
    models: Models,
    specs: Mapping[str, Spec],
    made: Mapping[str, Any],
    skip: Container[int] = frozenset(),
    counted: Counted | None = None,
) -> dict[str, Any]:
    """Writes shard `index` of the dataset, with its caches, to `out`; returns its mark. skip: rows that kill workers."""
    name, counted, begin = shard_name(index), counted or Counted(), time.perf_counter()
    recover(out, name)
    old = read_mark(out, name) if out.exists(f"{name}.json") else None
    shard = ShardCaches(dataset, Dataset(out, {}), old, config, models, specs)
    options: dict[str, Any] = {"made": made, "replaces": old["checksum"] if old else None}
    with ShardWriter(out, index, members=all_members(dataset, specs), **options) as writer:
        rows = enumerate(dataset.samples(name))
        while batch := list(islice(rows, config.batch)):
            kept = [sample for row, sample in batch if row not in skip]
            for row, sample in batch:
                if row in skip:
                    writer.fail(
                        sample.key, "decode", "killed_worker", "a worker that encoded it died, alone with it, twice"
                    )
            for sample, outcome in zip(kept, shard.of(kept), strict=True):
                if isinstance(outcome, str):
                    writer.fail(sample.key, "decode", "corrupt", outcome)
                else:
                    own = {member: sample.members[member] for member in dataset.members}
                    writer.add(sample.key, own | outcome)
                counted.done, counted.failed = counted.done + 1, counted.failed + isinstance(outcome, str)
        for line in dataset.failures(name):
            writer.fail(line["key"], line["stage"], line["reason"], line["message"])
        return writer.commit({"unit_s": round(time.perf_counter() - begin, 3)})


def all_members(dataset: Dataset, specs: Mapping[str, Spec]) -> list[str]:
    """The members of the dataset once it has caches of these specs; caches that it has already stay."""
    maps = tuple(name.removesuffix(".png") for name in dataset.members)
    return member_names(dataset.info["image"], maps, [*dataset.members, *(MEMBERS[name] for name in specs)])


@dataclass
class ShardCaches:
    """The new members of a shard's samples: kept from before where they fit, else made."""

    dataset: Dataset
    out: Dataset
    old: dict[str, Any] | None
    config: CacheConfig
    models: Models
    specs: Mapping[str, Spec]

    def of(self, samples: Sequence[Sample]) -> list[dict[str, bytes] | str]:
        """For each sample its new members, or why there are none."""
        found: list[dict[str, bytes] | str] = [{} for _ in samples]
        contents = [content_of(sample.members) for sample in samples]
        for name, spec in self.specs.items():
            before = [self._before(sample.key, MEMBERS[name]) for sample in samples]
            fits = [
                data is not None and header_of(data) == {"by": spec.id, "of": content}
                for data, content in zip(before, contents, strict=True)
            ]
            if not all(fits):  # the whole batch, then: what comes out of a model depends on what else is in the batch
                made = self._latents(samples) if name == "latents" else self._text(samples)
            for i, content in enumerate(contents):
                data: bytes | str | None
                if fits[i]:
                    data = before[i]
                elif isinstance(tensors := made[i], str):
                    data = tensors
                elif all(bool(value.isfinite().all()) for value in tensors.values()):
                    data = encode_member(tensors, spec, content)
                else:
                    data = f"its {name} are not finite"
                if isinstance(so_far := found[i], dict) and data is not None:
                    found[i] = data if isinstance(data, str) else so_far | {MEMBERS[name]: data}
        return found

    def _before(self, key: str, member: str) -> bytes | None:
        if self.old is None or member not in self.old["index"].get(key, ()):
            return None
        return self.out.read_at(self.old, key, [member]).members[member]

    def _text(self, samples: Sequence[Sample]) -> list[dict[str, Tensor] | str]:
        captions: dict[int, str] = {}
        for i, sample in enumerate(samples):
            with contextlib.suppress(SampleError):
                captions[i] = sample.caption
        made = dict(zip(captions, self.models.text(list(captions.values())) if captions else (), strict=True))
        return [made.get(i, "its caption is damaged") for i in range(len(samples))]

    def _latents(self, samples: Sequence[Sample]) -> list[dict[str, Tensor] | str]:
        found: list[dict[str, Tensor] | str] = [{} for _ in samples]
        for prefix in ("", "flipped.") if self.config.flips else ("",):
            pixels: list[tuple[int, dict[str, Tensor]]] = []
            for i, sample in enumerate(samples):
                try:
                    pixels.append((i, pixels_of(sample, self.config.size_px, bool(prefix))))
                except (SampleError, MapError) as error:
                    found[i] = str(error)
            if not pixels:
                continue
            together = {name: torch.stack([values[name] for _, values in pixels]) for name in STREAMS}
            for (i, _), tensors in zip(pixels, self.models.latents(together), strict=True):
                so_far = found[i]
                if not isinstance(so_far, str):
                    found[i] = so_far | {prefix + name: value for name, value in tensors.items()}
        return found
