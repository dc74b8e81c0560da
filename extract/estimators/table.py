"""The table of estimators, and the sets that combine them. Importing it is cheap: networks are imported when loaded.

`load` of a row is "module:function", called as load(device=, dtype=, weights=, **settings), weights being the folder of
the checkpoint on this machine (None for rules without weights); it returns an Estimator.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from extract.estimators import Estimator
from extract.estimators.checkpoints import ANY_FILES, Published, Weights, digest_of, locate
from shards.core.config import load_config, read_toml
from shards.core.errors import UsageError
from shards.intrinsics import INTRINSICS
from shards.marks import digest

HERE = Path(__file__).parent
TABLE = "table.toml"


@dataclass(frozen=True, kw_only=True)
class EstimatorRow:
    """One estimator.

    yields: the maps of one forward pass. load: "module:function", called with device, dtype, weights and the settings.
    weights: the checkpoint's folder, an fsspec URL, or where it is published; None for rules without weights. files: what is
    needed of it (names or patterns); their digest goes into the fingerprint. version: raised whenever the code gives other
    maps for the same weights and settings. free: whether the licence lets everybody use it for everything. architecture:
    names, with blanks between, by which a folder of one's own is recognised. resolution: the size at which it works, in
    words; the numbers are in the settings. batch: the most images at a time; fewer where memory is short (extract.run.batches).
    params_m: millions of parameters. image_mb: the memory that one more image of a batch takes, about, in bfloat16 at that
    resolution. compile: whether torch compiles the networks (extract.estimators.compiled). origin: the .toml of a row that
    is not the table's.
    """

    name: str
    yields: tuple[str, ...]
    what: str
    licence: str
    load: str
    version: int = 1
    weights: Weights | None = None
    files: tuple[str, ...] = ANY_FILES
    free: bool = True
    architecture: str = ""
    resolution: str = ""
    batch: int = 8
    params_m: float = 0.0
    image_mb: int = 0
    compile: bool = False
    origin: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EstimatorSet:
    """Which row makes which intrinsic. note: said once at the start of a run over anything but the demo world.

    own: the rows that are not those of the table, by name.
    """

    name: str
    rows: Mapping[str, str]
    note: str = ""
    own: Mapping[str, EstimatorRow] = field(default_factory=dict)

    def row(self, intrinsic: str) -> EstimatorRow:
        name = self.rows[intrinsic]
        return self.own[name] if name in self.own else ROWS[name]


def _row(name: str, columns: Mapping[str, Any], rows: Mapping[str, EstimatorRow], where: str) -> EstimatorRow:
    """A row from its table in a .toml. like: the row that gives what is not there. `repo` and `revision`, or `weights` (a
    folder or an fsspec URL), say where its checkpoint is."""
    given = dict(columns)
    like, repo, revision, weights = (given.pop(key, None) for key in ("like", "repo", "revision", "weights"))
    if like is not None and like not in rows:
        raise UsageError(f"{where}: row.{name}.like: there is no estimator {like!r}; the table has {', '.join(rows)}")
    base = dict(vars(rows[like])) if like else {}
    place: Weights | None = base.pop("weights", None)
    given["settings"] = {**base.get("settings", {}), **given.get("settings", {})}
    if repo or revision:
        known = (
            place if isinstance(place, Published) and not repo else Published("")
        )  # a revision is one of its repository
        place = Published(str(repo or known.repo), str(revision or known.revision))
    elif weights is not None:
        place = str(weights) if "://" in str(weights) else Path(str(weights)).expanduser()
    row = load_config(EstimatorRow, base, given, {"name": name}, where=f"row.{name}")
    if unknown := sorted(set(row.yields) - set(INTRINSICS)):
        raise UsageError(f"{where}: row.{name} yields {unknown[0]!r}; the intrinsics are {', '.join(INTRINSICS)}")
    return replace(row, weights=place)


def _set(name: str, columns: Mapping[str, Any], where: str) -> EstimatorSet:
    """A set from its table: a row for each intrinsic, and a note."""
    rows = {key: value for key, value in columns.items() if key != "note"}
    if unknown := sorted(set(rows) - set(INTRINSICS)):
        raise UsageError(f"{where}: there is no intrinsic {unknown[0]!r}; the intrinsics are {', '.join(INTRINSICS)}")
    return EstimatorSet(name=name, rows=rows, note=str(columns.get("note", "")))


def _read_table() -> tuple[dict[str, EstimatorRow], dict[str, EstimatorSet]]:
    table = read_toml(HERE / TABLE)
    rows: dict[str, EstimatorRow] = {}
    for name, columns in table["row"].items():
        rows[name] = _row(name, columns, rows, TABLE)
    rows["demo-net"] = replace(rows["demo-net"], weights=HERE / "weights" / "demo")
    return rows, {name: _set(name, columns, TABLE) for name, columns in table["set"].items()}


ROWS, SETS = _read_table()


def find_set(chosen: str) -> EstimatorSet:
    """What --estimators means: a set of the table, one of its rows, a .toml, or a folder with a checkpoint.

    A .toml names a row for each intrinsic (depth = "depth-pro"), on top of a set (like = "light") or from nothing, and may
    describe rows of its own: [row.mine] like = "depth-pro", weights = "/my/folder". A folder makes the maps of the row whose
    format it has. Raises UsageError.
    """
    if chosen in SETS:
        return SETS[chosen]
    if chosen in ROWS:
        return EstimatorSet(name=chosen, rows=dict.fromkeys(ROWS[chosen].yields, chosen))
    if chosen.endswith(".toml"):
        return _read_set(Path(chosen))
    if Path(chosen).is_dir():
        row = _recognised(Path(chosen))
        return EstimatorSet(name=chosen, rows=dict.fromkeys(row.yields, row.name), own={row.name: row})
    raise UsageError(
        f"there is no estimator set {chosen!r}; the sets are {', '.join(SETS)}; `python -m extract --list-estimators` shows "
        "the estimators, each of which can be used alone; a .toml and a folder with a checkpoint work too, if they exist"
    )


def _read_set(path: Path) -> EstimatorSet:
    table = read_toml(path)
    like, own_tables = table.pop("like", None), table.pop("row", {})
    if like is not None and like not in SETS:
        raise UsageError(f"{path}: there is no estimator set {like!r}; the sets are {', '.join(SETS)}")
    if not isinstance(own_tables, Mapping) or not all(isinstance(columns, Mapping) for columns in own_tables.values()):
        raise UsageError(f"{path}: rows of your own are tables such as [row.mine]")
    own = {}
    for name, columns in own_tables.items():
        if "like" not in columns or "load" in columns:  # the table's code only: a .toml brings none
            raise UsageError(f"{path}: row.{name} needs like = the row of the table whose format it has, and no load")
        own[name] = replace(_row(name, columns, ROWS, str(path)), origin=str(path))
    given = _set(path.stem, table, str(path))
    chosen = EstimatorSet(
        name=str(path), rows={**(SETS[like].rows if like else {}), **given.rows}, note=given.note, own=own
    )
    for intrinsic, name in chosen.rows.items():
        if name not in own and name not in ROWS:
            raise UsageError(f"{path}: there is no estimator {name!r}; the table has {', '.join(ROWS)}")
        if intrinsic not in chosen.row(intrinsic).yields:
            raise UsageError(f"{path}: {name} makes no {intrinsic}; it makes {', '.join(chosen.row(intrinsic).yields)}")
    return chosen


def _recognised(folder: Path) -> EstimatorRow:
    """A row for a checkpoint folder: like the first of the table that has its architecture."""
    for file, key in (("model_index.json", "_class_name"), ("config.json", "architectures")):
        if (folder / file).is_file():
            try:
                found = json.loads((folder / file).read_text(encoding="utf-8")).get(key)
            except (ValueError, AttributeError) as error:
                raise UsageError(f"{folder / file} is damaged: {error}") from error
            names = found if isinstance(found, list) else [found]
            for row in ROWS.values():
                if set(row.architecture.split()) & {str(name) for name in names}:
                    return replace(row, name=f"{row.name}-own", weights=folder, what=f"{folder}, as {row.name}")
    raise UsageError(
        f"{folder}: its format is not recognised; say which estimator it is like, in a .toml: [row.mine] like = ..., "
        f'weights = "{folder}"'
    )


@dataclass(frozen=True)
class Task:
    """A row and the maps that are wanted of it."""

    row: EstimatorRow
    intrinsics: tuple[str, ...]


def tasks_of(chosen: EstimatorSet, only: tuple[str, ...] = ()) -> list[Task]:
    """What is to be run for the intrinsics `only` (all if empty): each row once, in the order of the table of intrinsics."""
    unknown = sorted(set(only) - set(INTRINSICS))
    if unknown:
        raise UsageError(f"there is no intrinsic {unknown[0]!r}; the intrinsics are {', '.join(INTRINSICS)}")
    wanted = [name for name in INTRINSICS if name in chosen.rows and (not only or name in only)]
    lacking = [name for name in only if name not in chosen.rows]
    if lacking:
        raise UsageError(f"the estimators {chosen.name!r} make no {lacking[0]}; they make {', '.join(chosen.rows)}")
    rows = list(dict.fromkeys(chosen.rows[name] for name in wanted))
    by_name = {chosen.rows[name]: chosen.row(name) for name in wanted}
    return [Task(by_name[row], tuple(name for name in wanted if chosen.rows[name] == row)) for row in rows]


def folder_of(row: EstimatorRow) -> Path | None:
    """The folder of the row's checkpoint on this machine; None for a rule. Raises UserError if it is not there."""
    return None if row.weights is None else locate(row.weights, row.files, row.name, row.origin)


def fingerprint(row: EstimatorRow) -> dict[str, Any]:
    """What decides the maps of a row: name, weights (sha256), settings, code version; and a short id of all this."""
    folder = folder_of(row)
    body = {
        "name": row.name,
        "weights": digest_of(folder, row.files) if folder else "",
        "settings": dict(row.settings),
        "version": row.version,
    }
    return {"id": f"{row.name}@{digest(body)[:8]}", **body}


def load(row: EstimatorRow, device: str, dtype: str = "float32") -> Estimator:
    """The estimator of a row, ready on `device` ("cpu", "cuda", ...) in `dtype`. Raises UserError for a bad checkpoint."""
    module, function = row.load.split(":")
    make = getattr(importlib.import_module(module), function)
    estimator: Estimator = make(device=device, dtype=dtype, weights=folder_of(row), **row.settings)
    if row.compile:
        importlib.import_module("extract.estimators.compiled").compile_networks(estimator, row.name)
    return estimator
