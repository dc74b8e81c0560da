"""What the tests of training share: a tiny dataset, small configurations, and runs in forked processes that can be killed."""

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from shards.intrinsics import INTRINSICS, IntrinsicMap, encode_png
from shards.stream.order import Sampler
from tests.support import labelled
from train.config import LoopConfig, TrainConfig, load_train_config
from train.data import Batch, Samples
from train.engine import Outcome, Validation, make_accelerator, train
from train.identity import Identity

SMALL = (
    "data.size_px=32",
    "data.held_out=0.3",
    "data.validation=2",
    "vae.loop.batch=2",
    "vae.loop.accumulate=2",
    "vae.loop.steps=5",
    "vae.loop.warmup=2",
    "vae.loop.checkpoint_every=2",
    "vae.loop.validate_every=100",
    "vae.loop.sheets=0",
    "lora.loop.batch=2",
    "lora.loop.accumulate=2",
    "lora.loop.steps=5",
    "lora.loop.warmup=2",
    "lora.loop.checkpoint_every=2",
    "lora.loop.validate_every=100",
    "lora.loop.sheets=0",
    "lora.rank=2",
)


def scene(number: int, size: int = 16) -> dict[str, IntrinsicMap]:
    """Maps of noise in blocks, with sky, invalid pixels and lines; every number another."""
    rng = np.random.default_rng(number)
    depth = rng.uniform(1, 9, (size, size)).astype(np.float32)
    depth[0], depth[1, :3] = np.inf, np.nan
    normal = rng.normal(size=(size, size, 3)).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    normal[0] = np.nan
    ids = np.kron(rng.permutation(4).reshape(2, 2), np.ones((size // 2, size // 2))).astype(np.uint16)
    line = (rng.random((size, size)) < 0.1).astype(np.float32)
    return {
        "depth": IntrinsicMap(depth, {"kind": "metric"}),
        "normal": IntrinsicMap(normal),
        "segmentation": IntrinsicMap(ids),
        "line": IntrinsicMap(line),
    }


def write_scenes(path: Path, shards: int = 3, per_shard: int = 5) -> str:
    """A dataset of noise; its address."""

    def change(key: str, members: dict[str, bytes]) -> dict[str, bytes]:
        number = int(key[1]) * 100 + int(key[3:])
        image = np.random.default_rng(number).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        made = labelled.members_of(f"a ball left of box {number}", image={"size": [16, 16]})
        made |= {"png": encode_png(image)}
        for name, item in scene(number).items():
            made[INTRINSICS[name].member] = INTRINSICS[name].encode(item)[0]
        return made

    return labelled.write_dataset(path, shards=shards, per_shard=per_shard, change=change).url


def config_of(shards: str, base: str, out: Path, *settings: str) -> TrainConfig:
    """The demo recipe made small, begun anew."""
    return load_train_config("demo", base=base, shards=[shards], out=str(out), start="", settings=[*SMALL, *settings])


# ---- a stage that costs nothing --------------------------------------------------------------------------------------


@dataclass
class Averages:
    """A stage for tests of the engine: a linear map from the means of the packed channels to those of the image.

    Every sample that it sees is written to `seen` as "POSITION KEY". poison: a key whose loss is NaN. hook: called at
    each forward.
    """

    seen: Path | None = None
    poison: str = ""
    hook: Callable[[], None] | None = None
    name: str = "averages"
    module: nn.Module = field(default_factory=lambda: torch.manual_seed(0) and nn.Linear(8, 3))

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def draw(self, positions: Sequence[int]) -> list[int]:
        return list(positions)

    def losses(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert batch.drawn == [sample.position for sample in batch.samples], "drawn for other samples"
        if self.seen is not None:
            with self.seen.open("a") as file:
                file.writelines(f"{sample.position} {sample.key}\n" for sample in batch.samples)
        if self.hook is not None:
            self.hook()
        made = module(batch.packed().mean(dim=(2, 3)))
        loss = (made - batch.image().mean(dim=(2, 3))).square().mean(dim=1)
        poison = torch.tensor([torch.nan if key == self.poison else 1.0 for key in batch.keys])
        return {"loss": loss * poison}

    def validate(self, sheets: int) -> Validation:
        return Validation(float(sum(p.detach().square().sum() for p in self.module.parameters())), {})


def run_averages(
    shards: str, folder: Path, task: Averages, *, identity: Identity | None = None, finish: Any = None, **loop: Any
) -> Outcome:
    """Trains `task` in this process (or in the group that its environment names)."""
    settings: dict[str, Any] = {"steps": 6, "batch": 2, "learning_rate": 0.1, "checkpoint_every": 2}
    config = config_of(shards, "none", folder, "data.memory_gb=0", "data.workers=0")
    return train(
        task,
        LoopConfig(**(settings | {"validate_every": 100} | loop)),
        Samples(config.shards, config.data, seed=0),
        accelerator=make_accelerator(),
        folder=folder,
        identity=identity or Identity(settings={"batch": 1}),
        seed=0,
        finish=finish or (lambda average, step: None),
    )


# ---- processes -------------------------------------------------------------------------------------------------------


def die_at_forward(number: int) -> None:
    """Kills this process, as kill -9 does, when for the number-th time a module without a parent's help is called."""
    calls = {"count": 0}

    def count(module: nn.Module, _: Any) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            calls["count"] += 1
            if calls["count"] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    register_module_forward_pre_hook(count)


def _child(target: Callable[..., Any], args: tuple[Any, ...], rank: int, world: int, port: int, log: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    try:
        target(*args, rank)
    except BaseException:
        Path(log).write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def in_processes(target: Callable[..., Any], *args: Any, world: int = 1, log: Path) -> list[int]:
    """Runs target(*args, rank) in `world` forked processes of one group; returns their exit statuses.

    When one dies, the others are killed, as a launcher does. log: where a traceback goes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(target=_child, args=(target, args, rank, world, port, f"{log}-{rank}")) for rank in range(world)
    ]
    for child in children:
        child.start()
    while any(child.is_alive() for child in children):
        for child in children:
            child.join(0.05)
        if any(child.exitcode not in (None, 0) for child in children):
            for child in children:
                child.kill()
    return [int(child.exitcode or 0) for child in children]


def seen_keys(path: Path) -> dict[int, str]:
    """Position -> key, of what Averages wrote; later lines win."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return {int(position): key for position, key in lines}


def positions_of(samples: Samples, count: int) -> dict[int, str]:
    """Position -> key as the index has it."""
    sampler = Sampler(batch=1, samples=count)
    return {positions[0]: samples.stream.key(positions[0]) for positions in sampler}
