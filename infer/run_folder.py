"""A run folder: everything that was trained for a base, in stock formats, with a manifest that says what it fits.

    lora.safetensors   the intrinsic stream's LoRA, in the keys of peft and diffusers
    vae/               the intrinsic VAE, an ordinary diffusers folder of an AutoencoderKL; without a shared VAE the base's own
    manifest.json      Manifest, below; written last, so a folder without it is unfinished

No file is ever unpickled. Files are written atomically, and the manifest holds their digests, so that a damaged or mixed
folder is refused.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn

from infer.bases.loading import Base, describe_base, misfit
from infer.model.lora import LoraWeights, read_lora, save_lora
from infer.model.separate_vae import SeparateVae
from infer.model.stages import StageMap, stage_map_of
from shards.core.config import load_config
from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from shards.packing import CHANNELS, SLICES, DepthRange

VERSION = 1
MANIFEST, LORA, VAE = "manifest.json", "lora.safetensors", "vae"
VAE_CONFIG, VAE_WEIGHTS = f"{VAE}/config.json", f"{VAE}/diffusion_pytorch_model.safetensors"
_FILES = (LORA, VAE_CONFIG, VAE_WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stage map by which w(l, t) was meant: for each stage, the prefixes of the layers in it."""

    name: str
    stages: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The channels of packed intrinsics: for each intrinsic [first, end), and what a generated depth is decoded to."""

    channels: int = CHANNELS
    slices: dict[str, tuple[int, int]] = field(
        default_factory=lambda: {k: (s.start, s.stop) for k, s in SLICES.items()}
    )
    depth: DepthRange = field(default_factory=DepthRange)


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """rank, alpha, and the self-attention projections that have a LoRA."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft", "safetensors")}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a run is, and the base that it fits.

    shared_vae: whether one VAE encodes all intrinsics into one stream, as in the method, or each is a picture to the base's
    own VAE in a stream of its own (the paper's ablation, Tab. 5; infer.model.separate_vae). training: the resolved training
    configuration. files: sha256 of each file, filled in by save_run.
    """

    base: Base
    prediction_type: str
    stages: Stages
    lora: LoraShape
    packing: Packing = field(default_factory=Packing)
    shared_vae: bool = True
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=_versions)
    files: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def streams(self) -> int:
        """How many streams are denoised together: the image's, and one of all intrinsics or one of each."""
        return 2 if self.shared_vae else 1 + len(SLICES)

    @property
    def stage_map(self) -> StageMap:
        return StageMap(self.stages.name, self.stages.stages)

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def from_json(data: bytes, where: str) -> "Manifest":
        """Raises UserError, naming the field, for another version, an unknown or a missing field, or a wrong type."""
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from error
        if not isinstance(document, dict) or document.get("version") != VERSION:
            found = document.get("version") if isinstance(document, dict) else None
            raise UserError(f"{where} has version {found!r}; this program reads version {VERSION}")
        try:
            return load_config(Manifest, document)
        except UsageError as error:
            raise UserError(f"{where} is not a manifest: {error}") from error

    def check(self, base: Base, prediction_type: str, *, other_weights: bool = False) -> None:
        """Raises UserError, naming the field, unless this run fits the base and this program's channel packing."""
        reason = misfit(self.base, base, other_weights=other_weights)
        if reason is None and self.prediction_type != prediction_type:
            reason = f"its prediction_type is {self.prediction_type}, but the base's scheduler has {prediction_type}"
        ours = Packing()
        if reason is None and _plain(self.packing.slices) != _plain(ours.slices):
            reason = f"its packing is {self.packing.slices}, but this program packs {ours.slices}"
        if reason is not None:
            raise UserError(f"the run does not fit the base {base.name}: {reason}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A loaded run folder. The weights are on the CPU, in the dtype in which they were saved."""

    url: str
    manifest: Manifest
    lora: LoraWeights
    vae: AutoencoderKL


def manifest_for(
    network: nn.Module,
    name: str,
    prediction_type: str,
    lora: LoraWeights,
    stages: StageMap | None = None,
    training: Mapping[str, Any] | None = None,
    shared_vae: bool = True,
) -> Manifest:
    """The manifest of a run made for this network, which was loaded as base `name`.

    stages: the network's own map by default. training: the resolved training configuration, JSON types only.
    shared_vae: as Manifest has it.
    """
    described = (stages or stage_map_of(network)).to_dict()
    return Manifest(
        base=describe_base(network, name),
        prediction_type=prediction_type,
        stages=load_config(Stages, described),
        lora=LoraShape(rank=lora.rank, alpha=lora.alpha, targets=lora.targets),
        shared_vae=shared_vae,
        training=dict(training or {}),
    )


def save_run(url: str, manifest: Manifest, lora: LoraWeights, vae: AutoencoderKL) -> Manifest:
    """Writes a run folder, replacing one that is there; returns the manifest as written (with the files' digests).

    A crash leaves a folder without manifest, which load_run refuses.
    """
    folder = Folder(url)
    with tempfile.TemporaryDirectory(prefix="ildm-run-") as scratch:
        (Path(scratch) / VAE).mkdir()
        save_lora(Path(scratch) / LORA, lora, "unet" if manifest.base.network.startswith("UNet") else "transformer")
        vae.save_pretrained(Path(scratch) / VAE)
        contents = {name: (Path(scratch) / name).read_bytes() for name in _FILES}
    config = json.loads(contents[VAE_CONFIG])
    config.pop("_name_or_path", None)  # where it was loaded from is nobody's business
    config["_class_name"] = AutoencoderKL.__name__  # what stock diffusers loads; SeparateVae is one, too
    contents[VAE_CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    manifest = dataclasses.replace(manifest, files={name: _sha256(data) for name, data in contents.items()})
    folder.make(VAE)
    folder.remove(MANIFEST)
    for name, data in contents.items():
        folder.write(name, data)
    folder.write(MANIFEST, manifest.to_json())
    return manifest


def load_manifest(url: str) -> Manifest:
    """The manifest of a run folder. Raises UserError when the folder is missing, unfinished or of another version."""
    folder = Folder(url)
    if not folder.exists(MANIFEST):
        raise UserError(
            f"{url} is not a finished run folder: it has no {MANIFEST}; run the training command again, or make a run folder "
            "of a checkpoint with `python -m train export`"
        )
    return Manifest.from_json(folder.read(MANIFEST), folder.address(MANIFEST))


def load_run(url: str) -> Run:
    """Loads a run folder from any fsspec URL. Raises UserError, naming the file, if something is missing or damaged."""
    folder, manifest = Folder(url), load_manifest(url)
    with tempfile.TemporaryDirectory(prefix="ildm-run-") as scratch:
        local = folder.local_path or Path(scratch)
        (local / VAE).mkdir(exist_ok=True)
        for name in _FILES:
            data = folder.read(name)
            if manifest.files.get(name) != _sha256(data):
                raise UserError(
                    f"{folder.address(name)} is not the file that the manifest describes; save or copy the run again"
                )
            if folder.local_path is None:
                (local / name).write_bytes(data)
        lora = read_lora(local / LORA)
        try:
            kind = AutoencoderKL if manifest.shared_vae else SeparateVae
            vae = kind.from_pretrained(local / VAE, use_safetensors=True, low_cpu_mem_usage=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder.address(VAE)} cannot be loaded: {error}") from error
    channels = (vae.config["in_channels"], vae.config["out_channels"])
    wanted = manifest.packing.channels if manifest.shared_vae else 3
    if channels != (wanted, wanted):
        raise UserError(f"{folder.address(VAE)} has {channels} channels; the VAE of this run must have {wanted}")
    return Run(url=url, manifest=manifest, lora=lora, vae=vae.eval())


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True)  # tuples of ours are lists once they were read


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
