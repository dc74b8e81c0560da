"""Nodes that come and go: extractions on a simulated cluster whose nodes are killed and added at random.

    python -m benchmarks.nodes [--units 200] [--repeats 20] [--unit-s 2.0] [--nodes 3] [--seed 0]

A head without work and `nodes` nodes of two workers each (ray.cluster_utils); every unit sleeps for `unit-s` seconds. In each
repeat nodes are removed abruptly, and new ones added, until the run ends. The dataset must then be that of an undisturbed
run to the byte, and whole (`shards verify`): nothing lost, nothing twice. What a removal costs is what its workers had done
of their units (at most one unit's time), and the seconds until the driver knows, which are printed.
"""

import argparse
import contextlib
import io
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.crash import contents
from benchmarks.scaling import RULES, Greys, sleeping
from extract.config import ExtractConfig, RunConfig
from extract.run import run
from shards.verify import verify

IMAGES = 4
WORKERS_PER_NODE = 2


@dataclass
class Killer:
    """Removes and adds nodes of a cluster until it is stopped; `killed` are the moments of the removals."""

    cluster: Any
    nodes: list[Any]
    generator: random.Random
    most: int
    pause_s: float
    killed: list[float] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Works in a thread meanwhile."""
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _work(self) -> None:
        while not self._stop.wait(self.generator.uniform(0.5, 1.5) * self.pause_s):
            if len(self.nodes) > 1 and (len(self.nodes) == self.most or self.generator.random() < 0.5):
                node = self.nodes.pop(self.generator.randrange(len(self.nodes)))
                self.killed.append(time.monotonic())
                self.cluster.remove_node(node, allow_graceful=False)
            else:
                self.nodes.append(self.cluster.add_node(num_cpus=WORKERS_PER_NODE))


class Noticed(io.StringIO):
    """In place of stderr: the moments at which the driver says that a worker died."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[float] = []

    def write(self, text: str) -> int:
        if "a worker died with unit" in text:
            self.moments.append(time.monotonic())
        return super().write(text)


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


def noticed_after(killed: list[float], moments: list[float]) -> list[float]:
    """The seconds from each removal until the last word about its workers that came before the next removal."""
    delays = []
    for number, moment in enumerate(killed):
        following = killed[number + 1] if number + 1 < len(killed) else float("inf")
        heard = [heard for heard in moments if moment <= heard < following]
        if heard:
            delays.append(max(heard) - moment)
    return delays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--unit-s", type=float, default=2.0)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--pause-s", type=float, default=6.0, help="between two events, in the mean")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=WORKERS_PER_NODE) for _ in range(options.nodes)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    table = Table("repeat", "s", "removed", "units begun again", "s until noticed: mean", "largest")
    with tempfile.TemporaryDirectory() as scratch:
        calm_s = extract(Path(scratch) / "calm", options.units, options.unit_s)
        expected = contents(Path(scratch) / "calm")
        print(f"undisturbed: {calm_s:.0f} s", flush=True)
        for repeat in range(options.repeats):
            killer = Killer(
                cluster, nodes, random.Random(options.seed + repeat), most=options.nodes + 1, pause_s=options.pause_s
            )
            out, heard = Path(scratch) / f"{repeat}", Noticed()
            with killer.at_work(), contextlib.redirect_stderr(heard):
                seconds = extract(out, options.units, options.unit_s)
            check(out, expected, options.units)
            delays = noticed_after(killer.killed, heard.moments) or [0.0]
            figures = (f"{statistics.mean(delays):.1f}", f"{max(delays):.1f}")
            table.add_row(f"{repeat}", f"{seconds:.0f}", f"{len(killer.killed)}", f"{len(heard.moments)}", *figures)
            print(
                f"repeat {repeat}: the same to the byte, {len(killer.killed)} nodes removed",
                file=sys.stdout,
                flush=True,
            )
    ray.shutdown()
    cluster.shutdown()
    Console().print(table)


if __name__ == "__main__":
    main()
