"""Trying again what failed for a reason that may have passed: `python -m extract DATA --retry-failed`.

A *round* takes all inputs whose last attempt failed for a passing reason (extract.reasons), and appends whole shards of
them. It is noted in dataset.json, under `retries`, before its first shard: the number of that shard, and the reasons. What
a round consists of follows from the failures of the shards before it, from where the round before began: those list
the last attempts of all inputs that may be tried again. So a killed run goes on with the very same shards.

Lines of earlier attempts stay where they are, so in every shard inputs = samples + lines; shards.counts says how a
dataset stands when every input is counted once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from extract.reasons import REASONS, is_passing
from extract.sources import Source, Unit
from shards.core.errors import UsageError
from shards.core.storage import Folder
from shards.dataset import Dataset
from shards.marks import shard_name


@runtime_checkable
class Repeating(Protocol):
    """A source that can give single inputs again."""

    def again(self, keys: Iterable[str], shard_size: int, first_index: int) -> Iterator[Unit]:
        """Units of the inputs with these keys, in the order of the source, numbered from `first_index`."""
        ...


def check(source: Source) -> None:
    """Raises UsageError if nothing of this source can be tried again."""
    if not isinstance(source, Repeating):
        raise UsageError(
            "--retry-failed is for tables of URLs; what a folder, tar or dataset could not give is read again if you remove "
            "the three files of its shard and run the same command"
        )


def new_round(first: int) -> dict[str, Any]:
    """A round as dataset.json notes it, whose first shard has this number."""
    return {"first": first, "reasons": sorted(filter(is_passing, REASONS))}


def again(failed: Mapping[str, int], round_: Mapping[str, Any]) -> Counter[str]:
    """Of failures counted by reason, those that the round tries again."""
    return Counter({name: failed[name] for name in round_["reasons"] if failed.get(name)})


def units(source: Source, folder: Folder, shards: range, round_: Mapping[str, Any], shard_size: int) -> Iterator[Unit]:
    """The units of a round: what failed in `shards` for one of its reasons."""
    assert isinstance(source, Repeating)
    dataset, reasons = Dataset(folder, {}), frozenset(round_["reasons"])
    lines = (line for index in shards for line in dataset.failures(shard_name(index)))
    keys = (line["key"] for line in lines if line["reason"] in reasons)
    return source.again(keys, shard_size, round_["first"])


def remove_surplus(folder: Folder, shards: int) -> int:
    """Removes shards beyond the number that there should be, and returns how many: those of rounds that have become shorter,
    where a shard before them was lost and made anew, or of inputs that have become fewer. The mark goes first."""
    stems = (name.removesuffix(".json") for name in folder.list() if name.endswith(".json"))
    surplus = [stem for stem in stems if stem.isdigit() and int(stem) >= shards]
    for stem in surplus:
        for suffix in ("json", "tar", "failed.jsonl"):
            folder.remove(f"{stem}.{suffix}")
    return len(surplus)
