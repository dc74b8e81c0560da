"""Nodes that come and go: extractions on a simulated cluster whose nodes are killed and added at random.

    python -m benchmarks.nodes [--units 200] [--repeats 20] [--unit-s 2.0] [--nodes 3] [--seed 0]
    python -m benchmarks.nodes --repeats 5 --seed 15 --keep FOLDER      (in pieces: FOLDER holds the results of all so far)

A head without work and `nodes` nodes of two workers each (ray.cluster_utils); every unit sleeps for `unit-s` seconds. In each
repeat nodes are removed abruptly, and new ones added, until the run ends. The dataset must then be that of an undisturbed
run to the byte, and whole (`shards verify`): nothing lost, nothing twice. What a removal costs is printed for every unit that
was begun again: the seconds between its two beginnings, which are the work that was lost, the time until the driver knew, and
the wait for a worker that was free. Goal: at most one unit's time and 10 s.

With --keep the undisturbed dataset is made once, and each repeat is a line of FOLDER/repeats.jsonl; the table is of all lines.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from benchmarks.crash import contents
from benchmarks.scaling import RULES, Greys, sleeping
from extract.config import ExtractConfig, RunConfig
from extract.run.run import run
from extract.workers import cluster
from shards.inspect.verify import verify

IMAGES = 4
WORKERS_PER_NODE = 2


def disturb(
    simulated: Any, nodes: list[Any], most: int, generator: random.Random, pause_s: float, run: Future[float]
) -> int:
    """Removes nodes of a cluster and adds others, up to `most`, until the run ends; returns how many it removed."""
    removed = 0
    while not wait([run], timeout=generator.uniform(0.5, 1.5) * pause_s).done:
        if len(nodes) > 1 and (len(nodes) == most or generator.random() < 0.5):
            simulated.remove_node(nodes.pop(generator.randrange(len(nodes))), allow_graceful=False)
            removed += 1
        else:
            add(simulated, nodes)
    return removed


def add(simulated: Any, nodes: list[Any]) -> None:
    """Adds a node; on a busy machine Ray may give up before it has started."""
    try:
        nodes.append(simulated.add_node(num_cpus=WORKERS_PER_NODE))
    except Exception as error:  # Ray has no class for this
        print(f"a node did not start: {error}", flush=True)


class Begun:
    """While it listens: the moments at which each unit was given to a worker, and at which that worker's death was known."""

    def __init__(self) -> None:
        self.moments: dict[int, list[float]] = {}
        self.known: dict[int, list[float]] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listens to the driver of this process."""
        ask = cluster.Job.ask

        def note(job: cluster.Job, worker: Any) -> Any:
            self.moments.setdefault(job.unit.index, []).append(time.monotonic())
            return ask(job, worker)

        ended = cluster.Dispatcher._ended

        def hear(dispatcher: cluster.Dispatcher, job: cluster.Job, answer: Any) -> None:
            if isinstance(answer, cluster.Died):
                self.known.setdefault(job.unit.index, []).append(time.monotonic())
            ended(dispatcher, job, answer)

        with mock.patch.object(cluster.Job, "ask", note), mock.patch.object(cluster.Dispatcher, "_ended", hear):
            yield

    def lost_s(self) -> list[float]:
        """For each beginning that came to nothing, the seconds until the next one of the same unit."""
        return [after - before for moments in self.moments.values() for before, after in pairwise(moments)]

    def known_s(self) -> list[float]:
        """Of these, the seconds until the driver knew; the rest is the wait for a worker that was free."""
        pairs = (
            zip(self.moments[unit], known, strict=False) for unit, known in self.known.items()
        )  # the last one did well
        return [known - before for pair in pairs for before, known in pair]


def extract(out: Path, units: int, unit_s: float) -> float:
    """Makes the dataset on the cluster that is connected; the seconds that it took."""
    rules = RunConfig(shard_size=IMAGES, threads=1, window=2, address="auto")
    config = ExtractConfig(name="greys", out=str(out), source={}, image=RULES, run=rules)
    begin = time.monotonic()
    run(config, source=Greys(units * IMAGES), tasks=[sleeping(unit_s / IMAGES)])
    return time.monotonic() - begin


def check(out: Path, expected: dict[str, bytes], units: int) -> None:
    """Raises SystemExit if a dataset is not that of the undisturbed run, or not whole."""
    report = verify(str(out))
    if report.problems:
        raise SystemExit(f"{out}: {report.problems[0]}")
    if report.counts["in"] != units * IMAGES or report.counts["ok"] != units * IMAGES:
        raise SystemExit(f"{out}: {report.counts['ok']} samples of {units * IMAGES} inputs")
    found = contents(out)
    if found != expected:
        different = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        raise SystemExit(f"{out}: {len(different)} files differ from the undisturbed run, such as {different[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--unit-s", type=float, default=2.0)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--pause-s", type=float, default=8.0, help="between two events, in the mean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    os.environ |= {"RAY_health_check_period_ms": "1000"}  # as the files of cluster/ do
    import ray
    from ray.cluster_utils import Cluster

    simulated = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [simulated.add_node(num_cpus=WORKERS_PER_NODE) for _ in range(options.nodes)]
    simulated.wait_for_nodes()
    ray.init(address=simulated.address, log_to_driver=False)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keep = options.keep or scratch
        keep.mkdir(parents=True, exist_ok=True)
        if not (keep / "calm_s").exists():
            calm_s = extract(keep / "calm", options.units, options.unit_s)
            (keep / "calm_s").write_text(f"{calm_s:.0f}")
        expected = contents(keep / "calm")
        for seed in range(options.seed, options.seed + options.repeats):
            while len(nodes) < options.nodes:
                add(simulated, nodes)
            repeat = disturbed(simulated, nodes, scratch / f"{seed}", options, seed)
            check(scratch / f"{seed}", expected, options.units)
            print(f"the same to the byte: {json.dumps(repeat)}", flush=True)
            with (keep / "repeats.jsonl").open("a") as file:
                file.write(json.dumps(repeat) + "\n")
        show(keep, options)
    ray.shutdown()
    simulated.shutdown()


def disturbed(simulated: Any, nodes: list[Any], out: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Makes the dataset while nodes go and come; what happened."""
    begun = Begun()
    with begun.listening(), ThreadPoolExecutor(1) as pool:  # Ray adds nodes in the main thread only
        extraction = pool.submit(extract, out, options.units, options.unit_s)
        removed = disturb(simulated, nodes, options.nodes + 1, random.Random(seed), options.pause_s, extraction)
    lost_s, known_s = ([round(seconds, 2) for seconds in found] for found in (begun.lost_s(), begun.known_s()))
    seconds = round(extraction.result(), 1)
    return {"seed": seed, "seconds": seconds, "removed": removed, "lost_s": lost_s, "known_s": known_s}


def show(keep: Path, options: argparse.Namespace) -> None:
    """Prints all repeats so far."""
    repeats = [json.loads(line) for line in (keep / "repeats.jsonl").read_text().splitlines()]
    title = f"{options.units} units of {options.unit_s:g} s; undisturbed: {(keep / 'calm_s').read_text()} s"
    table = Table("seed", "s", "nodes removed", "units begun again", "s lost by these: median", "largest", title=title)
    every = [seconds for repeat in repeats for seconds in repeat["lost_s"]]
    removed = sum(repeat["removed"] for repeat in repeats)
    for repeat in (*repeats, {"seed": "all", "seconds": "", "removed": removed, "lost_s": every}):
        lost_s = repeat["lost_s"]
        worst = (f"{statistics.median(lost_s):.1f}", f"{max(lost_s):.1f}") if lost_s else ("", "")
        table.add_row(*map(str, (repeat["seed"], repeat["seconds"], repeat["removed"], len(lost_s), *worst)))
    Console().print(table)
    print(f"goal: each unit begun again after at most {options.unit_s + 10:g} s")


if __name__ == "__main__":
    main()
