"""From scores to a table: a row for each method, each value with its interval, and the difference from the base.

OUT/table.md  OUT/table.json  OUT/sheet.png
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from infer.evaluation.compare import RESAMPLES, Estimate, difference, draws, mean, of_sets
from infer.evaluation.fidelity import Standard, fid, kernels
from infer.evaluation.generate import BASE, Arrays
from infer.evaluation.scores import AGREE, LAYOUT, PLAUSIBLE, Measure

SET_RESAMPLES = 200
"""Resamples of measures of whole sets, which are dearer."""
FIDELITY = (
    Measure("fid_real", "FID, renderings", -1, share=False),
    Measure("cmmd_real", "CMMD, renderings", -1, share=False),
    Measure("fid_base", "FID, base", -1, share=False),
    Measure("cmmd_base", "CMMD, base", -1, share=False),
)


CLIP = "clip_features"
CMMD_CLIP = Measure("cmmd_clip", "CMMD (CLIP), base", -1, share=False)


@dataclass(frozen=True)
class Scored:
    """All scores of a method. prompt: int (N,), which prompt of the set each image belongs to."""

    name: str
    prompt: np.ndarray
    scores: Arrays


@dataclass(frozen=True)
class MethodRow:
    """One method: values and differences from the base, by measure. images: how many."""

    name: str
    images: int
    values: dict[str, Estimate]
    against_base: dict[str, Estimate] = field(default_factory=dict)


def join(name: str, blocks: Sequence[tuple[range, Arrays]]) -> Scored:
    """Blocks of (numbers of their prompts, scores) as one; a measure that a block lacks is NaN there."""
    prompt = np.concatenate([np.array(numbers) for numbers, _ in blocks])
    keys = sorted({key for _, arrays in blocks for key in arrays})
    scores = {}
    for key in keys:
        like = next(arrays[key] for _, arrays in blocks if key in arrays)
        parts = [
            arrays.get(key, np.full((len(numbers), *like.shape[1:]), np.nan, np.float32)) for numbers, arrays in blocks
        ]
        scores[key] = np.concatenate(parts)
    return Scored(name, prompt, scores)


def rows_of(
    methods: Sequence[Scored], prompts: int, reference: np.ndarray | None, measures: Sequence[Measure]
) -> list[MethodRow]:
    """A row for each method. reference: features (N, F) of real renderings, or None. Differences are from the base's row."""
    drawn, few = draws(prompts, RESAMPLES), draws(prompts, SET_RESAMPLES)
    base = next((one for one in methods if one.name == BASE), None)
    standard = Standard.of(reference) if reference is not None else None
    rows = []
    for one in methods:
        keys = [m.key for m in measures if m.key in one.scores and np.isfinite(one.scores[m.key]).any()]
        values = {key: mean(one.scores[key], one.prompt, drawn) for key in keys}
        against = {}
        if base is not None and one is not base:
            shared = [key for key in keys if key in base.scores and np.isfinite(base.scores[key]).any()]
            against = {
                key: difference(one.scores[key], one.prompt, base.scores[key], base.prompt, drawn) for key in shared
            }
        if reference is not None and standard is not None and "features" in one.scores:
            real = standard(reference)
            values |= _fidelity(standard(one.scores["features"]), one.prompt, real, few, "real")
            if base is not None and one is not base:
                values |= _fidelity(
                    standard(one.scores["features"]), one.prompt, standard(base.scores["features"]), few, "base"
                )
        if base is not None and one is not base and CLIP in one.scores and CLIP in base.scores:
            among = kernels(one.scores[CLIP], base.scores[CLIP])
            values["cmmd_clip"] = of_sets(among.cmmd, one.prompt, few)
        rows.append(MethodRow(one.name, len(one.prompt), values, against))
    return rows


def _fidelity(
    features: np.ndarray, prompt: np.ndarray, reference: np.ndarray, drawn: np.ndarray, name: str
) -> dict[str, Estimate]:
    among = kernels(features, reference)
    measures: dict[str, Callable[[np.ndarray], float]] = {
        f"fid_{name}": lambda weights: fid(features, reference, weights),
        f"cmmd_{name}": among.cmmd,
    }
    return {key: of_sets(measure, prompt, drawn) for key, measure in measures.items()}


# ---- as text ---------------------------------------------------------------------------------------------------------

GROUPS: Mapping[str, Sequence[Measure]] = {
    "Layout: share of images": LAYOUT,
    "Plausibility: share of images": PLAUSIBLE,
    "Agreement of the made maps with estimators": AGREE,
    "Fidelity": FIDELITY,
}


def markdown(
    title: str, rows: Sequence[MethodRow], groups: Mapping[str, Sequence[Measure]], notes: Sequence[str]
) -> str:
    """The tables: one of values and one of differences for each group that has any."""
    parts = [f"# {title}", *notes]
    for heading, measures in groups.items():
        there = [m for m in measures if any(m.key in row.values for row in rows)]
        if not there:
            continue
        parts.append(f"## {heading}")
        parts.append(_table(there, [(f"{r.name} ({r.images})", r.values) for r in rows], _value))
        if differ := [(row.name, row.against_base) for row in rows if any(m.key in row.against_base for m in there)]:
            parts.append(
                "Difference from the base, over the same captions and seeds (**bold**: the interval excludes 0):"
            )
            parts.append(_table([m for m in there if any(m.key in v for _, v in differ)], differ, _change))
    return "\n\n".join(parts) + "\n"


def _table(
    measures: Sequence[Measure],
    rows: Sequence[tuple[str, Mapping[str, Estimate]]],
    cell: Callable[[Measure, Estimate], str],
) -> str:
    heads = [f"{m.title} {'up' if m.better > 0 else 'down'}" for m in measures]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, values in rows:
        cells = [cell(m, values[m.key]) if m.key in values else "" for m in measures]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _value(measure: Measure, estimate: Estimate) -> str:
    scale, digits = (100, 1) if measure.share else (1, 3)
    low, high = (f"{scale * bound:.{digits}f}" for bound in (estimate.low, estimate.high))
    return f"{scale * estimate.value:.{digits}f} ({low} .. {high})"


def _change(measure: Measure, estimate: Estimate) -> str:
    scale, digits = (100, 1) if measure.share else (1, 3)
    value, low, high = (f"{scale * x:+.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    text = f"{value} ({low} .. {high})"
    return f"**{text}**" if estimate.low > 0 or estimate.high < 0 else text


def as_json(title: str, rows: Sequence[MethodRow], about: Mapping[str, Any]) -> bytes:
    """The same as numbers. Values that are not finite become null."""

    def plain(estimate: Estimate) -> dict[str, float | None]:
        return {k: round(v, 6) if np.isfinite(v) else None for k, v in asdict(estimate).items()}

    table = [
        {
            "method": row.name,
            "images": row.images,
            "values": {key: plain(value) for key, value in row.values.items()},
            "against_base": {key: plain(value) for key, value in row.against_base.items()},
        }
        for row in rows
    ]
    return json.dumps({"title": title, **about, "rows": table}, indent=1, allow_nan=False).encode() + b"\n"
