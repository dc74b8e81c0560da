"""What a run says about captions, before its work and at its end: where they come from, how many are empty, what was left.

A dataset without any caption is refused before the work, unless it was asked for (`source.captions = "none"`): captions that
were not found are the commonest way to train on nothing.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from extract.sources.caption_names import NO_LETTERS
from shards.core.errors import UsageError

LOOKED_AT = 1000
"""How many inputs a source looks at for its report, where it does not know them all."""
SEARCHED = 50_000
"""How many it looks at if none of those has a caption: up to the first that has one."""
_SHOWN = 6


class Glance(NamedTuple):
    """What one input has for a caption. origin: where it stands, "" if nowhere. passed_over: what was not taken."""

    origin: str
    text: str
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CaptionReport:
    """What is known about a source's captions before the work."""

    inputs: int
    """How many inputs were looked at."""
    filled: int
    """How many of them have a caption."""
    complete: bool
    """Whether these are all inputs."""
    origins: dict[str, int] = field(default_factory=dict)
    """Where captions stand, and how many there."""
    passed_over: tuple[str, ...] = ()
    """What looks like captions and is not taken, each with the setting that takes it."""
    notes: tuple[str, ...] = ()
    """What else should be known: a table that is not UTF-8, say."""
    example: str = ""
    wanted: bool = True
    """False where the user asked for no captions."""

    def lines(self) -> list[str]:
        """The report, a line for each thing; safe to print whatever the captions hold."""
        if not self.wanted:
            return ['captions: none, as source.captions = "none" asks']
        of = f"{self.inputs:,}" if self.complete else f"the first {self.inputs:,}"
        known = sorted(self.origins, key=lambda name: -self.origins[name])
        origins = ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")
        empty = self.inputs - self.filled
        text = f"captions: {origins or 'none found'}, {self.filled:,} of {of}" + (f"; {empty:,} empty" if empty else "")
        shown = f" ({shortened(self.example)})" if self.example else ""
        return [text + shown, *self.notes, *(f"not taken: {what}" for what in self.passed_over)]

    def check(self) -> None:
        """Raises UsageError if there are inputs, and none of them has a caption."""
        if not self.wanted or self.filled or not self.inputs:
            return
        of = f"all {self.inputs:,} inputs" if self.complete else f"the first {self.inputs:,} inputs"
        left = "".join(f"\n  not taken: {what}" for what in self.passed_over)
        notes = "".join(f"\n  {note}" for note in self.notes)
        raise UsageError(
            f"{of} have no caption; name what holds them, or ask for images without captions with "
            f"--set source.captions=none{notes}{left}"
        )


@runtime_checkable
class Captioned(Protocol):
    """A source that can say, before the work, what it has for captions."""

    def caption_report(self, limit: int | None = None) -> CaptionReport:
        """Of its first `limit` inputs (None: all). Raises UsageError if the settings are wrong."""
        ...


@runtime_checkable
class MayLackCaptions(Protocol):
    """A source whose user says whether captions are wanted."""

    captions: str


def report_of(
    glances: Iterable[Glance],
    *,
    limit: int | None,
    settings: dict[str, str] | None = None,
    notes: tuple[str, ...] = (),
    everything: bool = False,
) -> CaptionReport:
    """The report of a source that looks at its inputs one by one.

    settings: the setting that takes what was passed over. everything: look at all inputs, as they are known anyway.
    """
    origins, passed, inputs, filled, words, example = Counter[str](), Counter[str](), 0, 0, 0, ""
    walk: Iterator[Glance] = iter(glances)
    complete = False
    while True:
        if inputs == limit:
            complete = True
            break
        if not everything and inputs >= (LOOKED_AT if filled else SEARCHED):
            break
        glance = next(walk, None)
        if glance is None:
            complete = True
            break
        inputs += 1
        passed.update(glance.passed_over)
        if glance.text.strip():
            filled += 1
            words += not NO_LETTERS.fullmatch(glance.text)
            origins[glance.origin] += 1
            example = example or glance.text
    if filled and not words:
        notes = (*notes, "none of these captions has a letter in it: are they boxes or classes of a detector?")
    return CaptionReport(
        inputs=inputs,
        filled=filled,
        complete=complete,
        origins=dict(origins),
        passed_over=tuple(phrases(passed, settings or {})),
        notes=notes,
        example=example,
    )


def phrases(passed: "Counter[str]", settings: dict[str, str]) -> list[str]:
    """What was passed over, the commonest first, each with its count and the setting that takes it."""
    found = [
        f"{name} of {count:,} input{'s' * (count != 1)}{_setting(name, settings)}"
        for name, count in passed.most_common(_SHOWN)
    ]
    if len(passed) > _SHOWN:
        found.append(f"{len(passed) - _SHOWN} more of the kind")
    return found


def caption_lines(report: CaptionReport | None, ok: int, empty: int, passed: "Counter[str]") -> list[str]:
    """What is said at the end of a run: of `ok` samples, `empty` have no caption, in which this was passed over."""
    if report is None:
        return []
    if not report.wanted:
        return ['none, as source.captions = "none" asks']
    from_where = ", ".join(name for name in report.origins) or "nowhere"
    counts = f"{ok - empty:,} of {ok:,} samples have one ({from_where})" + (
        f"; {empty:,} {'is' if empty == 1 else 'are'} empty" if empty else ""
    )
    return [counts, *report.notes, *(f"not taken: {what}" for what in report.passed_over or phrases(passed, {}))]


def _setting(name: str, settings: dict[str, str]) -> str:
    kind, _, rest = name.partition(" ")
    if kind not in settings:
        return ""
    value = rest[1:].partition("'")[0] if rest.startswith("'") else rest.partition(" ")[0]
    return f" (--set {settings[kind]}={value} takes it)"


def shortened(text: str, most: int = 60) -> str:
    """The beginning of a text on one line, in quotes; what cannot be printed is escaped."""
    line = " ".join(text.split())
    return repr(line if len(line) <= most else line[: most - 3] + "...")
