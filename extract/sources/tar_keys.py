"""The keys of samples from several tars: found out before the work, so that no two samples of a dataset have the same.

A tar's samples keep their own names as keys, or get the tar's name in front. Where tars of several folders have equal keys
then (two downloads with `00000.tar` in each), the names of the folders come before that. Keys are listed only where they
can be equal at all, from what lies beside a tar if possible, else from its headers.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shards.core.errors import UsageError
from shards.edit.duplicates import find_repeats

Origin = Literal["img2dataset", "ours", "other"]


@dataclass(frozen=True)
class TarKeys:
    """What is known of one tar's keys."""

    address: str
    own: bool
    """Whether its samples keep their names as keys."""
    origin: Origin

    @property
    def folder(self) -> str:
        return self.address.rpartition("/")[0]

    @property
    def stem(self) -> str:
        return self.address.rsplit("/", 1)[-1].removesuffix(".tar")

    def prefix(self, label: str = "") -> str:
        """What comes before a sample's name in its key."""
        return "".join(f"{part}-" for part in (label, "" if self.own else self.stem) if part)


def are_apart(addresses: Sequence[str]) -> bool:
    """Whether tars of these names need no look: they lie in one folder, and no name continues another ("a" and "a-b")."""
    tars = [TarKeys(address, own=False, origin="other") for address in addresses]
    return len({tar.folder for tar in tars}) == 1 and all(len(group) == 1 for group in _groups(tars, TarKeys.prefix))


def labels_of(
    tars: Sequence[TarKeys], asked_for_own: bool, names: Callable[[TarKeys], Sequence[str]]
) -> Mapping[str, str]:
    """The label of each folder that is to stand before the keys of its tars; {} where none is needed.

    asked_for_own: the user wants the tars' own keys. names: lists the names of a tar's samples. Raises UsageError where
    keys are equal and labels cannot help, or are not wanted.
    """
    found = _equal_keys(tars, {}, names, trusting=not asked_for_own)
    if found is None:
        return {}
    labels = _labels({tar.folder for tar in tars})
    advice = "rename one of the tars"
    if asked_for_own:
        advice = "set source.keys = 'prefixed'"
    elif labels:
        found = _equal_keys(tars, labels, names, trusting=True)
        if found is None:
            return labels
    key, first, second = found
    raise UsageError(f"two samples would have the key {key!r}, in {first} and in {second}; {advice}")


def _equal_keys(
    tars: Sequence[TarKeys],
    labels: Mapping[str, str],
    names: Callable[[TarKeys], Sequence[str]],
    trusting: bool,
) -> tuple[str, str, str] | None:
    """A key that two tars share, and their addresses; None if there is none.

    trusting: tars that img2dataset or we wrote into one folder have no equal keys.
    """

    def prefix(tar: TarKeys) -> str:
        return tar.prefix(labels.get(tar.folder, ""))

    for group in _groups(tars, prefix):
        if len(group) == 1 or (trusting and _are_distinct(group)):
            continue
        if found := _first_repeat(group, prefix, names):
            return found
    return None


def _groups(tars: Sequence[TarKeys], prefix: Callable[[TarKeys], str]) -> Iterator[list[TarKeys]]:
    """The tars, by whether the prefix of one begins the other's: only then can keys of theirs be equal."""
    group: list[TarKeys] = []
    root = ""
    for tar in sorted(tars, key=lambda tar: (prefix(tar), tar.address)):
        if group and not prefix(tar).startswith(root):
            yield group
            group = []
        if not group:
            root = prefix(tar)
        group.append(tar)
    if group:
        yield group


def _are_distinct(group: Sequence[TarKeys]) -> bool:
    """Whether it is known without a look that the keys of these tars differ."""
    if not all(tar.own for tar in group):
        return False
    if len({(tar.folder, tar.origin) for tar in group}) == 1 and group[0].origin != "other":
        return True
    stems = {tar.stem for tar in group}  # img2dataset's keys begin with the number of their tar
    numbered = all(tar.origin == "img2dataset" for tar in group) and len({len(stem) for stem in stems}) == 1
    return numbered and len(stems) == len(group)


def _first_repeat(
    group: Sequence[TarKeys], prefix: Callable[[TarKeys], str], names: Callable[[TarKeys], Sequence[str]]
) -> tuple[str, str, str] | None:
    counts: list[int] = []

    def batches() -> Iterator[list[str | None]]:
        for tar in group:
            keys: list[str | None] = [prefix(tar) + name for name in dict.fromkeys(names(tar))]
            counts.append(len(keys))
            yield keys

    repeats = find_repeats(batches())
    start = 0
    for number, count in enumerate(counts):
        for row in itertools.islice(repeats.within(start, start + count), 1):
            key = prefix(group[number]) + list(dict.fromkeys(names(group[number])))[row]
            first = next(tar for tar in group if key in {prefix(tar) + name for name in names(tar)})
            return key, first.address, group[number].address
        start += count
    return None


def _labels(folders: set[str]) -> dict[str, str]:
    """For each folder the shortest end of its path that no other has, as a part of a key; {} if there is one folder only."""
    if len(folders) < 2:
        return {}
    parts = {folder: [part for part in folder.split("/") if part] for folder in folders}
    for length in range(1, max(map(len, parts.values())) + 1):
        labels = {
            folder: re.sub(r"[^A-Za-z0-9]+", "_", "_".join(names[-length:])).strip("_")
            for folder, names in parts.items()
        }
        if len(set(labels.values())) == len(folders) and all(labels.values()):
            return labels
    return {}
