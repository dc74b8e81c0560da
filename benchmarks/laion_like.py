"""A LAION-shaped folder of parquet files, and the local web that its URLs lead to: good images and every way to be none.

    python -m benchmarks.laion_like FOLDER [--rows 20000] [--port 8377]

    python -m benchmarks.laion_like FOLDER [--rows 20000] --extract          (all of it, with the check at the end)
    python -m benchmarks.laion_like FOLDER [--rows 20000] --check DATASET

writes FOLDER/part-*.parquet with the columns of LAION-Aesthetics, FOLDER/laion_like.toml (the recipe `laion`, reading
these tables and allowed to ask this server) and FOLDER/expected.json (how many rows are of which sort), then serves until it is
interrupted. In another terminal: make extract DATA=FOLDER/laion_like.toml

--check says for every row of a dataset that was made of them whether it ended as a row of its sort must; a failure
that another attempt may mend (a timeout on a busy machine) is counted apart. What `shards stats` counts must agree.

The server listens on many addresses of the loopback network, 127.0.0.1 to 127.0.0.24, as so many hosts. The same rows
and images are made every time.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from extract.reasons import is_passing
from shards.dataset import Dataset
from shards.inspect.stats import stats
from tests.support.web import Web, photograph

HOSTS = [f"127.0.0.{number}" for number in range(1, 25)]
SIZES = ((640, 480), (800, 600), (512, 768), (1024, 683), (400, 400), (720, 1280))
ROWS_PER_TABLE = 4000

# What rows are, in thousandths; "ok" is the rest. Names of Web.answers, and some that are told by the row alone.
SHARES = {
    "404": 60,
    "410": 10,
    "403": 20,
    "418": 5,
    "503": 5,
    "flaky": 15,
    "busy": 10,
    "banned": 3,
    "silent": 5,
    "dripping": 2,
    "endless": 3,
    "huge": 3,
    "headers": 2,
    "cut": 8,
    "truncated": 10,
    "broken": 10,
    "html": 20,
    "typed": 20,
    "svg": 5,
    "empty": 5,
    "bomb": 3,
    "noai": 10,
    "otherbot": 5,
    "nonsense": 3,
    "hang-up": 5,
    "loop": 4,
    "moved": 20,
    "private": 4,
    "metadata": 3,
    "mapped": 3,
    "file": 3,
    "nowhere": 3,
    "decimal address": 3,
    "loopback name": 3,
    "closed port": 4,
    "not https": 3,
    "no url": 3,
    "ftp": 3,
    "same url": 25,
    "same": 10,
    "low score": 40,
    "unsafe": 15,
    "watermark": 15,
    "cyrillic": 10,
    "short caption": 5,
    "too small": 10,
    "elongated": 5,
    "no such host": 3,
}


PRESENT = ("ok", "filtered_repeated_url", "filtered_repeated_content")  # the same image may stand earlier in the shard

# How rows of each sort end; "ok" is a sample.
OUTCOMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("ok", "flaky", "busy", "typed", "otherbot", "moved", "same", "same url"), PRESENT),
    **dict.fromkeys(("404", "410"), ("not_found",)),
    **dict.fromkeys(("silent", "dripping"), ("timeout",)),
    **dict.fromkeys(("endless", "huge"), ("too_many_bytes", "timeout")),
    **dict.fromkeys(("headers", "cut", "nonsense", "hang-up"), ("connection_lost", "timeout")),
    **dict.fromkeys(("private", "metadata", "mapped", "decimal address", "loopback name"), ("forbidden_address",)),
    **dict.fromkeys(("file", "nowhere"), ("bad_redirect",)),
    "403": ("access_denied",),
    "418": ("http_error",),
    "503": ("server_error",),
    "banned": ("too_many_requests",),
    "truncated": ("truncated",),
    "broken": ("truncated", "corrupt", "filtered_repeated_content"),  # all have the same bytes
    "html": ("not_an_image",),
    "svg": ("unsupported_format",),
    "empty": ("empty",),
    "bomb": ("content_encoded",),
    "noai": ("opted_out",),
    "loop": ("too_many_redirects",),
    "closed port": ("connect_failed",),
    "not https": ("tls_failed",),
    "no url": ("bad_row",),
    "ftp": ("bad_url",),
    "low score": ("filtered_aesthetic",),
    "unsafe": ("filtered_unsafe",),
    "watermark": ("filtered_watermark",),
    "cyrillic": ("filtered_caption_script",),
    "short caption": ("filtered_caption_length",),
    "too small": ("filtered_size",),
    "elongated": ("filtered_aspect",),
    "no such host": ("no_such_host", "dns_failed"),
}


def images() -> list[bytes]:
    """The pictures behind the good URLs: 120 JPEG files of 20 to 200 kB."""
    return [photograph(number, SIZES[number % len(SIZES)]) for number in range(120)]


def sorts(rows: int, generator: np.random.Generator) -> list[str]:
    """What each row is; every sort appears if there are 1,000 rows or more."""
    names, shares = list(SHARES), np.array(list(SHARES.values())) / 1000
    certain = names if rows >= 1000 else []
    drawn = generator.choice(["ok", *names], rows - len(certain), p=[1 - shares.sum(), *shares])
    return [str(name) for name in generator.permutation(np.array([*certain, *drawn]))]


def table(rows: Sequence[str], first: int, port: int, generator: np.random.Generator) -> pa.Table:
    """The rows first.. of the dataset, each of the sort that `rows` says."""
    count = len(rows)
    score = generator.uniform(6.5, 7.5, count)
    unsafe, watermark = generator.uniform(0, 0.4, count), generator.uniform(0, 0.7, count)
    sizes = [SIZES[number % len(SIZES)] for number in range(first, first + count)]
    urls: list[str | None] = []
    captions: list[str] = []
    for place, sort in enumerate(rows):
        number = first + place
        host = f"{HOSTS[number % len(HOSTS)]}:{port}"
        told: dict[str, str | None] = {
            "decimal address": f"http://2130706433:{port}/ok/{number}.jpg",
            "loopback name": f"http://localhost:{port}/ok/{number}.jpg",
            "closed port": f"http://127.0.0.1:9/{number}.jpg",
            "no such host": f"http://host{number}.invalid/{number}.jpg",
            "not https": f"https://{host}/ok/{number}.jpg",
            "no url": None,
            "ftp": f"ftp://{host}/{number}.jpg",
            "same url": f"http://{HOSTS[0]}:{port}/ok/0.jpg",
        }
        path = sort if " " not in sort and sort not in ("ok", "unsafe", "watermark", "cyrillic", "elongated") else "ok"
        urls.append(told.get(sort, f"http://{host}/{path}/{number}.jpg"))
        captions.append(
            {"cyrillic": "красный шар на столе", "short caption": "x"}.get(sort, f"A photograph, number {number}")
        )
        score[place] = 5.5 if sort == "low score" else score[place]
        unsafe[place] = 0.95 if sort == "unsafe" else unsafe[place]
        watermark[place] = 0.95 if sort == "watermark" else watermark[place]
        sizes[place] = {"too small": (120, 90), "elongated": (2000, 300)}.get(sort, sizes[place])
    return pa.table(
        {
            "URL": pa.array(urls, pa.string()),
            "TEXT": captions,
            "WIDTH": pa.array([size[0] for size in sizes], pa.int32()),
            "HEIGHT": pa.array([size[1] for size in sizes], pa.int32()),
            "similarity": generator.uniform(0.28, 0.4, count),
            "hash": generator.integers(-(1 << 62), 1 << 62, count),
            "punsafe": unsafe.astype(np.float32),
            "pwatermark": watermark.astype(np.float32),
            "AESTHETIC_SCORE": score.astype(np.float32),
        }
    )


def write(folder: Path, rows: int, port: int) -> None:
    """The tables, the recipe and the counts."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    chosen = sorts(rows, generator)
    for number, first in enumerate(range(0, rows, ROWS_PER_TABLE)):
        part = table(chosen[first : first + ROWS_PER_TABLE], first, port, generator)
        pq.write_table(part, folder / f"part-{number:05d}.parquet", row_group_size=1500)
    recipe = tomllib.loads((resources.files("extract") / "recipes/laion.toml").read_text())
    recipe["source"]["tables"] = str(folder.resolve())
    recipe["source"]["download"] = {"allow_hosts": HOSTS, "idle_timeout_s": 1.0, "total_timeout_s": 2.0, "retries": 1}
    (folder / "laion_like.toml").write_text("\n".join(toml(recipe)) + "\n")
    (folder / "expected.json").write_text(json.dumps(Counter(chosen), indent=1, sort_keys=True) + "\n")


def toml(tables: dict[str, Any], where: str = "") -> list[str]:
    """Nested tables of plain values as the lines of a TOML file."""
    lines = [f"[{where}]"] if where else []
    lines += [f"{name} = {json.dumps(value)}" for name, value in tables.items() if not isinstance(value, dict)]
    for name, value in tables.items():
        if isinstance(value, dict):
            lines += toml(value, f"{where}.{name}" if where else name)
    return lines


def check(out: str, rows: int) -> None:
    """Compares a dataset with the rows, one by one, and prints what they became. Raises SystemExit if a row is wrong."""
    dataset = Dataset.open(out)
    ends = dict.fromkeys(dataset.keys(), "ok")
    lines = 0
    for shard in dataset.shard_names():
        for line in dataset.failures(shard):
            ends[line["key"]] = line["reason"]
            lines += 1
    wanted = sorts(rows, np.random.default_rng(0))
    keys = [f"{row // ROWS_PER_TABLE:05d}-{row % ROWS_PER_TABLE:09d}" for row in range(rows)]
    if sorted(keys) != sorted(ends) or lines + dataset.info["totals"]["ok"] != rows:
        raise SystemExit(f"{out} lists {len(ends)} inputs; there were {rows} rows")
    found = Counter((sort, ends[key]) for key, sort in zip(keys, wanted, strict=True))
    table = Table("rows of the sort", "ended as", "rows", "")
    wrong = 0
    for (sort, end), count in sorted(found.items()):
        right = end in OUTCOMES[sort]
        wrong += 0 if right or is_passing(end) else count
        table.add_row(sort, end, f"{count}", "" if right else "may pass" if is_passing(end) else "WRONG")
    Console().print(table)
    if wrong:
        raise SystemExit(f"{wrong} rows ended as no row of their sort may")
    figures = stats(out, sample=0)
    said = Counter({"ok": figures["counts"]["ok"]}) + Counter(figures["failures"]) + Counter(figures["drops"])
    if said != Counter(ends.values()):
        raise SystemExit(f"`shards stats` counts {said}, but the shards list {Counter(ends.values())}")
    missing = {reason for ends in OUTCOMES.values() for reason in ends[:1]} - set(Counter(ends.values()))
    reasons = len(set(ends.values()) - {"ok"})
    print(
        f"all {rows} rows are accounted for, here and in `shards stats`, with {reasons} different reasons; not seen: "
        f"{', '.join(sorted(missing)) or 'none'}"
    )


def extract(folder: Path, rows: int, port: int, size_px: int) -> None:
    """Serves in another process, extracts, and checks."""
    command = [sys.executable, "-m", "benchmarks.laion_like", str(folder), "--rows", str(rows), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline()
        out = str(folder / "out")
        try:
            settings = ["--estimators", "null", "--size", f"{size_px}", "--no-gallery", "--out", out]
            subprocess.run([sys.executable, "-m", "extract", str(folder / "laion_like.toml"), *settings], check=True)
        finally:
            server.terminate()
    check(out, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--port", type=int, default=8377)
    parser.add_argument("--extract", action="store_true", help="make the dataset FOLDER/out, too, and check it")
    parser.add_argument("--size", type=int, default=128, help="pixels of the shorter side, for --extract")
    parser.add_argument("--check", metavar="DATASET", help="only compare a dataset with the rows")
    options = parser.parse_args()
    if options.check:
        check(options.check, options.rows)
        return
    if options.extract:
        extract(options.folder, options.rows, options.port, options.size)
        return
    web = Web(images(), distinct=True)
    write(options.folder, options.rows, options.port)

    def ready(port: int) -> None:
        print(
            f"{options.rows} rows in {options.folder}; serving on {HOSTS[0]}:{port} to {HOSTS[-1]}:{port}", flush=True
        )
        print(f"make extract DATA={options.folder / 'laion_like.toml'}", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(web.serve_forever(HOSTS, options.port, ready))


if __name__ == "__main__":
    main()
