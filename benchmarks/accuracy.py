"""The embedded estimators against ground truth: unseen scenes of the demo world, at 256 px.

    python -m benchmarks.accuracy [--scenes 500] [--weights FOLDER]

Beside them stand trivial predictors: constant depth and constant normals (the camera's direction), no line, one segment.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from extract.estimators.null import estimate as trivial
from extract.estimators.table import ROWS, load
from extract.world import Rendering, compose, render
from shards.intrinsics import IntrinsicMap
from shards.metrics import abs_rel, angular_error, delta_1, edge_f_score, median_scaled, segment_boundaries

UNSEEN_SEED = 7_000_001
GOALS = {
    "depth AbsRel (median-scaled)": "<= 0.10",
    "depth delta_1": ">= 0.90",
    "normals, mean angular error (degrees)": "<= 12",
    "outlines, F-score at 2 px": ">= 0.75",
    "segment boundaries, F-score at 2 px": ">= 0.75",
}


def measure(maps: dict[str, IntrinsicMap], truth: Rendering) -> dict[str, float]:
    """All measures of one scene; depth where both sides are finite."""
    z = median_scaled(maps["depth"].values, truth.depth_m)
    lines = maps["line"].values > 0.5, truth.line > 0.5
    borders = segment_boundaries(maps["segmentation"].values), segment_boundaries(truth.segmentation)
    values = (
        abs_rel(z, truth.depth_m),
        delta_1(z, truth.depth_m),
        angular_error(maps["normal"].values, truth.normal),
        edge_f_score(*lines),
        edge_f_score(*borders),
    )
    return dict(zip(GOALS, values, strict=True))


def scenes(count: int, size_px: int) -> Iterator[Rendering]:
    for index in range(count):
        yield render(compose(UNSEEN_SEED, index), size_px)


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded estimators against ground truth.")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--weights", type=Path, help="another checkpoint folder than the shipped one")
    given = parser.parse_args()
    row = ROWS["demo-net"]
    estimator = load(replace(row, weights=given.weights) if given.weights else row, "cpu")
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for truth in track(scenes(given.scenes, given.size), "measuring", total=given.scenes):
        for name, maps in (("demo", estimator([truth.image])[0]), ("trivial", trivial([truth.image])[0])):
            for measure_name, value in measure(maps, truth).items():
                found[name][measure_name].append(value)
    table = Table(title=f"{given.scenes} unseen scenes at {given.size} px")
    for column in ("", "demo", "trivial", "goal"):
        table.add_column(column, justify="left" if not column else "right")
    for name, goal in GOALS.items():
        means = [f"{np.nanmean(found[who][name]):.3f}" for who in ("demo", "trivial")]
        table.add_row(name, *means, goal)
    Console().print(table)


if __name__ == "__main__":
    main()
