"""Which samples of a dataset take part in training, and at what size: conditions on their json, and buckets.

The json of every sample is read once (range reads through the index). What comes out is one byte a sample, which can be
kept in a file: named by what it depends on, so that it is made again exactly when the dataset or the question changed.
"""

import hashlib
import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from shards.dataset import Dataset
from shards.marks import digest
from shards.sample import Sample, SampleError
from shards.stream.buckets import Shape, nearest_bucket

DROPPED = 255
"""The group of a sample that takes no part. All others are numbers of buckets (0 where there are no buckets)."""
READS = 32
"""Range reads in flight."""
KEY_SHARE = "key_share"
"""A field that every sample has: share_of(key), for splits that stay the same whatever else is in the dataset."""
_VERSION = 1

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.-]*)\s*(<=|>=|==|!=|<|>)\s*(\S.*?)\s*\Z")


@dataclass(frozen=True)
class Condition:
    """`FIELD OPERATOR VALUE`, such as `quality.normal_depth_angle < 30`, `aesthetic >= 6` or `lang == en`.

    field: a path into the sample's json, with dots; `quality.NAME` are the scores of shards.quality, and `image.width`,
    `image.height` and `image.aspect` (longer side / shorter side) are of the stored image; `key_share` is a number in
    [0, 1) made of the key alone, to hold samples out by. value: a number, or with ==
    and != a text. A sample whose json has no such field, or no number where one is needed, does not pass.
    """

    field: str
    operator: str
    value: float | str

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Raises UsageError for anything that is not a condition. Nothing is ever evaluated as code."""
        match = _CONDITION.match(text)
        if not match:
            raise UsageError(f"{text!r} is no condition; write FIELD OPERATOR VALUE, such as 'aesthetic >= 6'")
        field, sign, value = match.groups()
        try:
            return cls(field, sign, float(value))
        except ValueError:
            if sign not in ("==", "!="):
                raise UsageError(
                    f"{text!r}: {value!r} is no number, and only numbers can be compared by {sign}"
                ) from None
            return cls(field, sign, value.strip("\"'"))

    def __str__(self) -> str:
        return f"{self.field} {self.operator} {self.value if isinstance(self.value, str) else f'{self.value:g}'}"

    def refuses(self, meta: Mapping[str, Any]) -> str | None:
        """Why a sample with this json does not pass; None if it does."""
        found = _lookup(meta, self.field)
        if isinstance(self.value, float):
            number = _number(found)
            if number is None:
                return f"no {self.field}"
            return None if _OPERATORS[self.operator](number, self.value) else f"not {self}"
        if found is None:
            return f"no {self.field}"
        return None if _OPERATORS[self.operator](str(found), self.value) else f"not {self}"


def _lookup(meta: Mapping[str, Any], field: str) -> Any:
    first, _, rest = field.partition(".")
    here: Any = meta
    if first in ("quality", "image") and rest:
        here = _as_mapping(meta.get("intrinsics"))
    if first == "image" and (size := image_size(meta)) is not None:
        width, height = size
        virtual = {"width": width, "height": height, "aspect": max(size) / max(min(size), 1)}
        if rest in virtual:
            return virtual[rest]
    for part in field.split("."):
        here = _as_mapping(here).get(part)
    return here


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def share_of(key: str) -> float:
    """A number in [0, 1) that belongs to a key: evenly spread, and independent of everything else."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def _number(value: Any) -> float | None:
    """A finite number, also from a text that is one; None for anything else."""
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if np.isfinite(number) else None


def image_size(meta: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) of the stored image, as the sample's json says; None if it does not."""
    size = _as_mapping(_as_mapping(meta.get("intrinsics")).get("image")).get("size")
    if isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size):
        return size[0], size[1]
    return None


@dataclass(frozen=True)
class Selection:
    """groups: uint8 (N,), one for each sample, by shard and then by key. dropped: reason -> samples.
    starts: where each shard begins in groups, and the end."""

    groups: np.ndarray
    starts: np.ndarray
    dropped: Mapping[str, int]

    def counts(self, groups: int) -> np.ndarray:
        """Samples of each group in each shard: int64 (groups, shards)."""
        counted = [
            np.bincount(self.groups[a:b], minlength=DROPPED + 1)[:groups]
            for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)
        ]
        return np.stack(counted, axis=1).astype(np.int64)

    def rows(self, shard: int, group: int) -> np.ndarray:
        """The rows of a shard (numbered by the sorted keys) that are in a group, in order."""
        return np.flatnonzero(self.groups[self.starts[shard] : self.starts[shard + 1]] == group)


def select(
    dataset: Dataset,
    where: Sequence[str] = (),
    buckets: Sequence[Shape] = (),
    *,
    keep: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Selection:
    """Asks every sample of a complete dataset.

    where: conditions that must all hold. buckets: sizes; a sample belongs to the one of the nearest aspect ratio.
    keep: a folder (any fsspec URL) where the answer is kept, and found by the next call. Several processes may ask at
    once: they find the same. progress is called with (shards done, shards). A sample whose json is damaged is dropped.
    """
    conditions = [Condition.parse(text) for text in where]
    if len(buckets) >= DROPPED:
        raise UsageError(f"there can be at most {DROPPED - 1} buckets, not {len(buckets)}")
    if not dataset.complete:
        raise UserError(f"{dataset.folder.url} is unfinished; run its `python -m extract` command to the end first")
    totals = [int(count) for count in shard_counts(dataset)]
    starts = np.concatenate([[0], np.cumsum(totals, dtype=np.int64)])
    question = {
        "version": _VERSION,
        "dataset": dataset.info.get("checksum", ""),
        "where": [str(condition) for condition in conditions],
        "buckets": [list(shape) for shape in buckets],
    }
    name = f"{digest(question)[:32]}.safetensors"
    if keep is not None and (found := _load(Folder(keep), name, question, starts)) is not None:
        return found
    groups, dropped = np.zeros(int(starts[-1]), np.uint8), Counter[str]()
    with ThreadPoolExecutor(READS, "select") as pool:
        for shard, start in enumerate(starts[:-1]):
            mine = _ask_shard(dataset, shard, conditions, buckets, dropped, pool)
            if len(mine) != totals[shard]:
                raise UserError(
                    f"shard {shard} of {dataset.folder.url} has {len(mine)} samples, but dataset.json says {totals[shard]}; "
                    "run `python -m shards verify`"
                )
            groups[start : start + len(mine)] = mine
            progress(shard + 1, len(totals))
    selection = Selection(groups, starts, dict(sorted(dropped.items())))
    if keep is not None:
        _save(Folder(keep), name, question, selection)
    return selection


def _ask_shard(
    dataset: Dataset,
    shard: int,
    conditions: Sequence[Condition],
    buckets: Sequence[Shape],
    dropped: Counter[str],
    pool: ThreadPoolExecutor,
) -> list[int]:
    mark = dataset.mark(f"{shard:06d}")
    by_key_alone = not buckets and all(condition.field == KEY_SHARE for condition in conditions)

    def ask(key: str) -> int | str:
        try:
            meta = {} if by_key_alone else dataset.read_at(mark, key, ["json"]).meta
            meta = {**meta, KEY_SHARE: share_of(key)}
            for condition in conditions:
                if reason := condition.refuses(meta):
                    return reason
            if not buckets:
                return 0
            width, height = image_size(meta) or _decoded_size(dataset, mark, key)
        except SampleError:
            return "damaged"
        return nearest_bucket(buckets, width, height)

    answers = list(pool.map(ask, sorted(mark["index"])))
    dropped.update(answer for answer in answers if isinstance(answer, str))
    return [DROPPED if isinstance(answer, str) else answer for answer in answers]


def _decoded_size(dataset: Dataset, mark: Mapping[str, Any], key: str) -> tuple[int, int]:
    """(width, height) of an image whose json does not say it, as in datasets that others wrote."""
    sample: Sample = dataset.read_at(dict(mark), key, [dataset.info["image"]])
    height, width = sample.image().shape[:2]
    return width, height


def shard_counts(dataset: Dataset) -> list[int]:
    """Samples in each shard, by number: from dataset.json, so that no mark has to be read."""
    counts = dataset.info["totals"].get("shards")
    if not isinstance(counts, list):
        raise UserError(
            f"{dataset.folder.address('dataset.json')} lists no counts of its shards; extract the dataset again"
        )
    return counts


# ---- kept ------------------------------------------------------------------------------------------------------------


def _save(folder: Folder, name: str, question: Mapping[str, Any], selection: Selection) -> None:
    described = {"question": json.dumps(question, sort_keys=True), "dropped": json.dumps(selection.dropped)}
    folder.make()
    folder.write(name, safetensors.numpy.save({"groups": selection.groups}, described))


def _load(folder: Folder, name: str, question: Mapping[str, Any], starts: np.ndarray) -> Selection | None:
    """What was kept; None if there is nothing, or nothing that can be used: it is then made again."""
    if not folder.exists(name):
        return None
    data = folder.read(name)
    try:
        groups = safetensors.numpy.load(data)["groups"]
        described = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        dropped = json.loads(described["dropped"])
    except (safetensors.SafetensorError, ValueError, KeyError):
        return None
    if described.get("question") != json.dumps(question, sort_keys=True) or groups.shape != (int(starts[-1]),):
        return None
    return Selection(groups, starts, dropped)
