"""What the counts of a dataset's marks mean: samples, failures, drops, and inputs that were tried again.

An input that gives no sample is a line of its shard's failures. A *drop* was chosen: a filter or `forget` took it out; its
reason says so. All others are failures. Shards that another attempt appended (`extract --retry-failed`) list their inputs
a second time; the line of the earlier attempt is then *superseded*, and does not count any more.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

FORGOTTEN_REASON = "forgotten"
DROP_PREFIX = "filtered_"


def is_drop(reason: str) -> bool:
    """Whether an input was left out on purpose, and did not fail."""
    return reason.startswith(DROP_PREFIX) or reason == FORGOTTEN_REASON


@dataclass
class DatasetCounts:
    """How a dataset stands: every input once, with the outcome of its last attempt. inputs = ok + failed + dropped.

    retried: attempts that a later one superseded.
    """

    ok: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    retried: int = 0

    @property
    def inputs(self) -> int:
        return self.ok + self.failed.total() + self.dropped.total()

    @property
    def failed_share(self) -> float:
        """Of the inputs that were wanted."""
        wanted = self.inputs - self.dropped.total()
        return self.failed.total() / wanted if wanted else 0.0

    def add(self, counts: Mapping[str, Any]) -> None:
        """Counts a shard, by the `counts` of its mark."""
        self.ok += counts["ok"]
        for reason, count in counts["failed"].items():
            (self.dropped if is_drop(reason) else self.failed)[reason] += count

    def supersede(self, failed: Mapping[str, int]) -> None:
        """These failures were tried again; how that went is counted with the shards of the new attempt."""
        for reason, count in failed.items():
            self.failed[reason] -= count
            self.retried += count
        self.failed += Counter()  # reasons that are at zero go


def standing(info: Mapping[str, Any], marks: Iterable[Mapping[str, Any]]) -> DatasetCounts:
    """How a dataset stands, by its dataset.json and its marks in order."""
    result = DatasetCounts()
    rounds = list(info.get("retries") or ())
    for mark in marks:
        result.add(mark["counts"])
        later = next((round_ for round_ in rounds if int(mark["shard"]) < round_["first"]), None)
        if later is not None:
            failed = mark["counts"]["failed"]
            result.supersede({reason: failed[reason] for reason in later["reasons"] if reason in failed})
    return result
