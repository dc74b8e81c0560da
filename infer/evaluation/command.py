"""What `python -m infer evaluate` shows: progress on stderr, a summary on stdout."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from infer.evaluation.hub_metrics import ClipJudge, Judge
from infer.evaluation.image_reward import ImageRewardJudge
from infer.evaluation.report import MethodRow
from infer.evaluation.run import Evaluation, Outcome


class Told:
    """A progress bar for each part of the run."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()

    def start(self, part: str, total: int) -> None:
        self._task = self._bar.add_task(part, total=total)

    def advance(self, images: int) -> None:
        self._bar.advance(self._task, images)


def judges_of(*, clip: str | None, hps: str | None, image_reward: str | None, device: str | None) -> list[Judge]:
    """The hub's models that are asked for, loaded. Raises UserError."""
    judges: list[Judge] = []
    on = device or "cpu"
    if clip:
        judges.append(ClipJudge.load("clip", "CLIP score", clip, on))
    if hps:
        judges.append(ClipJudge.load("hps", "HPSv2", hps, on))
    if image_reward:
        judges.append(ImageRewardJudge.load(image_reward, on))
    return judges


def summary(outcome: Outcome, evaluation: Evaluation, seconds: float) -> str:
    """A few lines: the first measure of each method, how long it took, and where the table is."""
    lines = []
    measure = next((key for key in ("layout", "clip", "abs_rel") if any(key in row.values for row in outcome.rows)), "")
    if measure:
        lines += [_line(row, measure) for row in outcome.rows if measure in row.values]
    count = sum(row.images for row in outcome.rows)
    lines.append(f"{outcome.made} images made in {seconds:.1f} s, {count} measured; the table: {outcome.files[0]}")
    return "\n".join(lines)


def _line(row: MethodRow, measure: str) -> str:
    value = row.values[measure]
    text = f"  {row.name:<40} {measure} {value.value:.3f} ({value.low:.3f} .. {value.high:.3f})"
    if change := row.against_base.get(measure):
        text += f"  from the base {change.value:+.3f} ({change.low:+.3f} .. {change.high:+.3f})"
    return text
