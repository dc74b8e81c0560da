"""What an extraction is: a recipe's tables [source], [image] and [run], with the command line on top."""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from extract.images.prepare import ImageRules
from extract.sources.table import settings_of
from shards.core.config import load_config, read_toml
from shards.core.errors import UsageError
from shards.intrinsics import INTRINSICS


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the work is done. Nothing that comes out depends on workers, threads, address or max_failed.

    only: the intrinsics to make; those that the dataset has already are kept. workers: 0 for one per core (or GPU).
    threads: for decoding, and for encoding, in each worker; 0 for two, or more beside a GPU.
    max_failed: the share of inputs that may fail.
    window: images that are decoded, estimated and encoded together. dtype: of the networks; auto is bfloat16 on GPUs that
    compute in it, else float32.
    """

    estimators: str = "demo"
    only: tuple[str, ...] = ()
    limit: int | None = None
    shard_size: int = 1000
    workers: int = 0
    threads: int = 0
    window: int = 16
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gpus_per_worker: float = 1.0
    address: str = "local"
    max_failed: float = 0.1
    stall_warning_s: float = 300.0
    """A worker that makes no progress for so long is said, with its unit. 0: never. A window of images at the slowest
    estimators takes a core some minutes."""
    stall_limit_s: float = 1800.0
    """A worker that makes no progress for so long is ended, and its unit done by another. 0: never. Loading weights over a
    slow network is the longest step that is healthy."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "window"):
            if getattr(self, name) < 1:
                raise UsageError(f"run.{name} = {getattr(self, name)}; it must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"run.limit = {self.limit}; it must be at least 1")
        if self.workers < 0 or self.threads < 0 or self.gpus_per_worker <= 0:
            raise UsageError(
                "run.workers and run.threads must not be negative, and run.gpus_per_worker must be positive"
            )
        if self.stall_warning_s < 0 or self.stall_limit_s < 0:
            raise UsageError("run.stall_warning_s and run.stall_limit_s must not be negative; 0 is never")
        if not 0 <= self.max_failed <= 1:
            raise UsageError(
                f"run.max_failed = {self.max_failed}; give a share from 0 to 1, or a percentage such as 10%"
            )
        unknown = sorted(set(self.only) - set(INTRINSICS))
        if unknown:
            raise UsageError(f"there is no intrinsic {unknown[0]!r}; the intrinsics are {', '.join(INTRINSICS)}")


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """A whole extraction. source: the settings of one kind of source (extract.sources.table)."""

    name: str
    out: str
    source: dict[str, Any]
    image: ImageRules = field(default_factory=ImageRules)
    run: RunConfig = field(default_factory=RunConfig)

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the dataset, beside the estimators and the source's content, as JSON."""
        run = {name: getattr(self.run, name) for name in ("shard_size", "window", "dtype")}
        return {"image": dataclasses.asdict(self.image), **run}


def recipe_names() -> list[str]:
    """The recipes that come with the toolkit."""
    files = resources.files("extract") / "recipes"
    return sorted(file.name.removesuffix(".toml") for file in files.iterdir() if file.name.endswith(".toml"))


def read_recipe(data: str) -> tuple[str, dict[str, Any]]:
    """The name and the tables that a DATA argument stands for: a recipe's name, a .toml, or a source itself.

    Raises UsageError, listing the recipes, if it is none of them.
    """
    if data in recipe_names():
        text = (resources.files("extract") / "recipes" / f"{data}.toml").read_text(encoding="utf-8")
        return data, tomllib.loads(text)
    if data.endswith(".toml"):
        return Path(data).stem, read_toml(Path(data))
    settings = settings_of(data)
    if settings is None:
        raise UsageError(
            f"{data!r} is no recipe ({', '.join(recipe_names())}), no .toml file, and no folder, tar or table that exists"
        )
    stem = data.rstrip("/").rsplit("/", 1)[-1].split(".")[0]
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem).strip("-") or "data", {"source": settings}


def parse_setting(text: str) -> dict[str, Any]:
    """`a.b.c=value` as nested tables. The value is read as TOML (3, true, ["x"]); what is not TOML is text."""
    path, equals, value = text.partition("=")
    names = [name.strip() for name in path.split(".")]
    if not equals or len(names) < 2 or not all(names):
        raise UsageError(f"--set {text}: give TABLE.KEY=VALUE, such as source.tables=/my/folder")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for name in reversed(names):
        parsed = {name: parsed}
    return dict(parsed)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables with `over` on top; other values replace, and None means "not given"."""
    merged = dict(base)
    for name, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = merge(merged[name], value)
        elif value is not None:
            merged[name] = value
    return merged


def load_extract_config(data: str, out: str | None, options: Mapping[str, Mapping[str, Any]]) -> ExtractConfig:
    """The configuration of `python -m extract DATA`: the recipe, and `options` by table (None means not given)."""
    name, recipe = read_recipe(data)
    unknown = sorted(set(recipe) - {"source", "image", "run"})
    if unknown:
        raise UsageError(f"the recipe {data} has a table [{unknown[0]}]; its tables are [source], [image] and [run]")
    source = merge(recipe.get("source", {}), options.get("source", {}))
    tables = {table: content for table, content in recipe.items() if table != "source"}
    given = {table: content for table, content in options.items() if table != "source"}
    return load_config(ExtractConfig, {"name": name, "out": out or f"data/{name}", "source": source}, tables, given)
