"""A LAION-shaped folder of parquet files, and the local web that its URLs lead to: good images and every way to be none.

    python -m benchmarks.laion_like FOLDER [--rows 20000] [--port 8377]

writes FOLDER/part-*.parquet with the columns of LAION-Aesthetics, FOLDER/laion_like.toml (the recipe `laion`, reading
these tables and allowed to ask this server) and FOLDER/expected.json (how many rows are of which sort), then serves until it is
interrupted. In another terminal: make extract DATA=FOLDER/laion_like.toml

The server listens on many addresses of the loopback network, 127.0.0.1 to 127.0.0.24, as so many hosts. The same rows
and images are made every time.
"""

import argparse
import asyncio
import contextlib
import json
import tomllib
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.web import Web, photograph

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--port", type=int, default=8377)
    options = parser.parse_args()
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
