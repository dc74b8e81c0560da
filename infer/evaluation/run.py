"""The whole of `python -m infer evaluate`: draw what is missing, measure what is not measured, write the table."""

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Protocol

import numpy as np

from extract.world import compose, render
from infer.evaluation.agreement import Estimators
from infer.evaluation.demo.detector import Detector
from infer.evaluation.demo.pixel_net import SHIPPED
from infer.evaluation.generate import (
    BASE,
    Arrays,
    Block,
    EvaluationOptions,
    EvaluationSampler,
    Method,
    arrays_of,
    chunks,
    maps_of,
    parse_methods,
    read_arrays,
    write_arrays,
)
from infer.evaluation.hub_metrics import Judge
from infer.evaluation.report import CMMD_CLIP, GROUPS, MethodRow, Scored, as_json, join, markdown, rows_of
from infer.evaluation.scores import AGREE, LAYOUT, PLAUSIBLE, Measure, Scorer
from infer.evaluation.sets import UNSEEN, PromptSet
from infer.evaluation.sheet import grid
from shards.core.config import read_toml
from shards.core.errors import UsageError
from shards.core.storage import Folder
from shards.inspect.display import picture
from shards.intrinsics import INTRINSICS
from shards.marks import digest

RENDERINGS = "renderings"
"""The row of real pictures: what the measures say of scenes that are right by construction."""
SHEET_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is asked. reference: how many renderings the fidelity is measured against. detector: its folder, or None
    for the shipped one."""

    drawing: EvaluationOptions
    methods: tuple[Method, ...]
    prompts: PromptSet
    estimators: str = "demo"
    reference: int = 1000
    detector: Path | None = None

    def __post_init__(self) -> None:
        if self.reference < 2:
            raise UsageError(f"--reference {self.reference}: at least two renderings are needed")

    @property
    def of_demo_world(self) -> bool:
        return self.prompts.in_grammar


class Progress(Protocol):
    """What the run tells: how many images a part has, and each time some of them are done."""

    def start(self, part: str, total: int) -> None: ...

    def advance(self, images: int) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """The rows of the table, its files, and how many images were made now."""

    rows: list[MethodRow]
    made: int
    files: list[str]


def evaluate(evaluation: Evaluation, out: str, judges: Sequence[Judge], progress: Progress) -> Outcome:
    """Draws, measures, writes OUT/table.md, table.json, sheet.png. Raises UserError."""
    folder = Folder(out)
    for name in ("", "images", "scores", "reference"):
        folder.make(name)
    drawing, prompts = evaluation.drawing, evaluation.prompts
    detector = Detector.load(evaluation.detector or SHIPPED) if evaluation.of_demo_world else None
    studio = EvaluationSampler(drawing, folder)
    blocks = studio.blocks(evaluation.methods, prompts)
    made = 0

    def drawn(block: Block, new: bool) -> None:
        nonlocal made
        made += len(block.prompts) if new else 0
        progress.advance(len(block.prompts))

    progress.start("drawing", len(prompts.prompts) * len(evaluation.methods) * drawing.seeds)
    studio.draw(blocks, drawn)
    size = read_arrays(folder, blocks[0].file)["image"].shape[1:3]
    if prompts.scenes:
        progress.start("rendering", len(prompts.prompts))
        blocks = [*_rendered(folder, prompts, size, drawing.batch, progress.advance), *blocks]

    estimators = Estimators(evaluation.estimators) if evaluation.estimators else None
    scorer = Scorer(detector, estimators, judges)
    progress.start("measuring", sum(len(block.prompts) for block in blocks))
    scored = _measured(folder, blocks, scorer, progress.advance)
    reference = None
    if detector is not None:
        progress.start("reference", evaluation.reference)
        reference = _reference(folder, evaluation.reference, size, detector, progress.advance)
    own = [Measure(judge.name, judge.title, share=False) for judge in judges]
    own += [CMMD_CLIP] if any(judge.name == "clip" for judge in judges) else []
    rows = rows_of(scored, len(prompts.prompts), reference, [*LAYOUT, *PLAUSIBLE, *AGREE, *own])
    groups = {**GROUPS, "Models of the hub": own} if own else GROUPS
    title = f"{len(prompts.prompts)} prompts of the set {prompts.name}, {drawing.seeds} seeds"
    about = {"drawing": asdict(drawing), "methods": [asdict(one) for one in evaluation.methods], "set": prompts.name}
    folder.write("table.md", markdown(title, rows, groups, _notes(evaluation)).encode())
    folder.write("table.json", as_json(title, rows, about | {"estimators": evaluation.estimators}))
    folder.write("sheet.png", _sheet(folder, blocks, prompts))
    return Outcome(rows, made, [folder.address(name) for name in ("table.md", "table.json", "sheet.png")])


def _notes(evaluation: Evaluation) -> list[str]:
    drawing = evaluation.drawing
    return [
        f"Base {drawing.base}, run {drawing.run}, {drawing.steps} steps, guidance {drawing.guidance}. "
        "Values with 95 % bootstrap intervals over the prompts; in brackets behind a method, its number of images. "
        "The row `renderings` is what the measures say of real pictures of the same captions: their own error.",
    ]


# ---- what is measured ------------------------------------------------------------------------------------------------


def _measured(folder: Folder, blocks: Sequence[Block], scorer: Scorer, advance: Callable[[int], None]) -> list[Scored]:
    """The scores of all blocks, joined by method in the order in which they come; what is there is read."""
    by_method: dict[str, list[tuple[range, Arrays]]] = {}
    made_by = scorer.fingerprint()
    for block in blocks:
        name = f"{block.file.replace('images/', 'scores/', 1).removesuffix('.npz')}-{made_by}.npz"
        if folder.exists(name):
            scores = read_arrays(folder, name)
        else:
            scores = scorer(read_arrays(folder, block.file), block.prompts)
            folder.make(name.rpartition("/")[0])
            write_arrays(folder, name, scores)
        by_method.setdefault(block.method.name, []).append((block.numbers, scores))
        advance(len(block.prompts))
    return [join(name, parts) for name, parts in by_method.items()]


def _rendered(
    folder: Folder, prompts: PromptSet, size: tuple[int, int], batch: int, advance: Callable[[int], None]
) -> list[Block]:
    """Blocks of the real pictures of demo captions, with their exact maps; rendered where they are missing."""
    method, blocks = Method(RENDERINGS, ""), []
    folder.make(f"images/{RENDERINGS}")
    for part in chunks(len(prompts.prompts), batch):
        scenes, captions = [prompts.scenes[i] for i in part], tuple(prompts.prompts[i] for i in part)
        name = f"{part[0] // batch:04d}-{digest({'scenes': scenes, 'size': list(size), 'seed': UNSEEN})[:8]}"
        block = Block(method, 0, part[0], captions, True, f"images/{RENDERINGS}/{name}.npz")
        if not folder.exists(block.file):
            write_arrays(folder, block.file, arrays_of([render(compose(UNSEEN, scene), size) for scene in scenes]))
        blocks.append(block)
        advance(len(captions))
    return blocks


def _reference(
    folder: Folder, count: int, size: tuple[int, int], detector: Detector, advance: Callable[[int], None]
) -> np.ndarray:
    """Features (count, F) of other unseen renderings, which fidelity is measured against."""
    parts = []
    for part in chunks(count, detector.first.batch):
        about = {"scenes": list(part), "size": list(size), "detector": detector.fingerprint()}
        name = f"reference/{part[0]:06d}-{digest(about)[:8]}.npz"
        if not folder.exists(name):
            images = [render(compose(UNSEEN + 1, scene), size).image for scene in part]
            write_arrays(folder, name, {"features": np.stack([one.features for one in detector.first(images)])})
        parts.append(read_arrays(folder, name)["features"])
        advance(len(part))
    return np.concatenate(parts)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _sheet(folder: Folder, blocks: Sequence[Block], prompts: PromptSet) -> bytes:
    """The first prompts with the first seed, by every method, and the maps of the last method that makes any."""
    first: dict[str, Block] = {}
    for block in blocks:
        if block.first == 0:
            first.setdefault(block.method.name, block)
    loaded = {name: read_arrays(folder, block.file) for name, block in first.items()}
    with_maps = [name for name, block in first.items() if block.maps and name != RENDERINGS]
    count = min(SHEET_ROWS, *(len(arrays["image"]) for arrays in loaded.values()))
    rows, columns = [], [*loaded, *(INTRINSICS if with_maps else ())]
    for i in range(count):
        pictures = [arrays["image"][i] for arrays in loaded.values()]
        if with_maps:
            arrays = loaded[with_maps[-1]]
            pictures += [picture(name, item, arrays["image"][i]) for name, item in maps_of(arrays, i).items()]
        rows.append((prompts.prompts[i], pictures))
    data = io.BytesIO()
    grid(columns, rows).save(data, "PNG")
    return data.getvalue()


# ---- the search over schedules ---------------------------------------------------------------------------------------


def search_methods(file: Path) -> tuple[Method, ...]:
    """The base and every combination of a grid: one table a schedule, lists of values for its settings.

    [drop]                                [gaussian]
    tau = [700, 800, 900]                 tau = [600, 800]
    stages = ["2-4", "3"]                 sigma = [50, 100, 200]

    Raises UsageError for a file that is no such grid.
    """
    names = [BASE]
    for schedule, settings in read_toml(file).items():
        if not isinstance(settings, dict) or not all(isinstance(v, list) and v for v in settings.values()):
            raise UsageError(f"{file}: [{schedule}] must hold settings with lists of values, as in tau = [700, 800]")
        for values in product(*settings.values()):
            chosen = ",".join(f"{key}={value}" for key, value in zip(settings, values, strict=True))
            names.append(f"{schedule}:{chosen}" if chosen else schedule)
    return parse_methods(",".join(names))
