"""What a training is: a recipe's tables [data], [vae] (stage 1) and [lora] (stage 2), with the command line on top."""

import dataclasses
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from extract.config import merge, parse_setting
from infer.embedded import GUIDANCE
from shards.core.config import load_config, read_toml
from shards.core.errors import UsageError
from shards.intrinsics import INTRINSICS
from train.rates import cosine


def _check(table: str, config: Any, positive: Sequence[str] = (), shares: Sequence[str] = ()) -> None:
    """Raises UsageError, naming the setting, unless `positive` ones are above 0 and `shares` within 0..1."""
    for name in positive:
        if getattr(config, name) <= 0:
            raise UsageError(f"{table}.{name} = {getattr(config, name)}; it must be above 0")
    for name in shares:
        if not 0 <= getattr(config, name) <= 1:
            raise UsageError(f"{table}.{name} = {getattr(config, name)}; give a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples are seen, and how they become tensors.

    weights: the datasets' shares, equal to their sizes if empty. size_px: side of the square that is trained on.
    crop: "center" or "random", of the largest square. flip: the share of samples that are mirrored; mirror_captions: the
    words left and right then change places in their captions. held_out: the share of keys, chosen by their hash, that is
    never trained on (0: none; samples that are trained on are then measured); validation: at most so many of them are measured.
    where: conditions on the samples' metadata (shards.stream.select), such as "quality.normal_depth_angle < 30".
    window: shards that are shuffled together. workers: loader processes. memory_gb: a dataset that fits (it must be
    cropped at the centre) is decoded once and kept; loader processes are not needed then. 0: never.
    """

    weights: tuple[float, ...] = ()
    where: tuple[str, ...] = ()
    size_px: int = 512
    crop: Literal["center", "random"] = "center"
    flip: float = 0.5
    mirror_captions: bool = False
    held_out: float = 0.02
    validation: int = 64
    window: int = 16
    workers: int = 4
    memory_gb: float = 2.0
    max_broken: float = 0.05
    """Share of the samples seen (at least of 1,000, or of a smaller dataset) that may be unreadable before the run stops."""
    store_wait_s: float = 600.0
    """How long an object store or a network disk that is away is waited for before the run saves and ends."""

    def __post_init__(self) -> None:
        _check("data", self, ("size_px", "validation", "window"), ("flip", "held_out", "max_broken"))
        if self.workers < 0 or self.memory_gb < 0 or self.store_wait_s < 0:
            raise UsageError("data.workers, data.memory_gb and data.store_wait_s must not be negative")
        if self.size_px % 8:
            raise UsageError(f"data.size_px = {self.size_px}; it must be a multiple of 8, which a latent stands for")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """One stage's optimisation. Everything here but the bookkeeping decides what comes out.

    batch: samples of one process at once; accumulate: such batches for one step. warmup: steps of linear rise.
    clip: the largest norm of the gradient. ema: decay of the averaged weights, which are what is measured and kept; 0: none.
    precision: auto is float32 on the CPU and bf16 on a GPU. channels_last: memory layout of images and convolutions.
    Bookkeeping: checkpoint_every, keep (checkpoints beside the best), validate_every, log_every (all in steps), wandb.
    """

    steps: int
    batch: int
    learning_rate: float
    accumulate: int = 1
    optimiser: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    epsilon: float = 1e-8
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    clip: float = 1.0
    ema: float = 0.999
    precision: Literal["auto", "float32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False
    checkpoint_every: int = 500
    keep: int = 2
    validate_every: int = 1000
    sheets: int = 4
    log_every: int = 10
    wandb: bool = False

    def __post_init__(self) -> None:
        numbers = ("steps", "batch", "learning_rate", "accumulate", "clip", "checkpoint_every", "keep")
        _check("loop", self, (*numbers, "validate_every", "log_every"))
        if not 0 <= self.ema < 1 or self.warmup < 0 or self.sheets < 0:
            raise UsageError("loop.ema must be from 0 to below 1, and loop.warmup and loop.sheets not negative")

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then constant, or a cosine down to 1 %."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * cosine((step - self.warmup) / max(1, self.steps - self.warmup))


BOOKKEEPING = {"checkpoint_every", "keep", "validate_every", "sheets", "log_every", "wandb"}
"""Settings of LoopConfig that a resumed run may change: what comes out does not depend on them."""
DATA_BOOKKEEPING = {"workers", "memory_gb", "max_broken", "store_wait_s"}
"""The same of DataConfig."""
_PER_PROCESS = {"batch", "accumulate"}  # only the samples of a whole step decide


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Stage 1. drop: the probability with which each intrinsic is zeroed in the input (paper: 0.1), independently.

    depth, normal, segmentation, line: weights of the reconstruction terms. missing: the weight of the loss on an intrinsic
    that was zeroed in the input (0: none is asked for). kl: weight of the KL term, against the base's latents of pictures.
    lpips: weight of the perceptual term; 0 leaves it out (it needs the package lpips).
    """

    loop: LoopConfig
    drop: float = 0.1
    depth: float = 1.0
    normal: float = 1.0
    segmentation: float = 1.0
    line: float = 1.0
    missing: float = 0.0
    kl: float = 1e-4
    lpips: float = 0.0

    def __post_init__(self) -> None:
        _check("vae", self, shares=("drop",))
        if min(self.depth, self.normal, self.segmentation, self.line, self.missing, self.kl, self.lpips) < 0:
            raise UsageError("the weights of [vae] must not be negative")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Stage 2 (eq. 5). intrinsic_weight: its lambda. caption_drop: captions left out for classifier-free guidance.

    The rest is off unless asked for. snr_gamma: min-SNR weighting (0: none). noise_offset: of both streams' noise.
    independent_timesteps: the share of samples whose streams have each its own t. train_schedule: w(l, t) in training ("" is
    the paper's w = 1). without: intrinsics left out of the latent. cache: read latents and text that `python -m train cache`
    added to the shards. image_stream = false: the paper's ablation "LoRA-only". shared_vae = false: its ablation without the
    shared VAE (Tab. 5), each intrinsic in a stream of its own by the base's VAE; no stage 1, and rank is that of each stream.
    cuda_graph: replay a step's kernels as a CUDA graph, which pays where launching them takes longer than running them.
    """

    loop: LoopConfig
    rank: int = 32
    alpha: float = 0.0
    targets: tuple[str, ...] = ("q", "k", "v", "out")
    intrinsic_weight: float = 1.0
    caption_drop: float = 0.1
    snr_gamma: float = 0.0
    noise_offset: float = 0.0
    independent_timesteps: float = 0.0
    known_stream: float = 0.0
    """The fraction of samples that teach sampling from a given image or given maps: one stream, chosen evenly, is at timestep 0
    and has no loss."""
    train_schedule: str = ""
    without: tuple[str, ...] = ()
    cache: bool = False
    image_stream: bool = True
    shared_vae: bool = True
    cuda_graph: bool = False
    prompts: tuple[str, ...] = ()
    sample_steps: int = 25
    guidance: float = GUIDANCE

    def __post_init__(self) -> None:
        _check("lora", self, ("rank", "sample_steps"), ("caption_drop", "independent_timesteps", "known_stream"))
        if min(self.intrinsic_weight, self.snr_gamma, self.noise_offset, self.alpha) < 0:
            raise UsageError("lora.intrinsic_weight, alpha, snr_gamma and noise_offset must not be negative")
        if unknown := sorted(set(self.without) - set(INTRINSICS)):
            raise UsageError(f"lora.without names {unknown[0]!r}; the intrinsics are {', '.join(INTRINSICS)}")
        if set(self.without) == set(INTRINSICS):
            raise UsageError("lora.without leaves out every intrinsic")
        if self.without and self.cache:
            raise UsageError("lora.without needs the maps: cached latents have all of them; set lora.cache = false")
        if self.cuda_graph and (self.loop.accumulate > 1 or self.loop.compile or self.loop.gradient_checkpointing):
            raise UsageError("lora.cuda_graph works with one batch a step, without compile and gradient_checkpointing")
        if self.cuda_graph and self.train_schedule:
            raise UsageError("lora.cuda_graph replays a step at w = 1: lora.train_schedule has another w in each step")
        if self.train_schedule and (self.independent_timesteps or self.known_stream or not self.image_stream):
            raise UsageError("lora.train_schedule needs both streams at one timestep")
        if self.known_stream and not self.image_stream:
            raise UsageError("lora.known_stream needs the image's stream; set lora.image_stream = true")
        if not self.shared_vae and self.cache:
            raise UsageError(
                "cached latents are of the shared VAE; with lora.shared_vae = false set lora.cache = false"
            )
        if not self.shared_vae and not self.image_stream:
            raise UsageError("lora.shared_vae = false needs the image's stream; set lora.image_stream = true")

    @property
    def streams(self) -> int:
        """How many streams learn together: the image's, and one of all intrinsics or one of each."""
        return 2 if self.shared_vae else 1 + len(INTRINSICS)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training. base: as infer opens it. shards: datasets. out: the run folder.

    start: a run of the same base whose intrinsic VAE and LoRA are learned on from, or "demo"; "" begins with the base's own
    VAE, widened, and an untrained LoRA. other_weights: that run's base may have other weights (this one was fine-tuned since).
    """

    name: str
    base: str
    shards: tuple[str, ...]
    out: str
    start: str = ""
    other_weights: bool = False
    vae: VaeConfig
    lora: LoraConfig
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if "://" in self.out:
            raise UsageError(f"--out {self.out}: training writes to a folder on a disk; copy the run folder afterwards")

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def identity(self, stage: Literal["vae", "lora"], world: int) -> dict[str, Any]:
        """All settings that decide what a stage gives, as JSON: a run may only be resumed with the same."""
        table = dataclasses.asdict(getattr(self, stage))
        loop: dict[str, Any] = table.pop("loop")
        kept = {name: value for name, value in loop.items() if name not in BOOKKEEPING | _PER_PROCESS}
        kept["samples_per_step"] = loop["batch"] * loop["accumulate"] * world
        for name in ("prompts", "sample_steps", "guidance", "cuda_graph"):
            table.pop(name, None)
        if table.get("known_stream") == 0:
            table.pop("known_stream")  # as checkpoints from before this setting have it
        data = {k: v for k, v in dataclasses.asdict(self.data).items() if k not in DATA_BOOKKEEPING}
        made_of = {"shards": list(self.shards), "start": self.start, "data": data}
        return {"stage": stage, "seed": self.seed, **made_of, **table, "loop": kept}

    @staticmethod
    def defaults(stage: Literal["vae", "lora"]) -> dict[str, Any]:
        """What identity's settings were in a checkpoint from before they existed: a new setting is off unless asked for."""
        table: type[VaeConfig] | type[LoraConfig] = VaeConfig if stage == "vae" else LoraConfig
        tables: tuple[tuple[str, Any], ...] = (("", table), ("loop.", LoopConfig), ("data.", DataConfig))
        found = {
            prefix + field.name: field.default
            for prefix, owner in tables
            for field in dataclasses.fields(owner)
            if field.default is not dataclasses.MISSING
        }
        defaults: dict[str, Any] = json.loads(json.dumps(found))  # as a checkpoint has them
        return defaults


def recipe_names() -> list[str]:
    """The recipes that come with the toolkit."""
    files = resources.files("train") / "recipes"
    return sorted(file.name.removesuffix(".toml") for file in files.iterdir() if file.name.endswith(".toml"))


def load_train_config(
    recipe: str,
    *,
    base: str | None,
    shards: Sequence[str],
    out: str | None,
    start: str | None = None,
    other_weights: bool = False,
    settings: Sequence[str] = (),
) -> TrainConfig:
    """The configuration of `python -m train`: a recipe's name or a .toml, and TABLE.KEY=VALUE settings on top.

    base, start: the recipe's own if None. Raises UsageError, naming the setting.
    """
    if recipe in recipe_names():
        text = (resources.files("train") / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    elif recipe.endswith(".toml"):
        tables = read_toml(Path(recipe))
    else:
        raise UsageError(f"{recipe!r} is no recipe ({', '.join(recipe_names())}) and no .toml file")
    name = Path(recipe).stem
    for setting in settings:
        parsed = parse_setting(setting)
        if (table := next(iter(parsed))) not in ("data", "vae", "lora"):
            raise UsageError(f"--set {setting}: the tables of a training recipe are data, vae and lora, not {table}")
        tables = merge(tables, parsed)
    given: dict[str, Any] = {"name": name, "base": base, "start": start, "shards": list(shards)}
    given |= {"out": out or f"runs/{name}", "other_weights": other_weights}
    return load_config(TrainConfig, tables, given)
