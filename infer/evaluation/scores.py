"""What is measured of every image: a row of numbers and a feature vector, kept beside the images so that it is made once.

    OUT/scores/METHOD/s0-0000-1a2b3c4d.npz     one array (N,) for each measure, and features (N, F)

NaN means that the measure does not apply to the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from extract.world.grammar import is_caption, parse
from infer.evaluation.agreement import ENLARGED_PX, Estimators, agreement, resized
from infer.evaluation.demo.detector import Detector
from infer.evaluation.demo.layout import Found, judge
from infer.evaluation.demo.pixel_net import Seen
from infer.evaluation.demo.plausibility import plausibility
from infer.evaluation.generate import Arrays, maps_of
from infer.evaluation.hub_metrics import Judge
from shards.intrinsics import IntrinsicMap
from shards.marks import digest

VERSION = 4
"""Raised whenever the code gives other numbers for the same images."""


@dataclass(frozen=True)
class Measure:
    """One column of the table. better: +1 where more is better, -1 where less is. share: shown in per cent."""

    key: str
    title: str
    better: int = 1
    share: bool = True


LAYOUT = (
    Measure("layout", "layout"),
    Measure("layout_2", "layout, 2 objects"),
    Measure("layout_3", "layout, 3 objects"),
    Measure("objects", "objects"),
    Measure("colours", "colours"),
    Measure("once", "each once"),
    Measure("beside", "left/right of"),
    Measure("depthwise", "behind/in front of"),
    Measure("stacked", "on top of"),
)
PLAUSIBLE = (
    Measure("rests", "rests"),
    Measure("order", "depth order"),
    Measure("single", "nothing twice"),
    Measure("whole", "whole shapes"),
)
AGREE = (
    Measure("abs_rel", "AbsRel", -1, share=False),
    Measure("normal_deg", "normals, degrees", -1, share=False),
    Measure("boundary_f", "segment borders, F", 1, share=False),
    Measure("line_f", "lines, F", 1, share=False),
    Measure("order_maps", "depth order, made maps"),
)
_KINDS = {
    "left of": "beside",
    "right of": "beside",
    "behind": "depthwise",
    "in front of": "depthwise",
    "on top of": "stacked",
}


class Scorer:
    """Measures blocks of images: what the detector says, what the estimators say of maps, what hub models say."""

    def __init__(self, detector: Detector | None, estimators: Estimators | None, judges: Sequence[Judge] = ()) -> None:
        """detector: None where images are not of the demo world. estimators: None where maps are not to be judged."""
        self.detector, self.estimators, self.judges = detector, estimators, judges

    def fingerprint(self) -> str:
        """Changes with everything that changes the numbers, but for the judges, whose files have names of their own."""
        about: dict[str, Any] = {"version": VERSION, "estimators": self.estimators.key if self.estimators else ""}
        about |= {"detector": self.detector.fingerprint() if self.detector else "", "enlarged": ENLARGED_PX}
        return digest(about | {"judges": [judge.fingerprint() for judge in self.judges]})[:8]

    def __call__(self, arrays: Arrays, prompts: Sequence[str]) -> Arrays:
        """The scores of one block: {measure: float32 (N,), features: float32 (N, F)}."""
        images = list(arrays["image"])
        rows: list[dict[str, float]] = [{} for _ in images]
        scores: Arrays = {}
        if self.detector is not None:
            looks = self.detector(images)
            scores["features"] = np.stack([seen.features for seen, _ in looks])
            for i, (row, (seen, found), prompt) in enumerate(zip(rows, looks, prompts, strict=True)):
                row |= of_picture(seen, found, prompt, maps_of(arrays, i))
        if self.estimators is not None and "depth" in arrays:
            for i, (row, estimated) in enumerate(zip(rows, self.estimators(images), strict=True)):
                row |= agreement(maps_of(arrays, i), estimated)
        for one in self.judges:
            scores |= one(images, prompts)
        keys = sorted({key for row in rows for key in row})
        return scores | {key: np.array([row.get(key, np.nan) for row in rows], np.float32) for key in keys}


def of_picture(seen: Seen, found: Sequence[Found], prompt: str, maps: dict[str, IntrinsicMap]) -> dict[str, float]:
    """Layout (of prompts that are captions of the demo world) and plausibility of one picture."""
    row = plausibility(seen, found)
    if "depth" in maps:
        depth = resized("depth", maps["depth"], seen.depth_m.shape).values
        row["order_maps"] = plausibility(seen, found, depth)["order"]
    if is_caption(prompt):
        caption = parse(prompt)
        verdict = judge(caption, found)
        row |= {"objects": verdict.objects, "colours": verdict.colours, "once": verdict.once, "layout": verdict.layout}
        row[f"layout_{len(caption.objects)}"] = verdict.layout
        for kind in {_KINDS[name] for name, _ in verdict.relations}:
            row[kind] = all(holds for name, holds in verdict.relations if _KINDS[name] == kind)
    return row
