"""A stock diffusers network made to denoise several streams at once, image and intrinsics, and put back again.

    denoiser = JointDenoiser.install(pipeline.unet, lora=read_lora("run/lora.safetensors"))
    denoiser.prepare(images=B, schedule=Gaussian(), timesteps=..., intrinsics=False)
    ... the stock pipeline, with batches of G * S * B rows: G guidance halves, S = 2 streams, B images ...
    denoiser.uninstall()

install() puts our attention processor on every self-attention layer, and wraps the network's forward, which tells the
processors the weight w(l, t) of their stage. Everything else in these networks treats each row of the batch by itself, so
the streams meet in self-attention only. Nothing is left to chance: a processor that is gone, or one that is called
without the wrapper, is an error.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, update_wrapper
from typing import Any

import torch
import torch._dynamo
from diffusers.models.attention_processor import Attention
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from infer.model.context import ContextSlot, ForwardContext, LayerContext, Record, ReplayInContext
from infer.model.exclusive import Exclusive
from infer.model.lora import TARGETS, LoraWeights, StreamLinear, adapter_layers, confine, release
from infer.model.processor import JointProcessor, self_attention_layers
from infer.model.schedules import Joint, Schedule
from infer.model.stages import StageMap, stage_map_of
from shards.core.errors import UserError


@dataclass(frozen=True)
class AttentionShare:
    """How much of its attention the image paid to the intrinsics in one layer at one step."""

    timestep: float | tuple[float, ...]  # one, or one per pair (G * B)
    layer: str
    stage: int
    value: Tensor  # float32: (G, B), the mean over heads and queries; or (G, B, N), the mean over heads ("map")


BATCHES = 8
"""For so many kinds of batches a network is compiled; each takes seconds to minutes."""
RECOMPILES = 64
"""Of one function: kinds of batches, times kinds of weights (0, 1, fractional, image alone), times widths of layers."""


class EachBatchAlone:
    """While a network runs that may be compiled, by whatever way: its sizes are constants.

    With symbolic numbers of rows and images, which torch takes by itself at the second size, its solver never comes back.
    """

    @torch.compiler.disable
    def __enter__(self) -> None:
        _constant_sizes().__enter__()

    @torch.compiler.disable
    def __exit__(self, *error: object) -> None:
        _constant_sizes().__exit__(*error)


@cache
def _constant_sizes() -> Any:
    """One for all: settings are of the thread that enters, and each patch that is made leaves something behind in it."""
    config = torch._dynamo.config
    return config.patch(automatic_dynamic_shapes=False, recompile_limit=max(RECOMPILES, config.recompile_limit))


class JointForward:
    """What stands in the place of the network's forward. Copied with its network, it runs the copy, not the original."""

    def __init__(self, denoiser: "JointDenoiser", forward: Callable[..., Any]) -> None:
        update_wrapper(self, forward)
        self.denoiser = denoiser

    # Under torch.compile(network) our bookkeeping stays in Python, and the network inside is compiled
    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.denoiser._run(*args, **kwargs)


class JointDenoiser:
    """A network with joint attention installed. Made by install(); one per network.

    A copy of the network (copy.deepcopy, an average of weights) has a denoiser of its own, JointDenoiser.of(copy).
    """

    def __init__(self, network: nn.Module, stages: StageMap, processors: dict[str, JointProcessor], streams: int):
        self.network, self.stages, self.processors, self.slot = network, stages, processors, ContextSlot()
        self.streams = streams
        self.schedule: Schedule = Joint()
        self.images: int | None = None
        self.record: Record | None = None
        self.shares: list[AttentionShare] = []
        self.busy = Exclusive()
        self._originals: dict[str, Any] = {}
        self._stock_forward: Callable[..., Any] = network.forward
        self._forward = self._stock_forward  # or its compiled form
        self._compiled: dict[str, Any] | None = None  # the options of compile()
        self._batches: set[Any] = set()  # the kinds of batches that it was compiled for
        self._noted = False
        self._wrapper: JointForward | None = None
        self._frozen: list[tuple[nn.Parameter, bool]] = []
        self._last_active: float | None = None  # image only below this timestep; None: never
        self._dropped = False

    @classmethod
    def install(
        cls,
        network: nn.Module,
        *,
        stages: StageMap | None = None,
        lora: LoraWeights | None = None,
        rank: int = 0,
        alpha: float | None = None,
        targets: Sequence[str] = tuple(TARGETS),
        dtype: torch.dtype | None = None,
        streams: int = 2,
    ) -> "JointDenoiser":
        """Put joint attention on every self-attention layer of a U-Net or PixArt transformer.

        stages: the stage map, the network's own by default. lora: trained adapters, which set rank, alpha and targets;
        without it `rank` (0: no adapters) makes untrained ones on `targets` (of q, k, v, out), whose output is the base's.
        dtype: of the adapters, the network's by default. streams: S, the image's and the intrinsics' (one unless told more);
        all intrinsic streams together have adapters of `rank`, each an equal part.
        Raises UserError if it is installed already, the stage map misses a layer, or `lora` does not fit.
        """
        if hasattr(network, "_orig_mod") or network._compiled_call_impl is not None:
            raise UserError("the network is compiled already: install joint attention first, then compile.")
        network = network.get_base_model() if isinstance(network, PeftModel) else network
        layers = self_attention_layers(network)
        if any(isinstance(module.processor, JointProcessor) for module in layers.values()):
            raise UserError(
                f"joint attention is already installed on this {type(network).__name__}: uninstall it first."
            )
        for name, module in layers.items():
            if ".fuser." in name:
                raise UserError(
                    f"layer {name} puts boxes into the self-attention (GLIGEN): joint attention knows no such."
                )
            if module.added_kv_proj_dim is not None:
                raise UserError(
                    f"layer {name} mixes text into its self-attention: joint attention does not know such a base."
                )
        if lora is not None:
            rank, alpha, targets = lora.rank, lora.alpha, lora.targets
        if unknown := set(targets) - set(TARGETS):
            raise UserError(f"LoRA target {sorted(unknown)[0]!r} is not one of {', '.join(TARGETS)}.")
        stages = stages or stage_map_of(network)
        numbers = stages.of(layers)
        processors = {
            name: JointProcessor(name, numbers[name], _adapters(module, rank, alpha, targets, dtype, streams))
            for name, module in layers.items()
        }
        self = cls(network, stages, processors, streams)
        if lora is not None:
            self.load_lora(lora)
        self._install(layers)
        return self

    def _install(self, layers: dict[str, Attention]) -> None:
        for name, module in layers.items():
            self._originals[name] = module.processor
            module.processor = self.processors[name]  # type: ignore[assignment]
        self._instance_forward = self.network.__dict__.get("forward")
        self._signature = inspect.signature(self._forward)
        self._wrapper = JointForward(self, self._forward)
        self.network.forward = self._wrapper

    @staticmethod
    def of(network: nn.Module) -> "JointDenoiser | None":
        """The denoiser that is installed on a network, or came with it when it was copied."""
        forwards = (network.__dict__.get(name) for name in ("forward", "_old_forward"))
        return next((forward.denoiser for forward in forwards if isinstance(forward, JointForward)), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "JointDenoiser":
        """With the copy of its network. Compiled code holds the original's weights: the copy's is compiled anew."""
        made = object.__new__(type(self))
        memo[id(self)] = made
        for name, value in self.__dict__.items():
            if name != "_forward":
                setattr(made, name, copy.deepcopy(value, memo))
        made._forward = made._stock_forward
        if made._compiled is not None:
            made.compile(**made._compiled)
        return made

    def uninstall(self) -> None:
        """Restore the network exactly: processors, forward, trainable flags, other people's adapters on every row."""
        for name, attn in self_attention_layers(self.network).items():
            if isinstance(attn.processor, JointProcessor):
                attn._modules.pop("processor")
                attn.processor = self._originals[name]
        for layer in adapter_layers(self.network).values():
            release(layer)
        for module in self.network.modules():
            recall = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(recall, ReplayInContext):
                module._gradient_checkpointing_func = recall.original  # type: ignore[assignment]
        for parameter, before in self._frozen:
            parameter.requires_grad_(before)
        if self.network.__dict__.get("_old_forward") is self._wrapper:  # an offload hook sits on top of ours
            self.network._old_forward = self._stock_forward  # type: ignore[assignment]
        elif self.network.__dict__.get("forward") is self._wrapper:
            del self.network.__dict__["forward"]
            if self._instance_forward is not None:
                self.network.__dict__["forward"] = self._instance_forward

    def prepare(
        self,
        images: int,
        schedule: Schedule | None = None,
        *,
        timesteps: Iterable[float] | None = None,
        intrinsics: bool = True,
        record: Record | None = None,
    ) -> None:
        """Tell the network what the next forwards are: B images per guidance half, and the schedule (default: as before).

        intrinsics=False: only the image is wanted, so its rows are run alone from the step on after which all weights are
        0 (`timesteps`, the whole run's, must be given); the intrinsics' rows of the output are then the image's.
        record: keep attention shares in self.shares, emptied here: "mean" over heads and queries, or a "map" per query.
        """
        if images < 1:
            raise UserError(f"joint attention was told {images} images: there must be at least one.")
        self.images, self.record, self.shares = images, record, []
        self.schedule = schedule or self.schedule
        self._last_active, self._dropped = None, False
        if not intrinsics:
            if timesteps is None:
                raise UserError(
                    "dropping the intrinsic stream needs the run's timesteps: pass timesteps=scheduler.timesteps."
                )
            times = [float(t) for t in timesteps]
            active = [t for t in times if any(self.schedule.at(t, self.stages.stages))]
            self._last_active = min(active, default=float("inf"))

    def check(self) -> int:
        """UserError unless our processor is on every self-attention layer; returns their number."""
        layers = self_attention_layers(self.network)
        wrong = [name for name, module in layers.items() if module.processor is not self.processors.get(name)]
        if wrong or len(layers) != len(self.processors):
            raise UserError(
                f"joint attention is on {len(layers) - len(wrong)} of {len(layers)} self-attention layers"
                f"{' (missing on ' + wrong[0] + ')' if wrong else ''}: something replaced it; uninstall and install it again."
            )
        return len(layers)

    def compile(self, **options: Any) -> None:
        """torch.compile the network inside the wrapper; options as torch.compile takes them, but for dynamic.

        The first batch of a kind (number of images, size, guidance on or off) compiles; of kinds there may be BATCHES.
        """
        if options.setdefault("dynamic", False):
            raise UserError("joint attention is compiled for each kind of batch alone: leave out dynamic.")
        self._compiled, self._batches, self._noted = options, set(), False
        self._forward = torch.compile(self._stock_forward, **options)

    def freeze(self) -> list[nn.Parameter]:
        """For training: only the adapters learn, until uninstall(). Returns lora_parameters().

        Not done by install(): torch picks another kernel for weights that need no gradient, and so rounds differently.
        """
        adapters = set(self.lora_parameters())
        self._frozen = [(p, p.requires_grad) for p in self.network.parameters() if p not in adapters]
        for parameter, _ in self._frozen:
            parameter.requires_grad_(False)
        return self.lora_parameters()

    def lora_parameters(self) -> list[nn.Parameter]:
        """The adapters' weights, in a fixed order: all that training may change."""
        return [p for name in self.processors for p in self.processors[name].adapters.parameters()]

    def lora_weights(self) -> LoraWeights:
        """The adapters under peft's keys (the live tensors, not copies)."""
        adapters = list(self._adapters())
        if not adapters:
            raise UserError("there are no adapters to save: install joint attention with rank > 0.")
        tensors: dict[str, Tensor] = {}
        for key, adapter in adapters:
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = adapter.down, adapter.up
        return LoraWeights(tensors, adapters[0][1].rank, adapters[0][1].alpha)

    def load_lora(self, weights: LoraWeights) -> None:
        """Copy trained adapters in. UserError unless keys and shapes are exactly those of this network."""
        mine = {f"{key}.lora_{half}.weight" for key, _ in self._adapters() for half in "AB"}
        if odd := sorted(mine ^ weights.tensors.keys()):
            where = "lacks" if odd[0] in mine else "has a layer unknown to the base,"
            raise UserError(f"the LoRA does not fit {type(self.network).__name__}: it {where} {odd[0]}.")
        for key, adapter in self._adapters():
            for half, parameter in (("A", adapter.down), ("B", adapter.up)):
                tensor = weights.tensors[f"{key}.lora_{half}.weight"]
                if tensor.shape != parameter.shape:
                    raise UserError(
                        f"the LoRA does not fit: {key} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}."
                    )
                with torch.no_grad():
                    parameter.copy_(tensor)
            adapter.alpha = weights.alpha

    def _adapters(self) -> Iterator[tuple[str, StreamLinear]]:
        for name, processor in self.processors.items():
            for target, adapter in processor.adapters.items():
                yield f"{name}.{TARGETS[target]}", adapter  # type: ignore[misc]

    @torch.compiler.disable(recursive=False)
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped forward: all streams, or the image's rows alone."""
        context, timestep, args, kwargs = self._plan(args, kwargs)
        forward = self._chosen_forward(context, args, kwargs)
        with context, EachBatchAlone():
            output = forward(*args, **kwargs)
        if context.streams == 1:
            return _all_rows(output, self.streams, context.images)
        return self._keep_shares(context, timestep, output)

    @torch.compiler.disable
    def _chosen_forward(self, context: ForwardContext, args: Any, kwargs: Any) -> Callable[..., Any]:
        """The compiled form, for as many kinds of batches as BATCHES; for further ones the stock forward, with a note."""
        if self._compiled is None:
            return self._forward
        shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        batch = (context.guidance, context.streams, context.images, shapes)
        if batch in self._batches or len(self._batches) < BATCHES:
            self._batches.add(batch)
            return self._forward
        if not self._noted:
            self._noted = True
            print(
                f"note: joint attention is compiled for {BATCHES} kinds of batches; those of other sizes or numbers of images "
                "run without compilation",
                file=sys.stderr,
            )
        return self._stock_forward

    @torch.compiler.disable
    def _plan(self, args: Any, kwargs: Any) -> tuple[ForwardContext, float | tuple[float, ...], Any, Any]:
        """Check that all is in place, look up w(l, t), and choose the rows to run."""
        self.busy.check()
        self.check()
        self._confine()
        if self.images is None:
            raise UserError(
                "the joint network was not told how many images a batch holds: call prepare(images=...) first."
            )
        arguments = self._signature.bind(*args, **kwargs).arguments
        sample = next(iter(arguments.values()))
        rows = sample.shape[0]
        if rows % (self.streams * self.images):
            raise UserError(
                f"the batch has {rows} rows, which is not guidance x {self.streams} streams x {self.images} images."
            )
        times = self._times(arguments["timestep"], rows)
        weights = [self.schedule.at(t, self.stages.stages) for t in times]
        timestep = times[0] if len(times) == 1 else tuple(times)
        if self._image_only(times, weights):
            return (
                self._context(rows, 1, [0] * self.stages.stages),
                timestep,
                *_image_rows((args, kwargs), rows, self.streams, self.images),
            )
        if torch.is_grad_enabled():
            self._remember_in_checkpoints()
        return self._context(rows, self.streams, _stage_weights(weights, sample.device)), timestep, args, kwargs

    def _times(self, timestep: Any, rows: int) -> list[float]:
        """The batch's timestep; where the rows differ, one for each pair (G * B), that of its unknown streams."""
        if self.schedule.constant and self._last_active is None and self.record is None:
            return [0.0]  # it does not matter; no need to wait for the device
        times = torch.as_tensor(timestep).reshape(-1)
        if len(times) == rows:
            assert self.images is not None
            by_stream = times.unflatten(0, (-1, self.streams, self.images))  # (G, S, B)
            times = by_stream.amax(dim=1).reshape(-1)
            if not ((by_stream == times.view(-1, 1, self.images)) | (by_stream == 0)).all():
                raise UserError(
                    "the streams of a pair have different timesteps: give both the same, or 0 to one that is known."
                )
        elif len(times) != 1:
            raise UserError(f"there are {len(times)} timesteps for {rows} rows: give one, or one for each row.")
        values = times.tolist()
        return values[:1] if len(set(values)) == 1 else values

    def _context(self, rows: int, streams: int, weights: Sequence[float | Tensor]) -> ForwardContext:
        """weights: by stage - 1."""
        assert self.images is not None
        layers = [
            (processor, LayerContext(self.images, streams, weights[processor.stage - 1], self.record))
            for processor in self.processors.values()
        ]
        return ForwardContext(self.slot, rows // (self.streams * self.images), streams, self.images, layers)

    def _image_only(self, times: list[float], weights: list[tuple[float, ...]]) -> bool:
        if self._last_active is None:
            return False
        over = max(times) < self._last_active and not any(map(any, weights))
        if self._dropped and not over:
            raise UserError(
                f"timestep {times[0]} needs the intrinsic stream, which was dropped: call prepare() for a new run."
            )
        self._dropped = over
        return over

    @torch.compiler.disable
    def _keep_shares(self, context: ForwardContext, timestep: float | tuple[float, ...], output: Any) -> Any:
        for processor, layer in context.layers:
            if layer.share is not None:
                value = layer.share.detach().unflatten(0, (-1, context.images)).clone()
                self.shares.append(AttentionShare(timestep, processor.layer, processor.stage, value))
        return output

    def _remember_in_checkpoints(self) -> None:
        """Activation checkpoints run blocks again in backward: make them do so in the context of their forward."""
        for module in self.network.modules():
            function: Any = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(module, "gradient_checkpointing", False) and not isinstance(function, ReplayInContext):
                module._gradient_checkpointing_func = ReplayInContext(function, self.slot)  # type: ignore[assignment]

    def _confine(self) -> None:
        """Other people's adapters: on the image's rows only."""
        if not getattr(self.network, "peft_config", None):
            return
        for name, layer in adapter_layers(self.network).items():
            if layer.merged:
                raise UserError(
                    f"a LoRA is fused into {name}, where it acts on the intrinsics too: call unfuse_lora() first."
                )
            confine(layer, self.slot.layout)


def _adapters(
    attn: Attention,
    rank: int,
    alpha: float | None,
    targets: Sequence[str],
    dtype: torch.dtype | None,
    streams: int,
) -> dict[str, StreamLinear]:
    def base(path: str) -> nn.Linear:
        layer: Any = attn.get_submodule(path)
        return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer

    return (
        {t: StreamLinear(base(path), rank, alpha, dtype, streams) for t, path in TARGETS.items() if t in targets}
        if rank
        else {}
    )


def _stage_weights(weights: list[tuple[float, ...]], device: torch.device) -> list[float | Tensor]:
    """For each stage the number 0 or 1 where all rows have that weight, else a float32 tensor () or (P,).

    Numbers as int: torch.compile keeps 0 and 1 apart as constants, and takes floats for variables.
    """
    made: list[float | Tensor] = []
    mixed: Tensor | None = None  # put on the device only where it is needed
    for i, stage in enumerate(zip(*weights, strict=True)):
        if set(stage) in ({0.0}, {1.0}):
            made.append(int(stage[0]))
            continue
        if mixed is None:
            values = torch.tensor(weights, dtype=torch.float32).T  # (stages, 1 or P)
            mixed = (values[:, 0] if len(weights) == 1 else values).to(device)
        made.append(mixed[i])
    return made


@torch.compiler.disable
def _all_rows(output: Any, streams: int, images: int) -> Any:
    """(G*B, ...) image rows -> (G*S*B, ...), the intrinsics' rows being the image's: finite, and never looked at."""

    def widen(y: Tensor) -> Tensor:
        return y.unflatten(0, (-1, 1, images)).expand(-1, streams, *([-1] * y.ndim)).flatten(0, 2)

    if isinstance(output, tuple):
        return (widen(output[0]), *output[1:])
    return type(output)(sample=widen(output.sample))


def _image_rows(tree: Any, rows: int, streams: int, images: int) -> Any:
    """The image's rows of every batched tensor in arguments: (G*S*B, ...) -> (G*B, ...)."""

    def pick(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == rows:
            # laid out as the stock batch is: in half precision kernels round differently for other strides
            return leaf.unflatten(0, (-1, streams, images))[:, 0].flatten(0, 1).contiguous()
        return leaf

    return tree_map(pick, tree)
