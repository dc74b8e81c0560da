"""One unit of work: reads its inputs, prepares and estimates them, and commits them as one shard.

Reading and decoding, estimating, and encoding overlap: a thread reads ahead, a pool decodes and encodes, the calling
thread estimates. What goes into which batch is a function of the unit alone, so that the bytes never depend on timing.
"""

import contextlib
import dataclasses
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from extract.estimators import Estimator
from extract.images.prepare import ImageProblem, ImageRules, Prepared, prepare
from extract.run.batches import BatchSize, estimate_all
from extract.run.prefetch import map_ahead
from extract.sources import Failure, RawSample, Source, Unit
from shards.core.storage import Folder
from shards.counts import is_drop
from shards.dataset import Dataset
from shards.description import check_kind
from shards.edit.forget import REASON as FORGOTTEN
from shards.edit.forget import Forgotten, read_forgotten
from shards.intrinsics import INTRINSICS, IntrinsicMap, MapError
from shards.marks import shard_name
from shards.metadata import MetadataError, check_metadata
from shards.quality import quality_scores
from shards.sample import Sample, SampleError, encode_meta
from shards.writer import ShardWriter

Maps = dict[str, IntrinsicMap]
WINDOW_PIXELS = 1 << 23
"""A window of images is closed once it has as many: like `window`, this decides which images share a batch."""
MAX_MESSAGE = 1000
AHEAD_BYTES = 256 << 20
"""Not much more is read and decoded ahead of the estimators."""


@dataclass(frozen=True)
class Loaded:
    """An estimator in memory, the maps wanted of it, the id of its fingerprint that goes into the samples' `by`, and the
    most images that it is given at once (`size`: as many as its memory held so far)."""

    estimator: Estimator
    intrinsics: tuple[str, ...]
    id: str
    batch: int
    size: BatchSize = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", BatchSize(self.batch))


@dataclass(frozen=True, kw_only=True)
class UnitWork:
    """What all units of a run share."""

    source: Source
    image: ImageRules
    members: tuple[str, ...]
    threads: int
    window: int
    kind: str = ""
    """The kind of the dataset (shards.description.kind_of), which must still be this one when a shard is committed; "" where
    no dataset.json is kept."""

    @property
    def makes_maps(self) -> bool:
        return any(row.member in self.members for row in INTRINSICS.values())


@dataclass
class Progress:
    """Counts that another thread may look at while a unit is at work."""

    done: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    """Rises whenever something was read, decoded, estimated, encoded or written: it stands still only where the work does."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Of samples without a caption: what looks like one and was not taken."""
    _lock: Any = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def timed(self, stage: str, clock: Callable[[], float] = time.thread_time) -> Iterator[None]:
        """Adds the time that this takes to a stage: the CPU time of this thread, as stages overlap, or by another clock."""
        begin = clock()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + clock() - begin
                self.steps += 1

    def moved(self) -> None:
        """Notes a step that is not timed by itself."""
        with self._lock:
            self.steps += 1


@dataclass
class _Item:
    """One input on its way. Either `failure` is set, or the fields after it are filled one after the other."""

    position: int
    failure: Failure | None = None
    sample: RawSample | None = None
    prepared: Prepared | None = None
    old: Sample | None = None
    maps: Maps = field(default_factory=dict)
    by: dict[str, str] = field(default_factory=dict)

    def fail(self, stage: str, reason: str, message: str) -> None:
        assert self.sample is not None
        self.failure, self.maps = Failure(self.sample.key, stage, reason, message), {}


def make_shard(
    folder: Folder,
    unit: Unit,
    work: UnitWork,
    estimators: Sequence[Loaded],
    *,
    made: Mapping[str, Any],
    skip: Container[int] = frozenset(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes the shard of a unit and commits it; returns its commit mark.

    made: what goes into the mark to tell later whether the shard is up to date. skip: positions in the unit of inputs that
    kill their worker; they are listed as failures. Where a shard is there already, members that were made with the same
    settings are kept byte for byte. Raises UserError where the output cannot be written.
    """
    progress = progress or Progress()
    old = _OldShard(folder, unit.index)

    def still_ours() -> None:
        if work.kind:
            check_kind(folder, work.kind)

    begin = time.perf_counter()
    with (
        ShardWriter(
            folder, unit.index, members=work.members, made=made, replaces=old.checksum, check=still_ours
        ) as writer,
        ThreadPoolExecutor(work.threads, "encode") as pool,
    ):
        encoded: list[tuple[_Item, Future[dict[str, bytes]] | None]] = []
        for window in _windows(_items(unit, work, skip, read_forgotten(folder), progress), work.window):
            for item in window:
                old.match(item)
            _estimate(window, estimators, progress)
            _write(writer, encoded, progress)
            encoded = [
                (item, None if item.failure else pool.submit(_encode, item, work.members, progress)) for item in window
            ]
        _write(writer, encoded, progress)
        timings = {name: round(value, 3) for name, value in progress.seconds.items()}
        return writer.commit(timings | {"unit_s": round(time.perf_counter() - begin, 3)})


def probe(
    unit: Unit, work: UnitWork, estimators: Sequence[Loaded], positions: Container[int], progress: Progress
) -> None:
    """Works on the inputs at these positions alone, and keeps nothing: to see whether one of them kills the process."""
    for window in _windows(_items(unit, work, _AllBut(positions), Forgotten(), progress), work.window):
        _estimate(window, estimators, progress)
        for item in window:
            if not item.failure:
                with contextlib.suppress(SampleError, MapError):  # a failure like others, in the unit's own run
                    _encode(item, work.members, progress)


class _AllBut:
    """Contains every position but those given."""

    def __init__(self, positions: Container[int]) -> None:
        self._positions = positions

    def __contains__(self, position: object) -> bool:
        return position not in self._positions


# ---- read and decode -------------------------------------------------------------------------------------------------


def _items(
    unit: Unit, work: UnitWork, skip: Container[int], forgotten: Forgotten, progress: Progress
) -> Iterator[_Item]:
    """The unit's inputs in order, decoded; read at most two windows ahead."""

    def inputs() -> Iterator[RawSample | Failure]:
        outputs = iter(work.source.read(unit))
        while True:
            with progress.timed("read_s", time.perf_counter):  # mostly waiting, for a disk or a network
                output = next(outputs, None)
            if output is None:
                return
            yield output

    def decode(position: int, output: RawSample | Failure) -> _Item:
        return _decode(position, output, work, skip, forgotten, progress)

    return map_ahead(
        inputs(), decode, threads=work.threads, most=2 * work.window, most_bytes=AHEAD_BYTES, size_of=_size_of
    )


def _size_of(held: RawSample | Failure | _Item) -> int:
    """About how many bytes an input holds, before or after it was decoded."""
    if isinstance(held, RawSample):
        return held.image.nbytes if isinstance(held.image, np.ndarray) else len(held.image)
    if isinstance(held, _Item):
        decoded = 3 * math.prod(held.prepared.record["size"]) + len(held.prepared.member) if held.prepared else 0
        return decoded + (_size_of(held.sample) if held.sample else 0)
    return 0


def _decode(
    position: int,
    output: RawSample | Failure,
    work: UnitWork,
    skip: Container[int],
    forgotten: Forgotten,
    progress: Progress,
) -> _Item:
    if isinstance(output, Failure):
        return _Item(position, failure=output)
    item = _Item(position, sample=output)
    if position in skip:
        item.fail("decode", "killed_worker", "a worker that decoded or estimated this image died, alone with it, twice")
    elif forgotten and forgotten.covers(
        output.key, output.meta, output.image if isinstance(output.image, bytes) else b""
    ):
        item.fail("read", FORGOTTEN, "removed on request")
    else:
        try:
            # Before any work: what cannot be stored, or could not be read again, is no sample.
            check_metadata({name: value for name, value in output.meta.items() if name != "intrinsics"})
            with progress.timed("decode_s"):
                item.prepared = prepare(output.image, work.image, decoded=work.makes_maps)
            item.sample = dataclasses.replace(output, image=b"")  # the source's bytes are not needed any more
        except ImageProblem as problem:
            item.fail("decode", problem.reason, problem.message)
        except MetadataError as error:
            item.fail("read", "bad_metadata", f"its metadata cannot be kept: {error}")
    return item


def _windows(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    """Windows of `size` inputs, or fewer if these have WINDOW_PIXELS together: maps take 22 bytes for each pixel."""
    window: list[_Item] = []
    pixels = 0
    for item in items:
        window.append(item)
        pixels += math.prod(item.prepared.record["size"]) if item.prepared else 0
        if len(window) == size or pixels >= WINDOW_PIXELS:
            yield window
            window, pixels = [], 0
    if window:
        yield window


# ---- what is there already -------------------------------------------------------------------------------------------


class _OldShard:
    """The shard that is to be replaced, if there is one: its members are kept where they are still right."""

    def __init__(self, folder: Folder, index: int) -> None:
        self._mark: dict[str, Any] | None = None
        self.checksum: str | None = None
        if folder.exists(f"{shard_name(index)}.json"):
            self._dataset = Dataset(folder, {})
            self._mark = self._dataset.mark(shard_name(index))
            self.checksum = self._mark["checksum"]

    def match(self, item: _Item) -> None:
        """Gives an item the stored sample of its key, if its image is the same to the byte."""
        if (
            self._mark is None
            or item.prepared is None
            or item.sample is None
            or item.sample.key not in self._mark["index"]
        ):
            return
        sample = self._dataset.read_at(self._mark, item.sample.key)
        if item.prepared.member == sample.members[sample.image_member]:
            item.old = sample


def _kept(item: _Item, name: str, wanted_by: str | None) -> bool:
    """Whether the stored map of this name stays: made by what would make it now, or not to be made now at all."""
    if item.old is None or name not in item.old.intrinsics:
        return False
    return wanted_by is None or item.old.meta["intrinsics"][name].get("by") == wanted_by


# ---- estimate --------------------------------------------------------------------------------------------------------


def _estimate(window: list[_Item], estimators: Sequence[Loaded], progress: Progress) -> None:
    """Runs each estimator over the window's images, those batches apart that cannot be done; fills `maps` and `by`."""
    for loaded in estimators:
        todo = []
        for item in window:
            if item.failure or item.prepared is None:
                continue
            for name in loaded.intrinsics:
                item.by[name] = loaded.id
            if not all(_kept(item, name, loaded.id) for name in loaded.intrinsics):
                todo.append(item)
        images = [item.prepared.pixels for item in todo if item.prepared is not None]
        with progress.timed("estimate_s"):
            results = estimate_all(loaded.estimator, images, loaded.size, progress.moved)
        for item, maps in zip(todo, results, strict=True):
            if isinstance(maps, Exception):
                reason = "out_of_memory" if isinstance(maps, MemoryError) else "estimator_failed"
                item.fail("estimate", reason, f"{loaded.id}: {type(maps).__name__}: {maps}"[:MAX_MESSAGE])
            else:
                item.maps |= {name: maps[name] for name in loaded.intrinsics if not _kept(item, name, loaded.id)}


# ---- encode and write ------------------------------------------------------------------------------------------------


def _encode(item: _Item, members: tuple[str, ...], progress: Progress) -> dict[str, bytes]:
    """The members of a finished item. Raises SampleError or MapError, also for a map that breaks the conventions."""
    with progress.timed("encode_s"):
        return _members_of(item, members)


def _members_of(item: _Item, members: tuple[str, ...]) -> dict[str, bytes]:
    sample, prepared = item.sample, item.prepared
    assert sample is not None and prepared is not None
    image = members[0]
    described: dict[str, Any] = {"image": _history(sample.meta, prepared.record)}
    try:
        stored = {image: prepared.member, "txt": sample.caption.encode("utf-8")}
    except UnicodeEncodeError as error:
        raise SampleError(f"its caption has characters that no text file can hold: {error}") from error
    known = dict(item.maps)
    for name, row in INTRINSICS.items():
        if row.member not in members:
            continue
        if name in item.maps:
            if item.maps[name].values.shape[:2] != prepared.pixels.shape[:2]:
                raise SampleError(f"its {name} has not the size of the image: {item.maps[name].values.shape}")
            stored[row.member], info = row.encode(item.maps[name])
            described[name] = info | {"by": item.by[name]}
        elif _kept(item, name, item.by.get(name)) and item.old is not None:
            stored[row.member], described[name] = item.old.members[row.member], item.old.meta["intrinsics"][name]
            known[name] = item.old.map(name)
        else:
            raise SampleError(f"there is no {name} for it")
    if item.maps or item.old is None:
        maps = {name: known[name] for name in INTRINSICS if name in known}
        described["quality"] = quality_scores(maps, prepared.pixels) if maps else {}
    else:
        described["quality"] = item.old.meta["intrinsics"]["quality"]
    stored["json"] = encode_meta({**sample.meta, "intrinsics": described})
    return stored


def _history(meta: Mapping[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What was done to an image; of one that stayed as it is, what its own json says: our output is a source, too."""
    intrinsics = meta.get("intrinsics")
    earlier = intrinsics.get("image") if isinstance(intrinsics, dict) else None
    if record["reencoded"] or not isinstance(earlier, dict) or list(earlier) != list(record):
        return record
    alike = all(_same_form(earlier[name], value) for name, value in record.items())
    return earlier if alike and earlier["size"] == record["size"] else record


def _same_form(value: Any, other: Any) -> bool:
    if isinstance(value, list) and isinstance(other, list):
        return [type(item) for item in value] == [type(item) for item in other]
    return type(value) is type(other)


def _write(
    writer: ShardWriter, encoded: list[tuple[_Item, "Future[dict[str, bytes]] | None"]], progress: Progress
) -> None:
    """Waits for a window's members and appends them, or the failures, in the order of the inputs."""
    for item, future in encoded:
        if future is not None and item.sample is not None:
            if item.sample.key in writer:
                item.fail("encode", "duplicate_key", "an earlier input of this shard has the same key")
            else:
                try:
                    members = future.result()
                    with progress.timed("write_s"):
                        writer.add(item.sample.key, members)
                    progress.passed_over.update(item.sample.passed_over)
                except (SampleError, MapError) as error:
                    item.fail("encode", "cannot_encode", str(error))
        if item.failure is not None:
            failure = item.failure
            writer.fail(failure.key, failure.stage, failure.reason, failure.message)
            progress.failed += not is_drop(failure.reason)
        progress.done += 1
    encoded.clear()
