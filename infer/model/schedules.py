"""The weight w(l, t) on what the image takes from the intrinsics (eq. 4), per stage l and timestep t: schedules.

    Off       w = 0: the image is the base model's
    Joint     w = 1: as in training
    Drop      w = 1 if l in L and t <= tau, else 0                                                    (paper, eq. 2)
    Gaussian  w = alpha exp(-(t - tau)^2 / sigma^2), the same in every stage                          (paper, eq. 3)
    Table     any w over stage x timestep, from a file; linear between its timesteps

Timesteps are those of the training noise schedule, 0 (clean) to 1000 (noise), fractions included. Stages count from 1:
stages.py says what they are in each base, and holds the default L, tau, sigma of each.
"""

import csv
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from shards.core.errors import UserError

NEGLIGIBLE = 1e-6  # a smaller weight is taken for 0: the intrinsics no longer matter to the image
TIMESTEPS = 1000.0


@dataclass(frozen=True)
class Schedule:
    """w(stage, timestep) >= 0. Immutable and hashable; to_dict and from_dict go to JSON and back."""

    name: ClassVar[str]
    constant: ClassVar[bool] = False  # True: w depends on neither stage nor timestep

    def w(self, stage: int, timestep: float) -> float:
        """The weight in this stage (from 1) at this timestep (0 to 1000)."""
        raise NotImplementedError(f"{type(self).__name__} must define w(stage, timestep)")

    def at(self, timestep: float, stages: int) -> tuple[float, ...]:
        """The weights of stages 1..stages; those below 1e-6 are exactly 0. UserError outside the timesteps 0 to 1000."""
        if not self.constant and not 0 <= timestep <= TIMESTEPS:
            raise UserError(
                f"schedule {self.name} was asked for timestep {timestep}, outside 0 to {TIMESTEPS:.0f}: "
                "use a scheduler whose timesteps are those of training."
            )
        weights = (self.w(stage, timestep) for stage in range(1, stages + 1))
        return tuple(w if w >= NEGLIGIBLE else 0.0 for w in weights)

    def check(self, stages: int) -> None:
        """UserError unless this schedule is one for a network of so many stages."""

    def last_active(self, timesteps: Sequence[float], stages: int) -> int:
        """Index of the last step whose weights are not all 0; -1 if there is none. After it the intrinsics don't matter."""
        active = [i for i, t in enumerate(timesteps) if any(self.at(t, stages))]
        return active[-1] if active else -1

    def to_dict(self) -> dict[str, Any]:
        """{"name": ..., and the fields}; JSON types only."""
        return {"name": self.name, **json.loads(json.dumps(asdict(self)))}


@dataclass(frozen=True)
class Off(Schedule):
    """w = 0 everywhere: the image stream is exactly the base model."""

    name: ClassVar[str] = "off"
    constant: ClassVar[bool] = True

    def w(self, stage: int, timestep: float) -> float:
        return 0.0


@dataclass(frozen=True)
class Joint(Schedule):
    """w = 1 everywhere: eq. 1, as in training."""

    name: ClassVar[str] = "joint"
    constant: ClassVar[bool] = True

    def w(self, stage: int, timestep: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Drop(Schedule):
    """Eq. 2. Tends to refine detail and keep the composition."""

    tau: float = 900.0
    stages: tuple[int, ...] = (3, 4, 5, 6, 7)
    name: ClassVar[str] = "drop"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(sorted({int(stage) for stage in self.stages})))
        if any(stage < 1 for stage in self.stages):
            raise UserError(f"schedule drop has stages {list(self.stages)}: stages count from 1.")

    def check(self, stages: int) -> None:
        if beyond := [stage for stage in self.stages if stage > stages]:
            raise UserError(f"schedule drop names stage {beyond[0]}, but this base has {stages} stages.")

    def w(self, stage: int, timestep: float) -> float:
        return 1.0 if stage in self.stages and timestep <= self.tau else 0.0


@dataclass(frozen=True)
class Gaussian(Schedule):
    """Eq. 3. Tends to change the composition."""

    alpha: float = 1.0
    tau: float = 800.0
    sigma: float = 100.0
    name: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and self.alpha >= 0 and math.isfinite(self.alpha + self.sigma + self.tau)):
            raise UserError(f"schedule gaussian has alpha={self.alpha}, sigma={self.sigma}: alpha >= 0 and sigma > 0.")

    def w(self, stage: int, timestep: float) -> float:
        return self.alpha * math.exp(-(((timestep - self.tau) / self.sigma) ** 2))


@dataclass(frozen=True)
class Table(Schedule):
    """Weights at given timesteps (rising), one row of stage weights for each; linear between, constant beyond."""

    timesteps: tuple[float, ...] = field()
    weights: tuple[tuple[float, ...], ...] = field()  # [timestep][stage - 1]
    name: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        rows = sorted(zip(self.timesteps, self.weights, strict=False), key=lambda row: row[0])
        times = tuple(float(t) for t, _ in rows)
        weights = tuple(tuple(float(w) for w in row) for _, row in rows)
        if not rows or len(self.timesteps) != len(self.weights) or len(set(times)) != len(times):
            raise UserError("schedule table needs one row of weights for each timestep, and no timestep twice.")
        if len({len(row) for row in weights}) != 1 or not weights[0]:
            raise UserError("schedule table has rows of different lengths: give one weight per stage in every row.")
        if not all(0 <= t <= TIMESTEPS for t in times):
            raise UserError(f"schedule table has a timestep outside 0 to {TIMESTEPS:.0f}: those of training.")
        if not all(math.isfinite(w) and w >= 0 for row in weights for w in row):
            raise UserError("schedule table has a weight that is negative or not finite: weights are 0 or more.")
        object.__setattr__(self, "timesteps", times)
        object.__setattr__(self, "weights", weights)

    def check(self, stages: int) -> None:
        if len(self.weights[0]) != stages:
            raise UserError(f"schedule table has {len(self.weights[0])} stages, but this base has {stages}.")

    def w(self, stage: int, timestep: float) -> float:
        if not 1 <= stage <= len(self.weights[0]):
            raise UserError(
                f"schedule table has {len(self.weights[0])} stages, but the network asks for stage {stage}."
            )
        times = self.timesteps
        if timestep <= times[0] or timestep >= times[-1]:
            return self.weights[0 if timestep <= times[0] else -1][stage - 1]
        i = max(i for i, t in enumerate(times) if t <= timestep)
        mix = (timestep - times[i]) / (times[i + 1] - times[i])
        return (1 - mix) * self.weights[i][stage - 1] + mix * self.weights[i + 1][stage - 1]

    @classmethod
    def load(cls, path: str | Path) -> "Table":
        """Read .csv (header `timestep,1,2,...`, a row per timestep), or .json/.toml with `timesteps` and `weights`.

        A header may name the stages in any order; .json and .toml may do so by `stages`. UserError for anything else.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix == ".csv":
                stages, times, rows = _csv_table(text)
            else:
                table = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
                if unknown := sorted(set(table) - {"timesteps", "weights", "stages"}):
                    raise ValueError(f"it has {unknown[0]!r}, which is none of timesteps, weights, stages")
                times, rows = table["timesteps"], table["weights"]
                stages = table.get("stages") or list(range(1, len(rows[0]) + 1))
            return cls(tuple(times), tuple(_in_order(stages, row) for row in rows))
        except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError, csv.Error) as error:
            raise UserError(
                f"schedule table {path} could not be read ({error}): see docs/method.md for its form."
            ) from error


def _csv_table(text: str) -> tuple[list[int], list[float], list[list[float]]]:
    """Stages by column, timesteps, rows of weights. Raises ValueError, naming the line."""
    lines = [(n, row) for n, row in enumerate(csv.reader(text.splitlines()), 1) if any(map(str.strip, row))]
    if not lines:
        raise ValueError("it is empty")
    header = [cell.strip().lower() for cell in lines[0][1]]
    if header[0] not in ("timestep", "t") or not all(cell.removeprefix("l=").isdecimal() for cell in header[1:]):
        raise ValueError(f"its header is {','.join(lines[0][1])!r}, not timestep,1,2,... with a number for each stage")

    numbers = []
    for number, row in lines[1:]:
        if len(row) != len(header):
            raise ValueError(f"line {number} has {len(row)} columns, its header {len(header)}")
        try:
            numbers.append([float(cell) for cell in row])
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    stages = [int(cell.removeprefix("l=")) for cell in header[1:]]
    return stages, [row[0] for row in numbers], [row[1:] for row in numbers]


def _in_order(stages: Sequence[int], row: Sequence[float]) -> tuple[float, ...]:
    """Weights of the stages that the columns are for -> weights of stages 1, 2, ... Raises ValueError."""
    if sorted(stages) != list(range(1, len(stages) + 1)):
        raise ValueError(f"its columns are for stages {list(stages)}: each from 1 to {len(stages)} must be there once")
    return tuple(weight for _, weight in sorted(zip(stages, row, strict=True)))


KINDS: dict[str, type[Schedule]] = {kind.name: kind for kind in (Off, Joint, Drop, Gaussian, Table)}


def from_dict(described: dict[str, Any]) -> Schedule:
    """The inverse of Schedule.to_dict. UserError for an unknown name or field."""
    rest = dict(described)
    kind = KINDS.get(rest.pop("name", ""))
    if kind is None:
        raise UserError(f"there is no schedule {described.get('name')!r}: choose one of {', '.join(KINDS)}.")
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(rest) - known):
        raise UserError(
            f"schedule {kind.name} has no setting {unknown[0]!r}; it has: {', '.join(sorted(known)) or 'none'}."
        )
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in rest.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"schedule {kind.name} does not take {rest}: {error}.") from error


def is_table(text: str) -> bool:
    """Whether a schedule of the command line is a table's file."""
    return Path(text).suffix in (".csv", ".json", ".toml")


def parse(text: str, defaults: dict[str, dict[str, Any]] | None = None) -> Schedule:
    """A schedule from the command line: "off", "gaussian", "gaussian:tau=700,sigma=80", "drop:stages=3-7", or a table's file.

    defaults: settings by schedule name, those of the base (stages.StageMap.defaults); what the text says wins.
    """
    if is_table(text):
        return Table.load(text)
    name, _, settings = text.partition(":")
    described: dict[str, Any] = {"name": name, **(defaults or {}).get(name, {})}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        try:
            described[key] = _stages(value) if key == "stages" else float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise UserError(f"schedule {text!r}: {setting!r} is not a setting like tau=800 or stages=3-7.")
    return from_dict(described)


def _stages(text: str) -> tuple[int, ...]:
    """ "3-7" -> (3, 4, 5, 6, 7); "1+5" -> (1, 5)."""
    spans = [part.split("-") for part in text.split("+")]
    return tuple(stage for span in spans for stage in range(int(span[0]), int(span[-1]) + 1))


def grid_text(schedule: Schedule, stages: int, timesteps: Sequence[float] = tuple(range(950, -1, -50))) -> str:
    """The schedule as a text grid: a line per timestep (sampling order), a column per stage."""
    head = f"{'t':>6} | " + " ".join(f"{'l=' + str(stage):>5}" for stage in range(1, stages + 1))
    lines = [
        f"{t:6.0f} | " + " ".join(f"{w:5.2f}" if w else "    ." for w in schedule.at(t, stages)) for t in timesteps
    ]
    return "\n".join([head, "-" * len(head), *lines])
