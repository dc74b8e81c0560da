"""Finds the inputs of a unit that kill the process that works on them, by bisection with workers that may die."""

from dataclasses import dataclass, field

from shards.core.errors import UserError


@dataclass
class CrashBisection:
    """A search, one question at a time; whoever holds it asks a worker and reports what became of it.

        inquiry = CrashBisection("unit 12")
        while (question := inquiry.question) is not None:
            inquiry.answer(survived=..., count=...)
        inquiry.killers

    The first question, "count", only reads the unit; all others work on the inputs start..stop. Blamed is only an input
    that kills its worker alone, twice: workers also die because someone kills them, or a node goes away.
    """

    name: str
    killers: list[int] = field(default_factory=list)
    _spans: list[tuple[int, int]] = field(default_factory=list)
    _count: int | None = None
    _deaths: int = 0
    _suspect: int | None = None  # an input that killed its worker alone, once

    @property
    def question(self) -> tuple[int, int] | None:
        """What to try next: the span of inputs to work on; (0, 0) means just to count them. None: the search is over."""
        if self._count is None:
            return 0, 0
        return self._spans[-1] if self._spans else None

    def answer(self, *, survived: bool, count: int = 0) -> None:
        """The answer to `question`. count: of the inputs, if that was asked. Raises UserError if reading alone kills."""
        if self._count is None:
            self._answer_count(survived, count)
            return
        start, stop = self._spans[-1]
        if survived:
            self._spans.pop()
            self._suspect = None
        elif stop - start > 1:
            middle = (start + stop) // 2
            self._spans[-1:] = [(middle, stop), (start, middle)]
        elif self._suspect == start:
            self._spans.pop()
            self.killers.append(start)
        else:
            self._suspect = start

    def _answer_count(self, survived: bool, count: int) -> None:
        if survived:
            self._count = count
            middle = count // 2  # the whole killed its worker already
            self._spans = [span for span in ((middle, count), (0, middle)) if span[0] < span[1]]
            return
        self._deaths += 1
        if self._deaths == 3:
            raise UserError(
                f"{self.name}: a worker dies as soon as it reads these inputs, three times in a row; look at the memory "
                "of its node, and at the part of the source that this unit holds"
            )
