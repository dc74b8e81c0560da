"""Download speed beside img2dataset's: the same URLs, the same machine, one after the other.

    python3 -m venv /tmp/img2dataset && /tmp/img2dataset/bin/pip install img2dataset==1.47.0
    python -m benchmarks.download --img2dataset /tmp/img2dataset/bin/img2dataset [--images 3000] [--rounds 3]

A local server offers JPEG files of 640 x 480 to 1920 x 1280 pixels; both download all of them, resize the shorter side to
256 pixels (by area means) and write WebDataset tars of 500 samples, with two processes. Each is timed from the first
request that the server sees to the end of its process, so that start-up (imports) is left out for both; it is printed
beside. Download alone, without resizing, is several times faster: resizing is what both spend their time on.
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from extract.images.prepare import ImageProblem, ImageRules, Prepared, prepare
from extract.sources import RawSample, Unit
from extract.sources.table import open_source
from extract.sources.urls import UrlSource
from shards.core.storage import Folder
from shards.writer import ShardWriter
from tests.support.web import Web, head, photograph

SIZES = ((640, 480), (736, 1104), (1024, 683), (1200, 800), (1920, 1280), (500, 750))  # common on the web
SHARD = 500
MEMBERS = ("jpg", "txt", "json")
RULES = ImageRules(size_px=256, resample="area")


# ---- the server ------------------------------------------------------------------------------------------------------


class Timed(Web):
    """Remembers when the first image was asked for; /began tells it, and forgets."""

    began = 0.0

    async def _began(self, writer: asyncio.StreamWriter, path: str) -> None:
        data = json.dumps(self.began).encode()
        self.began = 0.0
        writer.write(head("200 OK", length=len(data)) + data)

    async def _image(self, writer: asyncio.StreamWriter, path: str) -> None:
        self.began = self.began or time.time()
        await super()._image(writer, path)


def serve(port: Any) -> None:
    web = Timed([photograph(number, SIZES[number % len(SIZES)]) for number in range(200)])
    web.answers |= {"began": web._began, "ok": web._image}
    asyncio.run(web.serve_forever(["127.0.0.1"], 0, port.put))


# ---- ours ------------------------------------------------------------------------------------------------------------


def prepared(source: UrlSource, unit: Unit, pool: ThreadPoolExecutor) -> Iterator[tuple[RawSample, Future[Prepared]]]:
    """The unit's samples, resized in other threads while more are downloaded, in order."""
    waiting: deque[tuple[RawSample, Future[Prepared]]] = deque()
    for output in source.read(unit):
        if isinstance(output, RawSample):
            waiting.append((output, pool.submit(prepare, output.image, RULES, decoded=False)))
        if len(waiting) > 16:
            yield waiting.popleft()
    yield from waiting


def write_shard(settings: dict[str, Any], unit: Unit, out: str) -> int:
    """Downloads, resizes and writes one unit; returns the number of samples."""
    source = open_source(settings)
    assert isinstance(source, UrlSource)
    count = 0
    with ThreadPoolExecutor(2) as pool, ShardWriter(Folder(out), unit.index, members=MEMBERS, made={}) as writer:
        for sample, future in prepared(source, unit, pool):
            try:
                done = future.result()
            except ImageProblem as problem:
                writer.fail(sample.key, "decode", problem.reason, problem.message)
                continue
            data = json.dumps({**sample.meta, "intrinsics": {"image": done.record}}).encode()
            writer.add(sample.key, {"jpg": done.member, "txt": sample.caption.encode(), "json": data})
            count += 1
        writer.commit({})
    source.close()
    return count


def ours(settings: dict[str, Any], out: str) -> int:
    units = [(settings, unit, out) for unit in open_source(settings).units(SHARD)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return sum(pool.starmap(write_shard, units, chunksize=1))


# ---- the comparison --------------------------------------------------------------------------------------------------


def run_ours(table: Path, out: Path, threads: int) -> int:
    command = [sys.executable, "-m", "benchmarks.download", "--only-ours", str(table), "--out", str(out)]
    done = subprocess.run([*command, "--threads", str(threads)], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def run_img2dataset(program: Path, table: Path, out: Path, threads: int) -> int:
    settings: dict[str, Any] = {
        "url_list": table,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": out,
        "processes_count": 2,
        "thread_count": threads,
        "image_size": 256,
        "resize_mode": "keep_ratio",
        "number_sample_per_shard": SHARD,
    }
    command = [str(program), *(f"--{name}={value}" for name, value in settings.items())]
    subprocess.run(
        command, check=True, capture_output=True, env={"NO_ALBUMENTATIONS_UPDATE": "1", "PATH": "/usr/bin:/bin"}
    )
    return sum(json.loads(path.read_text())["successes"] for path in out.glob("*_stats.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--img2dataset", type=Path, help="its program, in its own virtual environment")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=16, help="requests at once of each process")
    parser.add_argument("--only-ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_ours:
        limits = {"concurrency": options.threads, "per_host": options.threads, "allow_hosts": ["127.0.0.1"]}
        print(ours({"kind": "urls", "tables": str(options.only_ours), "download": limits}, str(options.out)))
        return
    ports: Any = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(ports,), daemon=True)
    server.start()
    address = f"http://127.0.0.1:{ports.get()}"
    rates: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / "urls.parquet"
        urls = [f"{address}/ok/{number}.jpg" for number in range(options.images)]
        pq.write_table(
            pa.table({"url": urls, "caption": [f"number {number}" for number in range(options.images)]}), table
        )
        for turn in range(options.rounds):
            for name in ("ours", "img2dataset") if options.img2dataset else ("ours",):
                out = Path(scratch) / f"{name}-{turn}"
                start, cpu = time.time(), cpu_of_children()
                if name == "ours":
                    count = run_ours(table, out, options.threads)
                else:
                    count = run_img2dataset(options.img2dataset, table, out, options.threads)
                end = time.time()
                began = json.loads(urllib.request.urlopen(f"{address}/began").read())
                if count != options.images:
                    raise SystemExit(f"{name} wrote {count} of {options.images} images; the rates would not compare")
                rates.setdefault(name, []).append((count / (end - began), end - start, cpu_of_children() - cpu))
    server.terminate()
    print_rates(rates, options)


def cpu_of_children() -> float:
    """Seconds of user and system time of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def print_rates(rates: dict[str, list[tuple[float, float, float]]], options: argparse.Namespace) -> None:
    columns = ("", "images/s", "of all rounds", "s with start-up", "CPU s with start-up")
    grid = Table(*columns, title=f"{options.images} images to 256 px, 2 processes")
    for name, rounds in rates.items():
        rate, seconds, cpu = (statistics.median(values) for values in zip(*rounds, strict=True))
        grid.add_row(name, f"{rate:.0f}", " ".join(f"{r[0]:.0f}" for r in rounds), f"{seconds:.1f}", f"{cpu:.1f}")
    Console().print(grid)
    if len(rates) == 2:
        ratio = statistics.median(r[0] for r in rates["ours"]) / statistics.median(r[0] for r in rates["img2dataset"])
        print(f"ours / img2dataset: {ratio:.2f}")


if __name__ == "__main__":
    main()
