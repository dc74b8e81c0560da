"""Checks a whole dataset: every checksum, every member, every count. Finds any single bit that changed.

Shards are checked side by side, each as one stream, so that memory holds one sample per thread and 8 bytes per key.
"""

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from shards.core.errors import UserError
from shards.core.storage import WRITING, Folder
from shards.dataset import Dataset, add_counts
from shards.edit.forget import FORGOTTEN, read_forgotten
from shards.inspect.check import check_sample
from shards.intrinsics import DEPTH_KINDS
from shards.marks import DATASET, MarkError, shard_name
from shards.sample import IMAGE_MEMBERS, Sample, SampleError, check_key, member_names
from shards.tar import read_members
from shards.writer import STAGES

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
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1), "verify") as pool:
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
        problems.append(f"{DATASET}: totals are {_short(dataset.info['totals'])}, but the marks add up to {_short(totals)};"
                        f" {_AGAIN}")  # fmt: skip
    size = sum(result.size for result in results)
    counts = {"shards": len(shards), **{name: totals[name] for name in ("in", "ok", "failed")}, "bytes": size}
    return Report(problems, counts)


# ---- the folder ------------------------------------------------------------------------------------------------------


def info_faults(info: Mapping[str, Any]) -> Iterator[str]:
    """What keeps dataset.json from being used at all, although its checksum fits."""
    missing = [name for name in ("members", "image", "estimators", "shards", "totals") if name not in info]
    if missing:
        yield f"the field {missing[0]!r} is missing, as if another version had written it"
        return
    members, image = info["members"], info["image"]
    if not isinstance(info["estimators"], dict):
        yield "estimators is no object"
    elif image not in IMAGE_MEMBERS:
        yield f"image is {image!r}; it must be one of {', '.join(IMAGE_MEMBERS)}"
    elif not isinstance(members, list) or not all(isinstance(name, str) for name in members):
        yield "members is no list of names"
    else:
        names = tuple(name.removesuffix(".png") for name in members)
        if members != member_names(image, names, members):
            yield f"members are {members}; they must be {member_names(image, names, members)}"
        if "depth.png" in members and info.get("depth_kind") not in DEPTH_KINDS:
            yield f"depth_kind is {info.get('depth_kind')!r}; it must be one of {DEPTH_KINDS}"
    retries = info.get("retries") or []
    if not isinstance(retries, list) or not all(map(_is_round, retries)):
        yield "retries is no list of rounds, each with its first shard and the reasons that were tried again"
    if (info["shards"] is None) != (info["totals"] is None):
        yield "only one of shards and totals is null"
    elif info["shards"] is not None and not _is_count(info["shards"]):
        yield f"shards is {_short(info['shards'])}, which is no number of shards"


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
        mark = dataset.mark(shard)
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


def mark_faults(mark: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong inside a mark whose checksum fits."""
    counts, index = mark.get("counts"), mark.get("index")
    for name in ("tar", "failures"):
        stated = mark.get(name)
        if not (isinstance(stated, dict) and isinstance(stated.get("sha256"), str) and _is_count(stated.get("size"))):
            yield f"the field {name!r} does not state a sha256 and a size"
    if not (isinstance(counts, dict) and _is_count(counts.get("in")) and _is_count(counts.get("ok"))
            and isinstance(counts.get("failed"), dict) and all(map(_is_count, counts["failed"].values()))):  # fmt: skip
        yield "the field 'counts' does not state in, ok and failed"
    elif counts["in"] != counts["ok"] + sum(counts["failed"].values()):
        yield f"the counts do not add up: in is {counts['in']}, ok {counts['ok']}, failed {_short(counts['failed'])}"
    elif isinstance(index, dict) and counts["ok"] != len(index):
        yield f"counts.ok is {counts['ok']}, but the index has {len(index)} samples"
    places = index.values() if isinstance(index, dict) else [None]
    if not all(isinstance(place, dict) and place and all(map(_is_place, place.values())) for place in places):
        yield "the field 'index' does not state an offset and a size for each member"


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
            f"{name} lists the failures {_short(dict(reasons))}; the mark counts {_short(mark['counts']['failed'])}; "
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


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_round(value: Any) -> bool:
    """Whether this is a round of `extract --retry-failed`, as dataset.json describes it."""
    reasons = value.get("reasons") if isinstance(value, dict) else None
    return (
        isinstance(reasons, list) and all(isinstance(name, str) for name in reasons) and _is_count(value.get("first"))
    )


def _is_place(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(_is_count(number) and number < 1 << 63 for number in value)
    )


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 300 else text[:300] + "..."
