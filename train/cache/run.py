"""`python -m train cache`: adds latents and text-encoder outputs to shards, on Ray, shard by shard, as extraction does.

What comes out is a function of the dataset, the base and the intrinsic VAE alone. Stopped at any instant, the same command goes
on; shards that are done are not done again, and of a shard that is done anew, members that still fit are kept byte for byte.
"""

import gc
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from extract.config import RunConfig
from extract.run.progress import Reporter
from extract.run.worker import Outcome
from extract.sources import Unit
from extract.workers import cluster
from shards.core.cores import cores
from shards.core.errors import UserError
from shards.core.storage import Folder
from shards.dataset import Dataset, add_counts, write_info
from shards.marks import DATASET, shard_name
from shards.writer import read_mark, recover
from train.cache.format import Spec
from train.cache.make_shard import CacheConfig, Counted, Models, ShardCaches, all_members, cache_shard

# ---- the workers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CacheSetup:
    """All that a worker needs."""

    config: CacheConfig
    specs: Mapping[str, Spec]
    device: str


class CacheWorker:
    """The body of the Ray actor; `run` and `progress` are called from different threads."""

    def __init__(self, setup: CacheSetup) -> None:
        import cv2

        cv2.setNumThreads(1)
        if setup.device == "cpu":
            torch.set_num_threads(1)
        self._setup, self._counted = setup, Counted()
        self._models: Models | None = None
        self._dataset = Dataset.open(setup.config.shards)

    def _load(self) -> Models:
        if self._models is None:
            setup = self._setup
            dtype = torch.float32 if setup.device == "cpu" else torch.bfloat16
            self._models = Models(setup.config, setup.device, dtype)
        return self._models

    def run(self, unit: Unit, made: dict[str, Any], skip: Sequence[int]) -> Outcome:
        """Writes one shard."""
        config, self._counted = self._setup.config, Counted()
        out = Folder(config.out or config.shards)
        try:
            mark = cache_shard(
                self._dataset,
                out,
                unit.index,
                config,
                self._load(),
                self._setup.specs,
                made,
                frozenset(skip),
                self._counted,
            )
        except UserError as error:
            return Outcome({}, {}, str(error))
        finally:
            self._counted = Counted()
        return Outcome(mark["counts"], mark["timings"])

    def progress(self) -> tuple[int, int, int]:
        """Samples done, and failed, of the shard at work; and a number that changes with every batch."""
        return self._counted.done, self._counted.failed, self._counted.done

    def count(self, unit: Unit) -> int | str:
        """How many samples a shard has; a sentence if it cannot be read."""
        try:
            return len(self._dataset.mark(shard_name(unit.index))["index"])
        except UserError as error:
            return str(error)

    def probe(self, unit: Unit, start: int, stop: int, skip: Sequence[int]) -> str:
        """Encodes rows start..stop alone and keeps nothing; dies if one of them kills its worker."""
        try:
            shard = ShardCaches(self._dataset, self._dataset, None, self._setup.config, self._load(), self._setup.specs)
            for row, sample in enumerate(self._dataset.samples(shard_name(unit.index))):
                if start <= row < stop and row not in skip:
                    shard.of([sample])
                self._counted.done += 1
        except UserError as error:
            return str(error)
        return ""


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """What a run did: counts are of the whole dataset, `made` shards of this run."""

    out: str
    ok: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    made: int = 0
    seconds: float = 0.0


@dataclass
class _RunCounts:
    """Listens to the work."""

    reporter: Reporter
    summary: Summary

    def finished(self, unit: Unit, outcome: Outcome) -> None:
        self.summary.made += 1
        self.reporter.advance(outcome.counts["in"], sum(outcome.counts["failed"].values()))

    def working(self, done: int, failed: int) -> None:
        self.reporter.working(done, failed)

    def say(self, sentence: str) -> None:
        self.reporter.say(sentence)


def make_caches(config: CacheConfig) -> Summary:
    """Makes the caches of a complete dataset, or goes on with it. Raises UserError with a sentence if it cannot finish."""
    dataset, begin = Dataset.open(config.shards), time.monotonic()
    if not dataset.complete:
        raise UserError(f"{config.shards} is unfinished; run its `python -m extract` command to the end first")
    specs = Models(config, "cpu", torch.bfloat16).specs(config)
    gc.collect()
    out, summary = Folder(config.out or config.shards), Summary(config.out or config.shards)
    caches = dict(dataset.info.get("caches") or {}) | {name: {"id": s.id, **asdict(s)} for name, s in specs.items()}
    info = dataset.info | {"members": all_members(dataset, specs), "caches": caches}
    if config.out is not None:
        _begin(out, dataset, info)
    total = sum(dataset.info["totals"]["shards"])
    with Reporter(total) as reporter:
        jobs = _open_jobs(dataset, out, config, specs, reporter)
        first = next(jobs, None)
        if first is not None:  # Ray is not even started where nothing is to be done
            with _pool(config, specs) as (pool, capacity):
                cluster.Dispatcher(pool, jobs, _RunCounts(reporter, summary), capacity).work(first)
    totals = add_counts(Dataset(out, info).marks())
    write_info(out, info | {"totals": totals})
    out.sweep()
    summary.ok, summary.failed, summary.shards = totals["ok"], Counter(totals["failed"]), len(totals["shards"])
    summary.seconds = time.monotonic() - begin
    return summary


def _begin(out: Folder, dataset: Dataset, info: Mapping[str, Any]) -> None:
    """Says in a new folder what it will hold. Raises UserError if it holds something else."""
    out.make()
    described = {name: info.get(name) for name in ("config", "estimators", "image")}
    if out.exists(DATASET):
        there = Dataset.open(out.url).info
        if {name: there.get(name) for name in described} != described:
            raise UserError(f"{out.url} holds another dataset than {dataset.folder.url}; choose another --out")
    elif others := [name for name in out.list() if name.endswith((".tar", ".json"))]:
        raise UserError(f"{out.url} is not empty and holds no dataset ({others[0]}, ...); choose another --out")
    write_info(out, {**info, "shards": None, "totals": None})


def _open_jobs(
    dataset: Dataset, out: Folder, config: CacheConfig, specs: Mapping[str, Spec], reporter: Reporter
) -> Iterator[cluster.Job]:
    """The shards that are not done yet, in order."""
    ids = {name: row["id"] for name, row in (dataset.info.get("caches") or {}).items()}
    ids |= {name: spec.id for name, spec in specs.items()}
    for name in dataset.shard_names():
        recover(out, name)
        source = dataset.mark(name)
        made = {key: value for key, value in source["made"].items() if key not in ("caches", "source")}
        made |= {"caches": ids} if config.out is None else {"caches": ids, "source": source["tar"]["sha256"]}
        if out.exists(f"{name}.json") and (mark := read_mark(out, name))["made"] == made:
            reporter.advance(mark["counts"]["in"], sum(mark["counts"]["failed"].values()), again=True)
            continue
        yield cluster.Job(Unit(int(name), None), made)


@contextmanager
def _pool(config: CacheConfig, specs: Mapping[str, Spec]) -> Iterator[tuple[cluster.Pool, Any]]:
    """Workers on Ray, and how to learn how many there is room for (None: that does not change)."""
    wishes = RunConfig(
        workers=config.workers, device=config.device, gpus_per_worker=config.gpus_per_worker, address=config.address
    )
    with cluster.connected(config.address, config.workers or cores()):
        staff = cluster.plan_workers(wishes)
        setup = CacheSetup(config=config, specs=specs, device=staff.device)
        grows = config.address != "local" and not config.workers
        capacity = partial(cluster.cluster_size, 1, staff.gpus_per_worker) if grows else None
        stall = cluster.StallRules(wishes.stall_warning_s, wishes.stall_limit_s)
        options: dict[str, Any] = {"cpus": 1, "gpus": staff.gpus_per_worker, "worker": CacheWorker, "stall": stall}
        yield cluster.Pool(setup, staff.workers, **options), capacity
