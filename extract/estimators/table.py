"""The table of estimators, and the sets that combine them. Importing it is cheap: networks are imported when loaded."""

import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extract.estimators import Estimator
from shards.errors import UsageError, UserError
from shards.intrinsics import INTRINSICS
from shards.marks import digest

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Row:
    """One estimator.

    yields: the maps of one forward pass. load: "module:function", called with device, dtype, weights and the settings.
    weights: the checkpoint's folder, whose files' digest goes into the fingerprint; None for rules without weights.
    version: raised whenever the code gives other maps for the same weights and settings. batch: images at a time.
    """

    name: str
    yields: tuple[str, ...]
    what: str
    licence: str
    load: str
    version: int = 1
    weights: Path | None = None
    batch: int = 8
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EstimatorSet:
    """Which row makes which intrinsic. note: said once at the start of a run over anything but the demo world."""

    name: str
    rows: Mapping[str, str]
    note: str = ""


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            name="demo-net",
            yields=("depth", "normal", "segmentation", "line"),
            what="one small embedded network that learned from the demo world; watershed on its boundaries",
            licence="Apache-2.0",
            load="extract.estimators.demo:load",
            weights=HERE / "weights" / "demo",
            settings={"working_px": 256},
        ),
        Row(
            name="null",
            yields=("depth", "normal", "segmentation", "line"),
            what="constant maps, to measure everything but the estimators",
            licence="Apache-2.0",
            load="extract.estimators.null:load",
            batch=16,
        ),
    )
}

SETS: dict[str, EstimatorSet] = {
    row.name: row
    for row in (
        EstimatorSet(
            name="demo",
            rows=dict.fromkeys(INTRINSICS, "demo-net"),
            note="the set 'demo' learned from rendered toy scenes only: on photographs it is for trying things out, not "
            "for training data",
        ),
        EstimatorSet(name="null", rows=dict.fromkeys(INTRINSICS, "null"), note="the set 'null' makes constant maps"),
    )
}


@dataclass(frozen=True)
class Task:
    """A row and the maps that are wanted of it."""

    row: Row
    intrinsics: tuple[str, ...]


def find_set(name: str) -> EstimatorSet:
    """A set by its name. Raises UsageError listing the sets."""
    if name not in SETS:
        raise UsageError(f"there is no estimator set {name!r}; the sets are {', '.join(SETS)}")
    return SETS[name]


def tasks_of(chosen: EstimatorSet, only: tuple[str, ...] = ()) -> list[Task]:
    """What is to be run for the intrinsics `only` (all if empty): each row once, in the order of the table of intrinsics."""
    unknown = sorted(set(only) - set(INTRINSICS))
    if unknown:
        raise UsageError(f"there is no intrinsic {unknown[0]!r}; the intrinsics are {', '.join(INTRINSICS)}")
    wanted = [name for name in INTRINSICS if name in chosen.rows and (not only or name in only)]
    rows = list(dict.fromkeys(chosen.rows[name] for name in wanted))
    return [Task(ROWS[row], tuple(name for name in wanted if chosen.rows[name] == row)) for row in rows]


def fingerprint(row: Row) -> dict[str, Any]:
    """What decides the maps of a row: name, weights (sha256), settings, code version; and a short id of all this."""
    body = {
        "name": row.name,
        "weights": _digest_of(row.weights) if row.weights else "",
        "settings": dict(row.settings),
        "version": row.version,
    }
    return {"id": f"{row.name}@{digest(body)[:8]}", **body}


def _digest_of(folder: Path) -> str:
    """sha256 over the names and contents of a checkpoint folder's files. Raises UserError when it is not there."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".safetensors"))
    if not files:
        raise UserError(f"the estimator checkpoint {folder} is missing; reinstall the project, or make it with train")
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def load(row: Row, device: str, dtype: str = "float32") -> Estimator:
    """The estimator of a row, ready on `device` ("cpu", "cuda", ...) in `dtype`. Raises UserError for a bad checkpoint."""
    module, function = row.load.split(":")
    make = getattr(importlib.import_module(module), function)
    estimator: Estimator = make(device=device, dtype=dtype, weights=row.weights, **row.settings)
    return estimator
