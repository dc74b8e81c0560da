"""Many images: jobs with stable keys, painted in batches by one process or by Ray workers, always in the jobs' order."""

import re
import shlex
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from infer.bases.files import split_base
from infer.condition import HOLDS, Given, Hold
from infer.content import of_embeddings, of_model, of_sample, sha256_of
from infer.embedded import GUIDANCE
from infer.model.schedules import Table, is_table
from infer.outputs import extra_files, maker, read_given, read_image, sample_members
from infer.sampler import CoGenerator
from shards.core.errors import UsageError, UserError
from shards.marks import digest

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of every image of a command; small and picklable. Paths and names are as on the command line."""

    base: str
    run: str
    negative: str | None = None
    size: tuple[int, int] | None = None  # (height, width)
    steps: int = 25
    guidance: float = GUIDANCE
    schedule: str = "gaussian"
    scheduler: str | None = None
    intrinsics: bool = True
    compare: bool = False
    shares: bool = False
    image: str | None = None
    repaint: str | None = None
    given: str | None = None
    given_maps: tuple[str, ...] = ()
    repaint_maps: str | None = None
    hold: Hold | None = None
    device: str | None = None
    dtype: str | None = None
    other_weights: bool = False
    variant: str | None = None
    base_config: str | None = None
    embeddings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        if self.steps < 1:
            raise UsageError(f"--steps {self.steps}: at least one step is needed")
        if self.hold not in (None, *HOLDS):
            raise UsageError(f"--hold {self.hold} is not one of {', '.join(HOLDS)}")
        if self.hold and not (self.image or self.given):
            raise UsageError("--hold says how what is given is seen: it goes with --image or --given")
        if (self.repaint and not self.image) or (self.repaint_maps and not self.given):
            raise UsageError("a mask needs what it masks: --mask goes with --image, --mask-maps with --given")

    def described(self) -> dict[str, Any]:
        """For keys and datasets. Options that came later are left out while they are not used, so that keys stay."""
        return {name: value for name, value in asdict(self).items() if value or name not in LATER}


LATER = ("hold", "variant", "base_config", "embeddings")
"""Options that came later than the first datasets: what does not use them has the key that it had."""


def command(request: Request, job: "Job") -> str:
    """The command line that makes this one image again."""
    words = ["python", "-m", "infer", "sample", "--prompt", job.prompt, "--seed", str(job.seed)]
    for name, value in asdict(request).items():
        option = {"repaint": "--mask", "repaint_maps": "--mask-maps"}.get(name, f"--{name.replace('_', '-')}")
        if name == "intrinsics":
            words += [] if value else ["--no-intrinsics"]
        elif name == "size" and value:
            words += [option, f"{value[1]}x{value[0]}"]
        elif isinstance(value, bool):
            words += [option] if value else []
        elif name == "embeddings":
            words += [word for embedding in value for word in ("--embedding", embedding)]
        elif isinstance(value, tuple):
            words += [option, ",".join(value)] if value else []
        elif value is not None:
            words += [option, str(value)]
    return shlex.join(words)


@dataclass(frozen=True)
class Job:
    """One image. key: readable, stable, and another one for anything that would change the image."""

    key: str
    prompt: str
    seed: int


def jobs_for(request: Request, run_id: str, prompts: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Every prompt with every seed. run_id: the run's fingerprint. A prompt that comes twice is made once.

    Raises UserError for a file that is not there: keys are of contents, so that an edited file is never taken for the old one.
    """
    asked = request.described() | {"run": run_id, "device": None, "compare": False, "shares": False}
    asked |= _contents(request)
    jobs: dict[str, Job] = {}
    for prompt in prompts:
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "image"
        for seed in seeds:
            key = f"{slug}-{seed}-{digest(asked | {'prompt': prompt, 'seed': seed})[:8]}"
            jobs[key] = Job(key, prompt, seed)
    return list(jobs.values())


def _contents(request: Request) -> dict[str, Any]:
    """What the files hold that the request names."""
    base, _, config = split_base(request.base)
    found: dict[str, Any] = {"base": request.base.replace(base, of_model(base), 1)}
    if is_table(request.schedule):
        found["schedule"] = Table.load(request.schedule).to_dict()
    for name in ("image", "repaint", "repaint_maps"):
        if (path := getattr(request, name)) is not None:
            found[name] = sha256_of(path)
    if request.given is not None:
        found["given"] = of_sample(request.given)
    if config := request.base_config or config:
        found["base_config"] = of_model(config)
    if request.embeddings:
        found["embeddings"] = of_embeddings(request.embeddings)
    return found


@dataclass(frozen=True)
class SampleFiles:
    """The files of one job: the sample's members by name, and what goes beside them."""

    key: str
    members: dict[str, bytes]
    extras: dict[str, bytes]


class SamplerWorker:
    """Works on jobs, in this process or as a Ray actor; loads the models with its first job."""

    def __init__(self, request: Request, threads: int | None = None) -> None:
        self._request, self._threads = request, threads

    @cached_property
    def _generator(self) -> CoGenerator:
        if self._threads:
            torch.set_num_threads(self._threads)
        for library in (diffusers, transformers):  # the command line has a progress bar of its own
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        request = self._request
        dtype = DTYPES[request.dtype] if request.dtype else None
        generator = CoGenerator.from_pretrained(
            request.base,
            request.run,
            device=request.device,
            dtype=dtype,
            other_weights=request.other_weights,
            variant=request.variant,
            base_config=request.base_config,
            embeddings=request.embeddings,
        )
        generator.pipeline.set_progress_bar_config(disable=True)
        return generator

    @cached_property
    def _given(self) -> Given | None:
        request = self._request
        if not request.image and not request.given:
            return None
        return Given(
            image=read_image(Path(request.image)) if request.image else None,
            maps=read_given(request.given, request.given_maps) if request.given else {},
            repaint_image=_mask(request.repaint),
            repaint_maps=_mask(request.repaint_maps),
        )

    def paint(self, jobs: Sequence[Job]) -> list[SampleFiles]:
        """All files of these jobs, made as one batch."""
        asked: dict[str, Any] = {
            "prompt": [job.prompt for job in jobs],
            "seeds": [job.seed for job in jobs],
            "negative_prompt": self._request.negative,
            "size": self._request.size,
            "steps": self._request.steps,
            "guidance": self._request.guidance,
            "scheduler": self._request.scheduler,
        }
        made = self._generator(
            **asked,
            schedule=self._request.schedule,
            intrinsics=self._request.intrinsics,
            shares=self._request.shares,
            given=self._given,
            hold=self._request.hold,
        )
        bases: list[Any] = [None] * len(jobs)
        if self._request.compare:
            bases = self._generator(**asked, schedule="off", intrinsics=False).images
        painted, by = [], maker(self._generator.run.manifest)["id"]
        for i, job in enumerate(jobs):
            repeat = {"command": command(self._request, job), **made.settings}
            about = {"prompt": job.prompt, "seed": job.seed, "generated": repeat}
            members = sample_members(made, i, about, by)
            painted.append(SampleFiles(job.key, members, extra_files(made, i, bases[i])))
        return painted


def _mask(path: str | None) -> np.ndarray | None:
    return None if path is None else np.asarray(read_image(Path(path), "L")) > 127


def sample_all(
    request: Request, jobs: Sequence[Job], *, batch: int, workers: int, address: str = "local"
) -> Iterator[SampleFiles]:
    """Paints the jobs, in order. workers: 1 in this process, more as Ray actors (a GPU each, where the device is cuda).

    The result does not depend on the number of workers. A worker that dies is started again, and its batch repeated.
    """
    batches = [jobs[i : i + batch] for i in range(0, len(jobs), batch)]
    if workers <= 1:
        painter = SamplerWorker(request)
        for part in batches:
            yield from painter.paint(part)
        return
    import ray  # which one process does not need
    from ray.exceptions import RayTaskError

    from extract.workers.cluster import connected

    on_gpu = (request.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    with connected(address, workers):
        actor = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0, max_restarts=3, max_task_retries=3)(SamplerWorker)
        painters: list[Any] = [actor.remote(request, None if on_gpu else 1) for _ in range(min(workers, len(batches)))]
        try:
            yield from _in_order(painters, batches)
        except RayTaskError as error:
            raise UserError(str(error.cause)) from error
        finally:
            for worker in painters:
                ray.kill(worker)


def _in_order(painters: list[Any], batches: list[Sequence[Job]]) -> Iterator[SampleFiles]:
    """Two batches in flight for each painter, given to whoever has least to do; results in the order of the batches."""
    import ray

    waiting: deque[tuple[Any, int]] = deque()
    load = [0] * len(painters)
    todo = deque(batches)
    while todo or waiting:
        while todo and min(load) < 2:
            chosen = load.index(min(load))
            waiting.append((painters[chosen].paint.remote(todo.popleft()), chosen))
            load[chosen] += 1
        result, whose = waiting.popleft()
        yield from ray.get(result)
        load[whose] -= 1
