"""--dry-run: what an extraction would make and cost, by a short probe of real inputs; the dataset is not touched.

The probe makes a piece of the first shard, with the run's own estimators, in a temporary folder of a worker. Figures of the
whole are those of the piece, multiplied: they are as good as the first inputs are typical.
"""

import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from extract.config import ExtractConfig
from extract.estimators.table import find_set, tasks_of
from extract.run.make_shard import UnitWork
from extract.run.retries import Repeating
from extract.run.run import caption_report
from extract.run.worker import Measured, WorkerSetup
from extract.sources import Source
from extract.sources.caption_report import CaptionReport
from extract.sources.table import open_source
from extract.workers import cluster
from shards.core.cores import cores
from shards.core.errors import UserError
from shards.core.storage import Folder
from shards.inspect.stats import size as in_bytes
from shards.intrinsics import INTRINSICS
from shards.marks import DATASET
from shards.sample import member_names


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    units, inputs: in all; exact: whether the number of inputs is known, and not estimated. done: units that are committed
    already. probe: what became of the first inputs.
    """

    out: str
    units: int
    inputs: int
    exact: bool
    done: int
    probe: Measured
    staff: cluster.WorkerPlan
    captions: CaptionReport | None = None

    @property
    def bytes(self) -> float:
        """Of the whole dataset."""
        return self.probe.bytes / max(1, self.probe.inputs) * self.inputs

    @property
    def worker_hours(self) -> float:
        """Of what is left to do."""
        left = self.inputs * (1 - self.done / self.units)
        return self.probe.seconds / max(1, self.probe.timed) * left / 3600


def make_plan(config: ExtractConfig, *, source: Source | None = None) -> Plan:
    """Plans, and probes. Raises UserError with a sentence if the source or an estimator cannot be used."""
    source = source or open_source(config.source)
    size, limit = config.run.shard_size, config.run.limit
    first = next(iter(source.units(size, size if limit is None else min(size, limit))), None)
    if first is None:
        raise UserError("the source has no inputs; check its path and its filters")
    names = Folder(config.out).list()
    captions = caption_report(source, limit)
    if captions is not None and DATASET not in names:
        captions.check()
    done = sum(name.endswith(".json") and name.removesuffix(".json").isdigit() for name in names)
    with cluster.connected(config.run.address, config.run.workers or cores()):
        staff = cluster.plan_workers(config.run)
        with cluster.single_worker(_setup(config, source, staff), staff, config.run.stall_limit_s) as ask:
            probe = ask("measure", first)
            total = source.total()
            if total is None and not isinstance(source, Repeating):  # each unit has a size of its own
                size = ask("count", first)
    known = total is not None and isinstance(source, Repeating)  # cutting units would search all rows for repeated URLs
    units = 0 if known else sum(1 for _ in source.units(config.run.shard_size, limit))
    inputs = min(units * size if total is None else total, limit or 1 << 62)
    units = math.ceil(inputs / size) if known else units
    return Plan(config.out, units, inputs, total is not None, min(done, units), probe, staff, captions)


def _setup(config: ExtractConfig, source: Source, staff: cluster.WorkerPlan) -> WorkerSetup:
    tasks = tuple(tasks_of(find_set(config.run.estimators), config.run.only))
    made = {name for task in tasks for name in task.intrinsics}
    members = tuple(member_names(config.image.format, tuple(name for name in INTRINSICS if name in made)))
    work = UnitWork(source=source, image=config.image, members=members, threads=staff.threads, window=config.run.window)
    return WorkerSetup(
        out=config.out,
        work=work,
        tasks=tasks,
        device=staff.device,
        dtype=config.run.dtype,
        gpu_share=staff.gpus_per_worker,
    )


def show(plan: Plan) -> None:
    """Prints a plan."""
    probe, staff = plan.probe, plan.staff
    table = Table(show_header=False, box=None, pad_edge=False)
    about = "" if plan.exact else "about "
    table.add_row("dataset", plan.out)
    done = f", of which {plan.done:,} are committed already" if plan.done else ""
    table.add_row("units", f"{plan.units:,} shards{done}")
    share = probe.ok / max(1, probe.inputs)
    table.add_row("inputs", f"{about}{plan.inputs:,}")
    table.add_row("samples", f"about {share * plan.inputs:,.0f}, if {share:.0%} of the inputs give one")
    for number, line in enumerate(plan.captions.lines() if plan.captions else ()):
        table.add_row("" if number else "captions", Text(line.removeprefix("captions: ")))
    table.add_row("bytes", f"about {in_bytes(plan.bytes)}")
    on = f"{staff.gpus_per_worker:g} GPU each" if staff.device == "cuda" else "one CPU core each"
    table.add_row("workers", f"{staff.workers}, {on}")
    hours = plan.worker_hours
    table.add_row("time", f"about {hours / staff.workers:,.2g} h to go")
    kind = "GPU-hours" if staff.device == "cuda" else "CPU-hours"
    table.add_row(kind, f"about {hours * (staff.gpus_per_worker or 1.0):,.2g} to go")
    outcomes = ", ".join(f"{count} x {reason}" for reason, count in probe.lacking.items())
    table.add_row(
        "judged by",
        f"{probe.inputs} inputs: {probe.ok} samples"
        + (f", {outcomes}" if outcomes else "")
        + f"; {probe.timed} of them "
        f"in {probe.seconds:.1f} s by one worker",
    )
    Console().print(table)
    print("nothing was written; leave --dry-run out to begin")
