"""What a person sees of a run: a bar with speed, time left and failures; plain lines where there is no terminal."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from shards.core.cli import printable

LINE_EVERY_S = 30


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="cyan")


class Reporter:
    """total: inputs expected, None if unknown."""

    def __init__(self, total: int | None) -> None:
        self._console = Console(stderr=True)
        self._done = self._failed = self._before = 0
        self._begin = self._last_line = time.monotonic()
        self._total = total
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Speed(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failed]} failed"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("extracting", total=total, failed=0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def expect_more(self, count: int) -> None:
        """Further inputs, beyond the total that was given."""
        if self._total is not None:
            self._total += count
            self._progress.update(self._task, total=self._total)

    def advance(self, done: int, failed: int, *, again: bool = False) -> None:
        """Counts a unit that ended; `again` if an earlier run had made it."""
        self._done += done
        self._failed += failed
        if again:
            self._before += done
        self.working(0, 0)

    def working(self, done: int, failed: int) -> None:
        """Shows what is done, with that of the units at work."""
        self._progress.update(self._task, completed=self._done + done, failed=self._failed + failed)
        now = time.monotonic()
        if self._console.is_terminal or now - self._last_line < LINE_EVERY_S:
            return
        self._last_line = now
        made = self._done + done
        speed = (made - self._before) / (now - self._begin)
        of = f" of {self._total}" if self._total else ""
        print(f"{made}{of} inputs, {self._failed + failed} failed, {speed:.1f}/s", file=sys.stderr, flush=True)

    def say(self, sentence: str) -> None:
        """A line above the bar."""
        self._console.print(printable(sentence), style="yellow", highlight=False, markup=False, soft_wrap=True)
