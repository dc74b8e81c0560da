"""Reads a dataset: its description, its commit marks, and single samples through the index."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shards.core.errors import UserError
from shards.core.storage import Folder
from shards.intrinsics import DEPTH_KINDS
from shards.marks import DATASET, VERSION, MarkError, digest, is_count, mark_faults, seal, shard_name, shortened, unseal
from shards.sample import IMAGE_MEMBERS, MAX_MEMBER_BYTES, Sample, SampleError, member_names
from shards.tar import read_samples
from shards.writer import read_mark

_LOOKED_AT = 16
"""Shards whose marks content_id reads."""


class Dataset:
    """A dataset at any fsspec URL. Reading it never runs code from it and never writes."""

    def __init__(self, folder: Folder, info: dict[str, Any]) -> None:
        self.folder = folder
        self.info = info
        """The content of dataset.json."""

    @classmethod
    def open(cls, url: str, *, checked: bool = False) -> "Dataset":
        """Opens the dataset at `url`. Raises UserError when there is none, MarkError when dataset.json is damaged.

        checked: whether its fields, too, are what they must be.
        """
        folder = Folder(url)
        if not folder.exists(DATASET):
            raise UserError(f"{url} holds no dataset (no {DATASET}); name the folder that `python -m extract` wrote")
        info = unseal(folder.read(DATASET), folder.address(DATASET))
        for fault in info_faults(info) if checked else ():
            raise MarkError(f"{folder.address(DATASET)}: {fault}; run `python -m shards verify {url}`")
        return cls(folder, info)

    @property
    def members(self) -> list[str]:
        """The members that every sample has, in their order in the tar."""
        return list(self.info["members"])

    @property
    def complete(self) -> bool:
        """Whether the run that makes this dataset has ended."""
        return self.info["totals"] is not None

    def content_id(self) -> str:
        """What a complete dataset holds, in words and a digest: the same wherever it lies and however its address is written.

        Of what decides its samples and their order: settings, counts, and of up to 16 shards, evenly spread, the inputs and
        the keys. Caches that are added later (`python -m train cache`) do not change it.
        """
        info, count = self.info, len(self.info["totals"]["shards"])
        spread = sorted({round(i * (count - 1) / max(1, _LOOKED_AT - 1)) for i in range(_LOOKED_AT)}) if count else []
        marks = [self.mark(shard_name(index)) for index in spread]
        content = {
            **{name: info.get(name) for name in ("config", "estimators", "image", "totals")},
            "units": [mark["made"].get("unit") for mark in marks],
            "keys": [digest({"keys": sorted(mark["index"])}) for mark in marks],
        }
        return f"{info['totals']['ok']} samples, {digest(content)[:16]}"

    def shard_names(self) -> list[str]:
        """The names of all committed shards, in order."""
        names = self.folder.list()
        return [name.removesuffix(".json") for name in names if _is_mark(name)]

    def mark(self, shard: str) -> dict[str, Any]:
        """The commit mark of one shard. Raises MarkError when it is damaged."""
        mark = read_mark(self.folder, shard)
        for fault in mark_faults(mark):  # its checksum fits, but a crafted one may hold anything
            address = self.folder.address(f"{shard}.json")
            raise MarkError(f"{address}: {fault}; run `python -m shards verify {self.folder.url}`")
        return mark

    def marks(self) -> Iterator[dict[str, Any]]:
        """The marks of all committed shards, in order, one at a time."""
        for shard in self.shard_names():
            yield self.mark(shard)

    def keys(self) -> Iterator[str]:
        """The keys of all samples, in order."""
        for mark in self.marks():
            yield from mark["index"]

    def read(self, key: str, members: list[str] | None = None) -> Sample:
        """One sample by key: searches the marks, then makes one range read. Raises UserError if no shard has the key."""
        for mark in self.marks():
            if key in mark["index"]:
                return self.read_at(mark, key, members)
        raise UserError(
            f"{self.folder.url} has no sample {key!r}; `python -m shards list --keys {self.folder.url}` shows all"
        )

    def read_at(self, mark: dict[str, Any], key: str, members: list[str] | None = None) -> Sample:
        """One sample of the shard whose mark is given, or only some of its members: one range read."""
        places = mark["index"][key]
        in_order = sorted(places, key=lambda name: places[name][0])
        wanted = {name: places[name] for name in in_order if members is None or name in members}
        start = min(offset for offset, _ in wanted.values())
        end = max(offset + size for offset, size in wanted.values())
        if end - start > MAX_MEMBER_BYTES:
            raise SampleError(
                f"sample {key} of shard {mark['shard']} has {end - start} bytes, above {MAX_MEMBER_BYTES}"
            )
        data = self.folder.read(f"{mark['shard']}.tar", start, end)
        if len(data) != end - start:
            raise SampleError(
                f"{mark['shard']}.tar is truncated: sample {key} is not whole; run `python -m shards verify`"
            )
        return Sample(
            key, {name: data[offset - start : offset - start + size] for name, (offset, size) in wanted.items()}
        )

    def samples(self, shard: str) -> Iterator[Sample]:
        """All samples of one shard, read as a stream, one at a time in memory."""
        with self.folder.open(f"{shard}.tar") as file:
            for key, members in read_samples(file, self.folder.address(f"{shard}.tar")):
                yield Sample(key, members)

    def failures(self, shard: str) -> Iterator[dict[str, Any]]:
        """The input samples of one shard that are not in its tar: key, stage, reason, message."""
        for number, line in enumerate(self.folder.read(f"{shard}.failed.jsonl").splitlines(), 1):
            address = self.folder.address(f"{shard}.failed.jsonl")
            try:
                failure = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{address} line {number} is damaged: {error}") from error
            texts = failure.values() if isinstance(failure, dict) else [None]
            if set(failure) != {"key", "stage", "reason", "message"} or not all(
                isinstance(text, str) for text in texts
            ):
                raise UserError(f"{address} line {number} is damaged: it is no failure")
            yield failure


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
    elif info["shards"] is not None and not is_count(info["shards"]):
        yield f"shards is {shortened(info['shards'])}, which is no number of shards"


def _is_round(value: Any) -> bool:
    """Whether this is a round of `extract --retry-failed`, as dataset.json describes it."""
    reasons = value.get("reasons") if isinstance(value, dict) else None
    return isinstance(reasons, list) and all(isinstance(name, str) for name in reasons) and is_count(value.get("first"))


def _is_mark(name: str) -> bool:
    stem, _, suffix = name.partition(".")
    return suffix == "json" and stem.isdigit()


def add_counts(marks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The `totals` of dataset.json: in, ok and failed (by reason) of all marks, added up; and ok of each shard, in order
    (so that a reader can find its place in a large dataset without reading every mark)."""
    samples_in, failed, shards = 0, Counter[str](), list[int]()
    for mark in marks:
        samples_in += mark["counts"]["in"]
        failed.update(mark["counts"]["failed"])
        shards.append(mark["counts"]["ok"])
    return {"in": samples_in, "ok": sum(shards), "failed": dict(failed), "shards": shards}


def write_info(folder: Folder, info: dict[str, Any]) -> None:
    """Writes dataset.json, atomically.

    info: recipe, config, members, image, depth_kind, estimators {intrinsic: fingerprint}, shards and totals (both None
    until the run has ended).
    """
    folder.write(DATASET, seal({"version": VERSION, **info}))
