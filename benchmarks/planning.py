"""Planning at scale: seconds, and memory at its peak, of planning a table of many rows.

    python -m benchmarks.planning [--rows 100000000] [--shard-size 1000] [--distinct url]

A parquet table of LAION's columns is made (each row group repeats one of a million rows, under changed URLs), and planned
as `python -m extract laion` does it: the search for repeated URLs, then every unit, pickled as a worker gets it. Memory is
that of a process which does nothing else. Bound: 1 GB for 100 million rows.
"""

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

GROUP = 1_000_000
REPEATED_EVERY = 50  # rows of which the URL is that of an earlier row


def write_table(path: Path, rows: int) -> None:
    """`rows` rows in groups of a million; all groups have the same values but for the middle of their URLs."""
    generator = np.random.default_rng(0)
    count = min(rows, GROUP)
    numbers = np.arange(count)
    numbers[::REPEATED_EVERY] = 0
    names = pc.cast(pa.array(numbers), pa.string())
    others = {
        "TEXT": pc.binary_join_element_wise("A photograph, number", names, " "),
        "WIDTH": pa.array(np.full(count, 640, np.int32)),
        "HEIGHT": pa.array(np.full(count, 480, np.int32)),
        "AESTHETIC_SCORE": pa.array(generator.uniform(6.0, 7.5, count).astype(np.float32)),
    }
    schema = pa.schema([("URL", pa.string()), *((name, column.type) for name, column in others.items())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, count):
            urls = pc.binary_join_element_wise(f"https://host{first // count}.example/images", names, "/")
            part = pa.table({"URL": urls, **others})
            writer.write_table(part.slice(0, min(count, rows - first)), row_group_size=count)


def plan(table: Path, shard_size: int, distinct: list[str]) -> dict[str, float]:
    """Plans the table in this process; returns what it took."""
    from extract.sources.table import open_source

    filters = {"min_aesthetic": 6.5, "min_side_px": 256}
    source = open_source({"kind": "urls", "tables": str(table), "distinct": distinct, "filters": filters})
    start_mb = peak_mb()
    begin = time.perf_counter()
    source.describe()
    units = source.units(shard_size)
    largest, count = len(pickle.dumps(next(units))), 1
    first_s, first_mb = time.perf_counter() - begin, peak_mb()
    for unit in units:
        count += 1
        largest = max(largest, len(pickle.dumps(unit)))
    return {
        "units": count,
        "first_s": first_s,
        "units_s": time.perf_counter() - begin - first_s,
        "largest": largest,
        "start_mb": start_mb,
        "first_mb": first_mb,
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    """The largest memory of this process so far, in 10^6 bytes (getrusage would count what its parent had at the start)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--shard-size", type=int, default=1000)
    parser.add_argument("--distinct", nargs="*", default=["url"])
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        print(json.dumps(plan(options.plan, options.shard_size, options.distinct)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.parquet"
        write_table(path, options.rows)
        command = [sys.executable, "-m", "benchmarks.planning", "--plan", str(path)]
        command += ["--shard-size", str(options.shard_size), "--distinct", *options.distinct]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        size_mb = path.stat().st_size / 1e6
    table = Table(show_header=False, title=f"{options.rows:,} rows, {size_mb:,.0f} MB of parquet")
    table.add_row("until the first unit (repeated rows are searched)", f"{found['first_s']:.1f} s")
    table.add_row(f"{found['units']:,} units", f"{found['units_s'] / found['units'] * 1e3:.3f} ms each")
    table.add_row("the largest unit, as it is sent", f"{found['largest']:,} bytes")
    table.add_row("memory: program", f"{found['start_mb']:.0f} MB")
    table.add_row("memory: peak until the first unit", f"{found['first_mb']:.0f} MB")
    table.add_row("memory: peak", f"{found['peak_mb']:.0f} MB")
    Console().print(table)


if __name__ == "__main__":
    main()
