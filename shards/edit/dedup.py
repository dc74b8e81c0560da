"""Removes samples whose image is, to the byte, that of an earlier sample, over all shards of a dataset.

An extraction finds repeated URLs over the whole dataset, and repeated contents within one shard; what two shards have in
common no worker can know in time. This is the pass over the finished dataset that does: it reads all tars once, keeps of
equal images (as they are stored) the first in the dataset's order, and has forget() remove the others. So which samples
stay follows from the dataset alone; shards are rewritten atomically, and a run that was killed is finished by the next.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from shards.core.errors import UserError
from shards.dataset import Dataset
from shards.edit.duplicates import find_repeats
from shards.edit.forget import Forgotten, Summary, forget

THREADS = 4


def dedup(url: str, progress: Callable[[str], None] = lambda shard: None) -> Summary:
    """Removes the repeated samples; the same call again is harmless. progress is called with the name of each shard read.

    Memory: one bit for each sample, and the keys of the repeated ones. Raises UserError if the dataset is unfinished.
    """
    dataset = Dataset.open(url)
    if not dataset.complete:
        raise UserError(f"{url} is unfinished; run its `python -m extract` command to the end first")
    shards = dataset.shard_names()

    def digests() -> Iterator[list[str | None]]:
        with ThreadPoolExecutor(THREADS, "dedup") as pool:
            for shard, found in zip(shards, pool.map(lambda name: _digests(dataset, name), shards), strict=True):
                progress(shard)
                yield list(found)

    repeats = find_repeats(digests())
    keys, first = set[str](), 0
    for shard in shards:
        count = dataset.mark(shard)["counts"]["ok"]
        if numbers := repeats.within(first, first + count):
            in_order = [sample.key for sample in dataset.samples(shard)]
            keys.update(in_order[number] for number in numbers)
        first += count
    return forget(url, Forgotten.of(keys=keys)) if keys else Summary()


def _digests(dataset: Dataset, shard: str) -> list[str]:
    """The sha256 of each image of a shard, in order."""
    samples = dataset.samples(shard)
    return [hashlib.sha256(sample.members[sample.image_member]).hexdigest() for sample in samples]
