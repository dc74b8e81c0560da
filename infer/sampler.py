"""Image and intrinsics together, over a stock diffusers pipeline (the paper's sampling, sec. 3).

    generator = CoGenerator.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", "runs/sdxl", device="cuda")
    made = generator("a red sphere left of a blue cube", schedule="gaussian", seeds=[0, 1, 2, 3])
    made.images[0].save("0.png"); made.intrinsics[0]["depth"].values

The pipeline's own call runs the sampling, with the batch doubled (image rows, then intrinsic rows) and the same initial
noise for both halves; its first half of the latents goes to the base VAE, the second to the intrinsic VAE. So its
schedulers, callbacks, offloading, LoRAs and other options are all there. A run without a shared VAE has four times as many
intrinsic rows, one for each intrinsic.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from infer.bases.files import add_embedding
from infer.bases.loading import describe_base, network_of, open_base, prediction_type_of
from infer.bases.prompts import as_batch, encode_prompts, image_size, is_guided, noise_and_generators
from infer.condition import HOLDS, Given, Hold, Known, KnownStreams, known_latents
from infer.decode import Generated, decode_images, decode_intrinsics, is_finite
from infer.embedded import GUIDANCE, resolve
from infer.model.denoiser import JointDenoiser
from infer.model.exclusive import Exclusive, one_at_a_time
from infer.model.schedules import Schedule
from infer.model.stages import StageMap, stage_map_of
from infer.run_folder import Run, load_run
from shards.core.errors import UsageError, UserError
from shards.packing import DepthRange

STEPS = 25  # the paper's

SCHEDULERS: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Short names of schedulers; the class name of any other scheduler of diffusers is taken too."""


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each step. latents, intrinsic_latents: (B, C, h, w) (as in Generated)."""

    step: int
    timestep: float
    latents: Tensor
    intrinsic_latents: Tensor


class CoGenerator:
    """Makes images with their intrinsics. Holds a stock pipeline, with joint attention installed on its network.

    close() (or leaving it as a context manager) gives the pipeline back as it was. While it is installed, the pipeline
    itself refuses to run by hand, because its batch would not say which rows are intrinsics.
    """

    def __init__(self, pipeline: DiffusionPipeline, run: Run | str, *, other_weights: bool = False) -> None:
        """pipeline: any supported stock pipeline, with its schedulers, LoRAs and options. run: a run folder, or its URL.

        Sequential CPU offload, compilation (`self.denoiser.compile()`) and device moves may come after this.
        other_weights: accept a fine-tuned variant of the base that the run was trained for.
        Raises UserError when the run does not fit the base, naming the field of its manifest.
        """
        run = load_run(resolve(run, "run")) if isinstance(run, str) else run
        network = network_of(pipeline)
        name = str(getattr(pipeline, "name_or_path", "") or type(pipeline).__name__)
        base = describe_base(network, name)
        run.manifest.check(base, prediction_type_of(pipeline), other_weights=other_weights)
        if run.vae.config["latent_channels"] != network.config["in_channels"]:  # type: ignore[index]
            raise UserError(f"the intrinsic VAE of {run.url} has other latents than the base {name}")
        self.pipeline: Any = pipeline
        self.run, self.base = run, base
        self.vae = cast(Any, run.vae)
        if self.vae.dtype != self.pipeline.vae.dtype:
            nn.Module.to(self.vae, dtype=self.pipeline.vae.dtype)  # diffusers' own warns of layers that are not there
        self.stages = _with_defaults(run.manifest.stage_map, stage_map_of(network))
        self.denoiser = JointDenoiser.install(network, stages=self.stages, lora=run.lora, streams=run.manifest.streams)

    @classmethod
    def from_pretrained(
        cls,
        base: str,
        run: str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        other_weights: bool = False,
        variant: str | None = None,
        base_config: str | None = None,
        embeddings: Sequence[str] = (),
        **options: Any,
    ) -> Self:
        """Loads a base ("demo", a diffusers folder, a .safetensors file, a hub id) and a run folder made for it.

        device: a GPU if there is one. dtype: bfloat16 on a GPU, float32 on the CPU. variant, base_config: as open_base has
        them. embeddings: textual inversions, "TOKEN=FILE" or "FILE". options: further arguments of
        DiffusionPipeline.from_pretrained (revision, ...). Raises UserError.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        made = load_run(resolve(run, "run"))
        pipeline: Any = open_base(base, dtype=dtype, variant=variant, config=base_config, options=options)
        for embedding in embeddings:
            add_embedding(pipeline, embedding)
        return cls(pipeline.to(device), made, other_weights=other_weights)

    @property
    def busy(self) -> Exclusive:
        """Held while a call runs: a second thread waits for its turn."""
        return self.denoiser.busy

    @one_at_a_time
    def close(self) -> None:
        """Takes joint attention out; the pipeline is as it was before."""
        self.denoiser.uninstall()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @one_at_a_time
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        seeds: int | Sequence[int] = 0,
        size: int | tuple[int, int] | None = None,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        schedule: Schedule | str = "gaussian",
        scheduler: str | None = None,
        intrinsics: bool = True,
        shares: bool | Literal["map"] = False,
        given: Given | Sequence[Given] | None = None,
        hold: Hold | None = None,
        depth: DepthRange | None = None,
        callback: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> Generated:
        """One image for each prompt and seed (one of either is repeated for all of the other).

        size: (height, width), or one number for a square; the base's own by default, or that of `given`.
        schedule: w(l, t): "gaussian", "drop", "off", "joint", settings as in "drop:tau=800", a table's file, or an object.
        scheduler: for this call another one of diffusers, by name (SCHEDULERS). intrinsics=False: images only; the
        intrinsic stream stops as soon as it can no longer change them. shares: record the attention shares (True: means;
        "map": of every query). given: a known image or known maps, one for all images or one for each. hold: how the network
        sees what is given (infer.condition); "clean" by default if the run has seen streams at different timesteps, else
        "noised". depth: what generated depth is decoded to, the run's own range by default. options: everything else that the
        pipeline's own call or its encode_prompt takes.

        Raises UsageError for arguments that do not fit, UserError when the result is not finite.
        """
        settings = {name: value for name, value in locals().items() if name in _REMEMBERED}
        prompts, chosen = as_batch(prompt, seeds, options)
        givens = [given] if isinstance(given, Given) else list(given or ())
        if len(givens) not in (0, 1, len(chosen)):
            raise UsageError(
                f"{len(givens)} images or sets of maps are given for {len(chosen)} images: give one, or all"
            )
        if hold not in (None, *HOLDS):
            raise UsageError(f"hold = {hold!r} is not one of {', '.join(HOLDS)}")
        height, width = size = image_size(self.pipeline, size or (givens[0].size() if givens else None))
        described = self.stages.schedule(schedule) if isinstance(schedule, str) else schedule
        described.check(self.stages.stages)
        options = self._checked(options, callback, guided=is_guided(self.pipeline, guidance))
        with self._using(scheduler):
            settings |= self._settings(described, size, options)
            streams = self.denoiser.streams
            call = encode_prompts(self.pipeline, prompts, negative_prompt, guidance, options, streams)
            dtype, device = call["prompt_embeds"].dtype, get_module_execution_device(self.denoiser.network)
            factor, channels = self.pipeline.vae_scale_factor, self.run.vae.config["latent_channels"]
            shape = (channels, height // factor, width // factor)
            noise, generators = noise_and_generators(chosen, shape, dtype, streams)
            noise = noise.to(device)
            known = None
            if givens:
                settings["hold"] = hold = hold or self._usual_hold()
                known = known_latents(givens, self.pipeline.vae, self._placed_vae(), noise, size, streams)
            call |= {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": guidance}
            call |= {"latents": torch.cat([noise] * streams), "generator": generators, "output_type": "latent"}
            call |= self._told(callback) | options
            if "use_resolution_binning" in inspect.signature(self.pipeline.__call__).parameters:
                call["use_resolution_binning"] = False
            try:
                self.denoiser.prepare(
                    len(chosen),
                    described,
                    timesteps=self._timesteps(steps, options),
                    intrinsics=intrinsics,
                    record="map" if shares == "map" else "mean" if shares else None,
                )
                with self._knowing(known, noise, hold):
                    latents = self.pipeline(**call).images
            finally:
                self.denoiser.images = None  # the pipeline by hand would run with a batch that is not ours
        latents = known.put(latents) if known else latents
        return self._result(latents, prompts, chosen, intrinsics, bool(shares), givens, known, depth, settings)

    def _result(
        self,
        latents: Tensor,
        prompts: list[str] | None,
        seeds: list[int],
        intrinsics: bool,
        shares: bool,
        given: Sequence[Given],
        known: Known | None,
        depth: DepthRange | None,
        settings: dict[str, Any],
    ) -> Generated:
        image_latents, intrinsic_latents = self._by_kind(latents)
        if not is_finite(image_latents if not intrinsics else latents):
            raise UserError(
                "the result is not finite: this scheduler or number type does not fit the base; try dtype float32"
            )
        images, flagged = decode_images(self.pipeline, image_latents)
        maps = []
        if intrinsics:
            extent = depth or self.run.manifest.packing.depth
            maps = decode_intrinsics(self.pipeline, self.vae, intrinsic_latents, extent)
            if known is not None and known.intrinsics_are_whole:
                of_each = given if len(given) > 1 else [given[0]] * len(maps)
                maps = [made | dict(item.maps) for made, item in zip(maps, of_each, strict=True)]
        self.pipeline.maybe_free_model_hooks()
        return Generated(
            images=images,
            intrinsics=maps,
            latents=image_latents,
            intrinsic_latents=intrinsic_latents if intrinsics else None,
            prompts=prompts if prompts is not None else [""] * len(seeds),
            seeds=seeds,
            flagged=flagged,
            shares=self.denoiser.shares if shares else None,
            settings=settings,
        )

    def _by_kind(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(S B, C, h, w) -> the image's (B, C, h, w) and the intrinsics' ((S - 1) B, C, h, w)."""
        images = len(latents) // self.denoiser.streams
        return latents[:images], latents[images:]

    # ---- what the call hands to the pipeline -------------------------------------------------------------------------

    def _checked(self, options: Mapping[str, Any], callback: object, guided: bool) -> dict[str, Any]:
        """The caller's further options, without those that are ours to set."""
        for name, ours in _OURS.items():
            if name in options:
                raise UsageError(f"{name} is set by CoGenerator; {ours}")
        if callback is not None and "callback_on_step_end" in options:
            raise UsageError("give either callback or callback_on_step_end")
        accepted = {
            *inspect.signature(self.pipeline.__call__).parameters,
            *inspect.signature(self.pipeline.encode_prompt).parameters,
        }
        if unknown := sorted(set(options) - accepted):
            raise UsageError(f"{type(self.pipeline).__name__} has no option {unknown[0]!r}")
        _check_tokens(options, guided=guided)
        return dict(options)

    def _told(self, callback: Callable[[Progress], None] | None) -> dict[str, Any]:
        """The pipeline's way to call us back after each step."""
        if callback is None:
            return {}

        def tell(step: int, timestep: Any, latents: Tensor) -> None:
            callback(Progress(step, float(timestep), *self._by_kind(latents)))

        def at_step_end(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            tell(step, timestep, tensors["latents"])
            return {}

        if "callback_on_step_end" in inspect.signature(self.pipeline.__call__).parameters:
            return {"callback_on_step_end": at_step_end}
        return {"callback": tell, "callback_steps": 1}

    def _timesteps(self, steps: int, options: Mapping[str, Any]) -> list[float]:
        """The timesteps of the whole run, as the pipeline is going to set them."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        if options.get("timesteps") is not None:
            scheduler.set_timesteps(timesteps=options["timesteps"])
        elif options.get("sigmas") is not None:
            scheduler.set_timesteps(sigmas=options["sigmas"])
        else:
            scheduler.set_timesteps(steps)
        return [float(t) for t in scheduler.timesteps]

    @contextmanager
    def _using(self, name: str | None) -> Iterator[None]:
        """For one call, another scheduler with the configuration of the pipeline's own."""
        before = self.pipeline.scheduler
        used = type(before).__name__ if name is None else SCHEDULERS.get(name, name)
        if "SDE" in used:
            raise UsageError(
                f"{used} draws one noise for the whole batch, so an image would depend on its neighbours; "
                "use euler-a, or dpm++ with algorithm_type sde-dpmsolver++"
            )
        if name is not None:
            kind = getattr(diffusers, used, None)
            if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
                raise UsageError(f"there is no scheduler {name!r}; use one of {', '.join(SCHEDULERS)}, or a class name")
            self.pipeline.scheduler = kind.from_config(before.config)
        try:
            yield
        finally:
            self.pipeline.scheduler = before

    @contextmanager
    def _knowing(self, known: Known | None, noise: Tensor, hold: Hold | None) -> Iterator[None]:
        """For one call, the known part of the streams held."""
        if known is None:
            yield
            return
        hook = KnownStreams(known, noise, self.pipeline.scheduler, hold or self._usual_hold())
        handle = self.denoiser.network.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _usual_hold(self) -> Hold:
        """How the run was trained to see a stream that is known: clean, if it has seen streams at different timesteps."""
        training = self.run.manifest.training
        return "clean" if training.get("known_stream") or training.get("independent_timesteps") else "noised"

    def _placed_vae(self) -> Any:
        return self.vae.to(get_module_execution_device(self.pipeline.vae))

    def _settings(self, schedule: Schedule, size: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Any]:
        scheduler, manifest = self.pipeline.scheduler, self.run.manifest
        kept = {name: value for name, value in options.items() if isinstance(value, str | int | float | bool | None)}
        return {
            "base": {"name": self.base.name, "architecture": self.base.architecture},
            "run": {"name": self.run.url, "files": manifest.files},
            "pipeline": type(self.pipeline).__name__,
            "height": size[0],
            "width": size[1],
            "schedule": schedule.to_dict(),
            "scheduler": {"class": type(scheduler).__name__, "config": _plain(dict(scheduler.config))},
            "options": kept,
            "not_kept": sorted(set(options) - set(kept)),
            "dtype": str(next(self.denoiser.network.parameters()).dtype).removeprefix("torch."),
            "device": get_module_execution_device(self.denoiser.network).type,
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        }


_REMEMBERED = ("negative_prompt", "steps", "guidance", "intrinsics")

_OURS = {
    "num_images_per_prompt": "pass several seeds instead",
    "generator": "pass seeds instead",
    "latents": "both streams start from the noise of the seed",
    "output_type": "the result holds images, maps and latents",
    "return_dict": "the result is a Generated",
    "height": "pass size=(height, width)",
    "width": "pass size=(height, width)",
    "num_inference_steps": "pass steps",
    "guidance_scale": "pass guidance",
    "use_resolution_binning": "the size is taken as it is, so that the maps fit the image; pass one of the base's own",
}


def _check_tokens(options: Mapping[str, Any], *, guided: bool) -> None:
    """UsageError for options that would bring rows or tokens of their own where the streams' batch has none for them."""
    if "gligen" in (options.get("cross_attention_kwargs") or {}):
        raise UsageError(
            "cross_attention_kwargs: gligen puts boxes into the self-attention, which joint attention has taken"
        )
    rows = 2 if guided else 1
    for embeds in options.get("ip_adapter_image_embeds") or ():
        if len(embeds) != rows:
            raise UsageError(
                f"ip_adapter_image_embeds have {len(embeds)} rows: the pipeline repeats them for every image, so give "
                f"{'two, negative and positive' if guided else 'one'}; for an image prompt of each image call once for each"
            )


def _with_defaults(saved: StageMap, own: StageMap) -> StageMap:
    """The run's stage map, with this base's default schedules where it is the base's own map."""
    return own if saved.prefixes == own.prefixes else saved


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration in JSON types, without diffusers' bookkeeping."""
    return {k: v for k, v in config.items() if isinstance(v, str | int | float | bool | list | None) and k[0] != "_"}
