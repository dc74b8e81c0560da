"""Removes samples from a dataset: an opt-out, a takedown. Only the shards concerned are rewritten, each atomically.

What is to be forgotten is first noted in forgotten.json (keys as they are, URLs and hashes as digests), so that an
interrupted run of the same command goes on, and extraction never brings a forgotten sample back. In its shard a forgotten
sample moves from the tar to the failures, with the reason "forgotten": the counts still add up.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from shards.counts import FORGOTTEN_REASON
from shards.dataset import Dataset, add_counts, write_info
from shards.marks import VERSION, seal, unseal
from shards.sample import Sample
from shards.writer import ShardWriter, recover

FORGOTTEN = "forgotten.json"
REASON = FORGOTTEN_REASON
URL_FIELDS = ("url", "URL", "image_url")


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Forgotten:
    """What must not be in a dataset: keys, sha256 of URLs, and hashes (sha256 or md5, hex) of images."""

    keys: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    hashes: frozenset[str] = frozenset()

    @classmethod
    def of(cls, keys: Iterable[str] = (), urls: Iterable[str] = (), hashes: Iterable[str] = ()) -> "Forgotten":
        """From what a person gives: plain keys, plain URLs, and hashes in hex."""
        lowered = frozenset(value.strip().lower() for value in hashes)
        for value in lowered:
            if len(value) not in (32, 64) or set(value) - set("0123456789abcdef"):
                raise UsageError(f"{value!r} is not a hash; give an md5 (32 hex digits) or a sha256 (64)")
        return cls(frozenset(keys), frozenset(map(_digest, urls)), lowered)

    def __or__(self, other: "Forgotten") -> "Forgotten":
        return Forgotten(self.keys | other.keys, self.urls | other.urls, self.hashes | other.hashes)

    def __bool__(self) -> bool:
        return bool(self.keys or self.urls or self.hashes)

    def covers(self, key: str, meta: Mapping[str, Any], image: bytes) -> bool:
        """Whether a sample is to be forgotten: by its key, a URL in its metadata, or a hash of its image (as it is, or
        as the metadata of its source states it)."""
        if key in self.keys:
            return True
        if self.urls and any(_digest(str(meta[name])) in self.urls for name in URL_FIELDS if name in meta):
            return True
        if not self.hashes:
            return False
        stated = {str(meta[name]).lower() for name in ("sha256", "md5", "hash") if name in meta}
        computed = {hashlib.sha256(image).hexdigest(), hashlib.md5(image, usedforsecurity=False).hexdigest()}
        return bool(self.hashes & (stated | computed))


def read_forgotten(folder: Folder) -> Forgotten:
    """What is noted in the dataset; empty if nothing is."""
    if not folder.exists(FORGOTTEN):
        return Forgotten()
    noted = unseal(folder.read(FORGOTTEN), folder.address(FORGOTTEN))
    return Forgotten(*(frozenset(noted[name]) for name in ("keys", "urls", "hashes")))


@dataclass
class Summary:
    """What forget() did."""

    samples: int = 0
    shards: int = 0
    keys: list[str] = field(default_factory=list)


def forget(url: str, wanted: Forgotten, progress: Callable[[str], None] = lambda shard: None) -> Summary:
    """Removes the samples that `wanted` covers, notes it, and corrects the totals. The same call again is harmless.

    progress is called with the name of each shard looked at. Raises UserError if the dataset is unfinished.
    """
    if not wanted:
        raise UsageError("nothing to forget: give --key, --url or --hash")
    dataset = Dataset.open(url)
    if not dataset.complete:
        raise UserError(f"{url} is unfinished; run its `python -m extract` command to the end first")
    folder = dataset.folder
    noted = read_forgotten(folder) | wanted
    lists = {name: sorted(getattr(noted, name)) for name in ("keys", "urls", "hashes")}
    folder.write(FORGOTTEN, seal({"version": VERSION, **lists}))
    summary = Summary()
    for shard in dataset.shard_names():
        recover(folder, shard)
        progress(shard)
        if wanted.urls or wanted.hashes or not wanted.keys.isdisjoint(dataset.mark(shard)["index"]):
            _forget_in_shard(dataset, shard, wanted, summary)
    totals = add_counts(dataset.marks())
    write_info(folder, dataset.info | {"totals": totals})
    folder.sweep()
    return summary


def _forget_in_shard(dataset: Dataset, shard: str, wanted: Forgotten, summary: Summary) -> None:
    gone = [sample.key for sample in dataset.samples(shard) if _covers(wanted, sample)]
    if not gone:
        return
    mark, removed = dataset.mark(shard), set(gone)
    options = {"members": dataset.members, "made": mark["made"], "replaces": mark["checksum"]}
    with ShardWriter(dataset.folder, int(shard), **options) as writer:
        for sample in dataset.samples(shard):
            if sample.key not in removed:
                writer.add(sample.key, sample.members)
        for line in dataset.failures(shard):
            writer.fail(line["key"], line["stage"], line["reason"], line["message"])
        for key in gone:
            writer.fail(key, "read", REASON, "removed on request")
        writer.commit(mark["timings"])
    summary.samples += len(gone)
    summary.shards += 1
    summary.keys += gone


def _covers(wanted: Forgotten, sample: Sample) -> bool:
    return wanted.covers(sample.key, sample.meta, sample.members[sample.image_member])
