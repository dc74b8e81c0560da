"""Checks a whole dataset: every checksum, every member, every count. Finds any single bit that changed.

Shards are checked side by side, each as one stream, so that memory holds one sample per thread and 8 bytes per key.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from shards.core.cores import cores
from shards.core.errors import UserError
from shards.core.storage import WRITING, Folder
from shards.dataset import Dataset, add_counts, info_faults
from shards.edit.forget import FORGOTTEN, read_forgotten
from shards.inspect.check import check_sample
from shards.marks import DATASET, MarkError, mark_faults, shard_name, shortened
from shards.sample import Sample, SampleError, check_key
from shards.tar import read_members
from shards.writer import STAGES, read_mark

_PART = re.compile(r"(\d{6,})\.(tar|failed\.jsonl|json)\Z")
_KNOWN = {DATASET, FORGOTTEN, WRITING, "gallery.html"}
_AGAIN = "run the same `python -m extract` command again"
_REPAIR = "remove the three files of this shard and " + _AGAIN
_MAX_PER_SHARD = 20


@dataclass
class Report:
    """problems: one sentence each, empty if all is well. counts: shards, in, ok, failed {reason: n}, bytes of the tars."""

    problems: list[str] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Shard:
    """The result of one shard: its problems; counts of its mark (None if that is damaged); a digest of every key."""

    problems: list[str]
    counts: dict[str, Any] | None = None
    size: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))


def verify(
    url: str,
    quick: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    threads: int | None = None,
) -> Report:
    """Checks the dataset at `url`. quick: does not read the tars, only their sizes, and all marks and failures.

    progress is called with (shards checked, shards in all). Raises UserError only where there is no dataset.
    """
    try:
        dataset = Dataset.open(url)
    except MarkError as error:
        return Report([f"{error}; {_AGAIN}"])
    if faults := list(info_faults(dataset.info)):
        return Report([f"{dataset.folder.address(DATASET)}: {fault}; {_AGAIN}" for fault in faults])
    files = dataset.folder.list()
    problems = list(_folder_faults(dataset, files))
    stems = [match[1] for name in files if (match := _PART.match(name)) and match[2] == "json"]
    shards = [stem for stem in stems if shard_name(int(stem)) == stem]
    results: list[_Shard] = []
    with ThreadPoolExecutor(threads or min(8, cores()), "verify") as pool:
        try:
            for result in pool.map(lambda shard: _check_shard(dataset, shard, quick), shards):
                results.append(result)
                problems += result.problems
                progress(len(results), len(shards))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    problems += _doubled_keys(dataset, shards, results)
    counted = [{"counts": result.counts} for result in results if result.counts is not None]
    totals = add_counts(counted)
    if dataset.complete and len(counted) == len(shards) == dataset.info["shards"] and totals != dataset.info["totals"]:
        problems.append(
            f"{DATASET}: totals are {shortened(dataset.info['totals'])}, but the marks add up to {shortened(totals)}; {_AGAIN}"
        )
    size = sum(result.size for result in results)
    counts = {"shards": len(shards), **{name: totals[name] for name in ("in", "ok", "failed")}, "bytes": size}
    return Report(problems, counts)


# ---- the folder ------------------------------------------------------------------------------------------------------


def _folder_faults(dataset: Dataset, files: list[str]) -> Iterator[str]:
    folder, info = dataset.folder, dataset.info
    if not dataset.complete:
        yield f"{folder.url} is unfinished (the totals of {DATASET} are null); {_AGAIN}, it goes on where it stopped"
    elif folder.list(WRITING):
        yield f"{WRITING} holds what a killed writer left, such as {folder.list(WRITING)[0]}; {_AGAIN} to clean up"
    parts: dict[str, set[str]] = {}
    for name in files:
        match = _PART.match(name)
        if match and shard_name(int(match[1])) == match[1]:
            parts.setdefault(match[1], set()).add(match[2])
        elif name not in _KNOWN:
            yield f"{name} does not belong to a dataset; move it elsewhere"
    for shard, there in sorted(parts.items()):
        for suffix in sorted({"tar", "failed.jsonl", "json"} - there):
            yield f"{shard}.{suffix} is missing, while {shard}.{min(there)} is there; {_AGAIN}"
    count = info["shards"] if dataset.complete else max((int(name) + 1 for name in parts), default=0)
    if dataset.complete:
        gone = count - sum(int(name) < count for name in parts)
        if gone:  # counted, not listed: the number in a crafted file may be any
            first = next(name for name in map(shard_name, itertools.count()) if name not in parts)
            yield f"shard {first} is missing ({gone} of {count} are); {_AGAIN}"
    extra = sorted(name for name in parts if int(name) >= count)
    if extra:
        yield f"shard {extra[0]} is there, but {DATASET} says there are {count} shards; {_AGAIN}"
    if FORGOTTEN in files:
        try:
            read_forgotten(folder)
        except (UserError, KeyError, TypeError) as error:
            yield f"{FORGOTTEN} cannot be used ({error}); remove it and give `python -m shards forget` the list again"


def _doubled_keys(dataset: Dataset, shards: list[str], results: list[_Shard]) -> Iterator[str]:
    """Finds keys that are in two shards. Digests first; only where two are equal are the marks read again."""
    digests = np.sort(np.concatenate([result.keys for result in results] or [np.zeros(0, np.uint64)]))
    suspects = set(digests[1:][digests[1:] == digests[:-1]].tolist())
    if not suspects:
        return
    first: dict[str, str] = {}
    for shard, result in zip(shards, results, strict=True):
        if not suspects & set(result.keys.tolist()):
            continue
        for key in dataset.mark(shard)["index"]:
            if _digest(key) not in suspects:
                continue
            if key in first:
                yield f"{shard}.tar: the key {key} is also in {first[key]}.tar; {_REPAIR}"
            else:
                first[key] = shard


# ---- one shard -------------------------------------------------------------------------------------------------------


def _check_shard(dataset: Dataset, shard: str, quick: bool) -> _Shard:
    try:
        mark = read_mark(dataset.folder, shard)
        if faults := list(mark_faults(mark)):
            return _Shard([f"{shard}.json: {fault}; {_REPAIR}" for fault in faults])
        problems = list(_failure_faults(dataset.folder, mark))
    except UserError as error:
        return _Shard([f"{error}; {_REPAIR}"])
    result = _Shard(problems, mark["counts"], mark["tar"]["size"])
    result.keys = np.array([_digest(key) for key in mark["index"]], np.uint64)
    more = 0
    for fault in _size_faults(dataset.folder, mark) if quick else _tar_faults(dataset, mark):
        if len(problems) < _MAX_PER_SHARD:
            problems.append(fault)
        else:
            more += 1
    if more:
        problems.append(f"{shard}.tar has {more} more problems; {_REPAIR}")
    return result


def _failure_faults(folder: Folder, mark: Mapping[str, Any]) -> Iterator[str]:
    name = f"{mark['shard']}.failed.jsonl"
    data = folder.read(name)
    stated = mark["failures"]
    if len(data) != stated["size"]:
        yield f"{name} has {len(data)} bytes; its mark says {stated['size']}; {_REPAIR}"
    elif hashlib.sha256(data).hexdigest() != stated["sha256"]:
        yield f"{name} is damaged: its sha256 is not that of its mark; {_REPAIR}"
    reasons: Counter[str] = Counter()
    for number, text in enumerate(data.decode("utf-8", "replace").split("\n")[:-1], 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            yield f"{name} line {number} is not JSON; {_REPAIR}"
            continue
        fields = ("key", "stage", "reason", "message")
        if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in fields):
            yield f"{name} line {number} does not hold the texts {', '.join(fields)}; {_REPAIR}"
        else:
            reasons[line["reason"]] += 1
            if line["stage"] not in STAGES:
                yield f"{name} line {number} names the stage {line['stage']!r}, not one of {STAGES}; {_REPAIR}"
    if dict(reasons) != mark["counts"]["failed"]:
        yield (
            f"{name} lists the failures {shortened(dict(reasons))}; the mark counts {shortened(mark['counts']['failed'])}; "
            f"{_REPAIR}"
        )


def _size_faults(folder: Folder, mark: Mapping[str, Any]) -> Iterator[str]:
    name = f"{mark['shard']}.tar"
    try:
        size = folder.size(name)
    except UserError as error:
        yield f"{error}; {_REPAIR}"
        return
    if size != mark["tar"]["size"]:
        yield f"{name} has {size} bytes; its mark says {mark['tar']['size']}; {_REPAIR}"


class _Hashed:
    """A stream that is read to the end in any case, and whose digest and size are then known."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        self.sha256.update(data)
        self.size += len(data)
        return data

    def drain(self) -> None:
        while self.read(1 << 20):
            pass


def _tar_faults(dataset: Dataset, mark: Mapping[str, Any]) -> Iterator[str]:
    """Reads the tar once: its form, its samples, its checksum."""
    name, stated = f"{mark['shard']}.tar", mark["tar"]
    try:
        with dataset.folder.open(name) as file:
            stream = _Hashed(file)
            try:
                for fault in _sample_faults(stream, mark, dataset.info):
                    yield f"{name}: {fault}; {_REPAIR}"
            except UserError as error:  # from read_members: nothing after this place can be read
                yield f"{error}; {_REPAIR}"
            stream.drain()
    except UserError as error:
        yield f"{error}; {_REPAIR}"
        return
    if stream.size != stated["size"]:
        yield f"{name} has {stream.size} bytes; its mark says {stated['size']}; {_REPAIR}"
    elif stream.sha256.hexdigest() != stated["sha256"]:
        yield f"{name} is damaged: its sha256 is not that of its mark, so the two do not belong together; {_REPAIR}"


def _sample_faults(stream: Any, mark: Mapping[str, Any], info: Mapping[str, Any]) -> Iterator[str]:
    index, members = mark["index"], info["members"]
    seen: set[str] = set()
    for key, found in _grouped(stream, mark["shard"]):
        try:
            check_key(key)
        except SampleError as error:
            yield str(error)
            continue
        if key in seen:
            yield f"the key {key} is there twice"
            continue
        seen.add(key)
        if [name for name, _, _ in found] != members:
            yield f"sample {key} has the members {[name for name, _, _ in found]}; {DATASET} declares {members}"
            continue
        if index.get(key) != {name: [offset, len(data)] for name, offset, data in found}:
            yield f"the index in {mark['shard']}.json does not say where sample {key} lies; the mark is stale"
        for fault in check_sample(Sample(key, {name: data for name, _, data in found}), info):
            yield fault.removesuffix("; make this shard again")
    missing = [key for key in index if key not in seen]
    if missing:
        yield f"sample {missing[0]} of the index is not in the tar ({len(missing)} are not); the mark is stale"


def _grouped(stream: Any, shard: str) -> Iterator[tuple[str, list[tuple[str, int, bytes]]]]:
    """(key, [(member, offset, data)]) for each run of members of one key."""
    last, found = None, list[tuple[str, int, bytes]]()
    for key, member, offset, data in read_members(stream, f"{shard}.tar"):
        if key != last and found:
            yield last or "", found
            found = []
        last = key
        found.append((member, offset, data))
    if found:
        yield last or "", found


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
