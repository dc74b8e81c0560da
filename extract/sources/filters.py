"""Filters on the columns of a table, or on the fields of a sample, applied before anything is downloaded or decoded.

Each drop has its reason. A filter that is not set costs nothing and asks for no column. A row whose value is missing
(null, NaN, no number) is dropped by a filter that needs it, unless `missing` is "keep".
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from extract.sources.values import column_values
from shards.core.errors import UsageError

# What each quantity is called in published tables (any mix of upper and lower case).
USUAL_COLUMNS: dict[str, tuple[str, ...]] = {
    "aesthetic": ("aesthetic_score", "aesthetic", "aesthetic_score_laion_v2"),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "unsafe": ("punsafe", "nsfw_score_opennsfw2"),
    "watermark": ("pwatermark", "watermark_score"),
    "similarity": ("similarity", "clip_l14_similarity_score", "clip_similarity_vitl14"),
}

Column: TypeAlias = Sequence[Any] | pa.Array
"""The values of a column, or of a part of it."""


def listed(column: Column) -> Sequence[Any]:
    """The values as JSON's own: those of a parquet file are converted exactly as when its rows are read."""
    return column_values(column) if isinstance(column, pa.Array) else column


@dataclass(frozen=True)
class Filters:
    """What a row must have. None: no such filter.

    min_aesthetic, min_similarity: scores, at least. max_unsafe, max_watermark: probabilities, at most.
    min_side_px, max_side_px: of the shorter and the longer side. max_aspect: longer side over shorter one, at most.
    min_caption, max_caption: characters of the caption, without white space around it.
    caption_scripts: at least min_script_share of the caption's letters must be of these Unicode scripts ("Latin",
        "Cyrillic", "Han", ...); a caption without letters does not pass.
    *_column: where the table has the quantity; found by its usual names if not given.
    """

    min_aesthetic: float | None = None
    min_similarity: float | None = None
    max_unsafe: float | None = None
    max_watermark: float | None = None
    min_side_px: int | None = None
    max_side_px: int | None = None
    max_aspect: float | None = None
    min_caption: int | None = None
    max_caption: int | None = None
    caption_scripts: tuple[str, ...] = ()
    min_script_share: float = 0.9
    missing: Literal["drop", "keep"] = "drop"
    aesthetic_column: str | None = None
    similarity_column: str | None = None
    unsafe_column: str | None = None
    watermark_column: str | None = None
    width_column: str | None = None
    height_column: str | None = None

    def __post_init__(self) -> None:
        if self.max_aspect is not None and self.max_aspect < 1:
            raise UsageError(f"filters.max_aspect = {self.max_aspect} must be at least 1")
        if not 0 <= self.min_script_share <= 1:
            raise UsageError(f"filters.min_script_share = {self.min_script_share} must be between 0 and 1")
        for low, high in (("min_side_px", "max_side_px"), ("min_caption", "max_caption")):
            smallest, largest = getattr(self, low), getattr(self, high)
            if smallest is not None and largest is not None and smallest > largest:
                raise UsageError(f"filters.{low} = {smallest} is above filters.{high} = {largest}")
        for script in self.caption_scripts:
            try:
                pc.count_substring_regex(pa.array(["x"]), rf"\p{{{script}}}")
            except pa.ArrowInvalid as error:
                raise UsageError(f"filters.caption_scripts: {script!r} is no Unicode script; try 'Latin'") from error

    @property
    def needs(self) -> tuple[str, ...]:
        """The quantities of USUAL_COLUMNS that the filters need."""
        sides = (self.min_side_px, self.max_side_px, self.max_aspect)
        wanted = {
            "aesthetic": self.min_aesthetic is not None,
            "width": any(side is not None for side in sides),
            "height": any(side is not None for side in sides),
            "unsafe": self.max_unsafe is not None,
            "watermark": self.max_watermark is not None,
            "similarity": self.min_similarity is not None,
        }
        return tuple(name for name, needed in wanted.items() if needed)

    @property
    def needs_captions(self) -> bool:
        return bool(self.caption_scripts) or self.min_caption is not None or self.max_caption is not None

    @property
    def active(self) -> bool:
        """Whether there is any filter at all."""
        return bool(self.needs) or self.needs_captions

    def columns(self, available: Sequence[str], table: str) -> dict[str, str]:
        """Which column holds each quantity of `needs`. Raises UsageError if the table lacks one."""
        found: dict[str, str] = {}
        for quantity in self.needs:
            given = getattr(self, f"{quantity}_column")
            usual = (given,) if given else USUAL_COLUMNS[quantity]
            by_name = {name if given else name.lower(): name for name in available}
            name = next((by_name[candidate] for candidate in usual if candidate in by_name), None)
            if name is None:
                raise UsageError(
                    f"a filter needs the column {' or '.join(usual)}, but {table} has only {', '.join(available)}; name "
                    f"it with source.filters.{quantity}_column, or leave the filter out"
                )
            found[quantity] = name
        return found

    def drops(self, values: Mapping[str, Column], captions: Sequence[str]) -> list[tuple[str, str] | None]:
        """For each row, (reason, message) if it is dropped.

        values: for each quantity of `needs`, the rows' values: numbers, text that is a number, or None.
        """
        outcome: list[tuple[str, str] | None] = [None] * len(captions)
        for reason, bad, message in self._checks(values, captions):
            for row in np.flatnonzero(bad):
                if outcome[row] is None:
                    outcome[row] = (reason, message(int(row)))
        return outcome

    def passing(self, values: Mapping[str, Column], captions: Sequence[str]) -> np.ndarray:
        """For each row, whether drops() lets it pass, as booleans; for many rows, of which nobody asks why."""
        passing = np.ones(len(captions), bool)
        for _, bad, _ in self._checks(values, captions):
            passing &= ~bad
        return passing

    def drop(self, fields: Mapping[str, Any], caption: str) -> tuple[str, str] | None:
        """(reason, message) if a single sample is dropped, by fields of its own; one that it lacks has no value."""
        if not self.active:
            return None
        values = {quantity: [self._field(quantity, fields)] for quantity in self.needs}
        return self.drops(values, [caption])[0]

    def _field(self, quantity: str, fields: Mapping[str, Any]) -> Any:
        given = getattr(self, f"{quantity}_column")
        if given:
            return fields.get(given)
        by_name = {name.lower(): value for name, value in fields.items()}
        return next((by_name[name] for name in USUAL_COLUMNS[quantity] if name in by_name), None)

    def _checks(self, values: Mapping[str, Column], captions: Sequence[str]) -> list["_Check"]:
        numbers = {quantity: as_numbers(values[quantity]) for quantity in self.needs}
        return [*self._numeric(numbers), *self._textual(captions)]

    def _numeric(self, numbers: Mapping[str, np.ndarray]) -> list["_Check"]:
        bounds = (
            ("filtered_aesthetic", "aesthetic", self.min_aesthetic, None),
            ("filtered_similarity", "similarity", self.min_similarity, None),
            ("filtered_unsafe", "unsafe", None, self.max_unsafe),
            ("filtered_watermark", "watermark", None, self.max_watermark),
        )
        checks = [
            self._bounded(reason, name, numbers[name], low, high)
            for reason, name, low, high in bounds
            if low is not None or high is not None
        ]
        if "width" in numbers:
            with np.errstate(invalid="ignore", divide="ignore"):
                shorter = np.minimum(numbers["width"], numbers["height"])
                longer = np.maximum(numbers["width"], numbers["height"])
                aspect = longer / shorter
            if self.min_side_px is not None:
                checks.append(self._bounded("filtered_size", "shorter side", shorter, self.min_side_px, None))
            if self.max_side_px is not None:
                checks.append(self._bounded("filtered_size", "longer side", longer, None, self.max_side_px))
            if self.max_aspect is not None:
                checks.append(self._bounded("filtered_aspect", "aspect ratio", aspect, None, self.max_aspect))
        return checks

    def _bounded(self, reason: str, name: str, numbers: np.ndarray, low: float | None, high: float | None) -> "_Check":
        with np.errstate(invalid="ignore"):
            bad = np.isnan(numbers) & (self.missing == "drop")
            if low is not None:
                bad |= numbers < low
            if high is not None:
                bad |= numbers > high
        bound = f"below {low:g}" if low is not None else f"above {high:g}"

        def message(row: int) -> str:
            value = float(numbers[row])
            return f"its {name} is not stated" if math.isnan(value) else f"its {name} {value:g} is {bound}"

        return reason, bad, message

    def _textual(self, captions: Sequence[str]) -> list["_Check"]:
        checks: list[_Check] = []
        if self.min_caption is not None or self.max_caption is not None:
            lengths = np.array([len(caption.strip()) for caption in captions], np.float64)
            name = "number of caption characters"
            if self.min_caption is not None:
                checks.append(self._bounded("filtered_caption_length", name, lengths, self.min_caption, None))
            if self.max_caption is not None:
                checks.append(self._bounded("filtered_caption_length", name, lengths, None, self.max_caption))
        if self.caption_scripts:
            texts = pa.array([caption.encode("utf-8", "replace").decode() for caption in captions], pa.string())
            letters = pc.count_substring_regex(texts, r"\p{L}").to_numpy()
            classes = "".join(rf"\p{{{script}}}" for script in self.caption_scripts)
            # \p{Latin} has signs that are no letters; what is counted must be both.
            others = pc.count_substring_regex(texts, rf"[^\P{{L}}{classes}]").to_numpy()
            share = np.where(letters > 0, (letters - others) / np.maximum(letters, 1), 0.0)
            name = f"share of {'/'.join(self.caption_scripts)} letters"
            checks.append(self._bounded("filtered_caption_script", name, share, self.min_script_share, None))
        return checks


_Check = tuple[str, np.ndarray, Callable[[int], str]]
"""A reason, the rows that it drops as booleans, and the message for one of them."""


def as_numbers(values: Column) -> np.ndarray:
    """float64; NaN for what is missing or not a number."""
    if isinstance(values, pa.Array) and (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        numbers = values.cast(pa.float64(), safe=False).fill_null(math.nan)
        return np.asarray(numbers.to_numpy(zero_copy_only=False))
    return np.array([_number(value) for value in listed(values)], np.float64)


def _number(value: Any) -> float:
    if value is None or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
