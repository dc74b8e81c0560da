"""WebDataset tars as a source: those of img2dataset, plain ones, and our own output.

One input tar is one unit, and so one output shard: the tars' own partition is kept. Members of a sample may stand in any
order and anywhere in their tar. Nothing is unpickled, nothing is unpacked to the disk; members that are not an image,
a caption or json are ignored.

    image     .jpg .jpeg .png .webp .gif .bmp .tif .tiff .avif       caption   .txt .caption, else a field of .json
    metadata  .json, kept as it came

Beside a tar of img2dataset lies a parquet table of all its rows: what failed there is listed here as a failure, too.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from extract.sources import Failure, RawSample, Unit
from extract.sources.filters import Filters
from extract.sources.foreign_tar import Member, scan
from extract.sources.values import parse_json_object
from shards.core.errors import UsageError, UserError
from shards.metadata import MAX_METADATA_BYTES, MetadataError
from shards.sample import KEY, MAX_MEMBER_BYTES

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
CAPTION_SUFFIXES = ("txt", "caption")
CAPTION_FIELDS = ("caption", "text", "TEXT", "prompt")
MAX_TEXT_BYTES = MAX_METADATA_BYTES
"""Captions and json above this are refused; they are read whole into memory."""
_COUNTED_TARS = 10_000

Where = dict[str, Member]
"""The members of one sample: suffix -> place."""


@dataclass(frozen=True)
class TarSource:
    """tars: one address or several, local or fsspec, with braces (`{00000..00099}.tar`) or globs (`*.tar`).

    keys: "own" keeps the keys of the tars, which must then be unique over all of them; "prefixed" puts the tar's name
    before each; "auto" is "own" where a tar comes from img2dataset or from us, else "prefixed".
    filters: on the fields of a sample's json, and on its caption; applied before its image is read.
    """

    tars: tuple[str, ...]
    keys: str = "auto"
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self) -> None:
        if not self.tars:
            raise UsageError("source.tars is empty; name at least one tar, such as 'data/{00000..00099}.tar'")
        if self.keys not in ("auto", "own", "prefixed"):
            raise UsageError(f"source.keys = {self.keys!r} is not one of 'auto', 'own', 'prefixed'")

    def addresses(self) -> list[str]:
        """The addresses of all tars, braces and globs resolved, sorted within each pattern. Raises UserError for none."""
        found: list[str] = []
        for pattern in (plain for tar in self.tars for plain in expand_braces(tar)):
            if any(letter in pattern for letter in "*?["):
                fs, path = url_to_fs(pattern)
                found += sorted(fs.unstrip_protocol(match) for match in fs.glob(path))
            else:
                found.append(pattern)
        if not found:
            raise UserError(f"no tar fits {', '.join(self.tars)}; check the path and quote the pattern for the shell")
        doubled = {address for address in found if found.count(address) > 1} if len(set(found)) < len(found) else set()
        if doubled:
            raise UsageError(f"the tar {min(doubled)} is named twice in source.tars")
        return found

    def describe(self) -> dict[str, Any]:
        addresses = self.addresses()
        listing = "\n".join(addresses).encode()
        return {
            "kind": "tars",
            "tars": len(addresses),
            "listing": hashlib.sha256(listing).hexdigest(),
            "keys": self.keys,
            "filters": json.loads(json.dumps(dataclasses.asdict(self.filters))),
        }

    def total(self) -> int | None:
        """By the statistics that img2dataset writes beside its tars; without them only a scan of every tar would tell."""
        addresses = self.addresses()
        if len(addresses) > _COUNTED_TARS:
            return None
        with ThreadPoolExecutor(16) as pool:
            counts = list(pool.map(_stated_count, addresses))
        return None if None in counts else sum(count for count in counts if count)

    def units(self, shard_size: int, limit: int | None = None) -> Iterator[Unit]:
        """One unit for each tar; `shard_size` does not apply. `limit` counts samples by scanning the tars' headers."""
        left = limit
        for index, address in enumerate(self.addresses()):
            if left is None:
                yield Unit(index, {"tar": address, "first": None})
            elif left > 0:
                count = _count(address)
                yield Unit(index, {"tar": address, "first": min(left, count)})
                left -= count

    def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
        """The samples of one tar in the order of their first members; then what img2dataset lists as failed."""
        address, first = unit.items["tar"], unit.items["first"]
        outputs = self._read_tar(address)
        for number, output in enumerate(outputs):
            if first is not None and number >= first:
                return
            yield output

    def _read_tar(self, address: str) -> Iterator[RawSample | Failure]:
        stem = address.rsplit("/", 1)[-1].removesuffix(".tar")
        rows, damage = _img2dataset_rows(address)
        own = self.keys == "own" or (self.keys == "auto" and (rows is not None or _is_ours(address)))
        prefix = "" if own else f"{stem}-"
        arrived: set[str] = set()
        broken = f"{prefix}{stem}"  # the key under which damage of the tar is listed
        try:
            with _open(address) as (file, size):
                members, problem = scan(file, size)
                samples = _samples(members)
                if problem and _last_is_thin(samples):
                    last, _ = samples.popitem()
                    broken, problem = prefix + last, f"{problem}; sample {last!r} is incomplete"
                    arrived.add(last)
                for name, where in samples.items():
                    arrived.add(name)
                    yield _read_sample(file, legal_key(prefix + name), where, self.filters)
        except OSError as error:
            problem = f"it cannot be read ({error})"
        if problem:
            yield Failure(legal_key(broken), "read", "bad_tar", f"{address} is not whole: {problem}")
        if damage:
            yield Failure(legal_key(f"{prefix}{stem}-table"), "read", "table_unreadable", damage)
        for row in rows or ():
            if row["key"] not in arrived:
                status = row.get("error_message") or row.get("status") or "it is not in the tar"
                reason = "missing_in_tar" if row.get("status") == "success" else "failed_upstream"
                yield Failure(legal_key(prefix + str(row["key"])), "read", reason, f"img2dataset says: {status}")


def expand_braces(pattern: str) -> Iterator[str]:
    """`a{00..02}.tar` and `{a,b}.tar`, as a shell expands them; nested braces are not supported."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span and int(span[2]) - int(span[1]) > 10_000_000:
        raise UsageError(f"{pattern} stands for more than ten million tars; that cannot be meant")
    options = (
        (f"{number:0{len(span[1])}d}" for number in range(int(span[1]), int(span[2]) + 1))
        if span
        else match[1].split(",")
    )
    for option in options:
        yield from expand_braces(pattern[: match.start()] + option + pattern[match.end() :])


def legal_key(name: str) -> str:
    """`name` itself where it is a legal key, else what is legal of it and 8 hex digits of its sha256."""
    if KEY.match(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[-80:].strip("_") + f"-{digest}"


# ---- inside one tar --------------------------------------------------------------------------------------------------


class _open:
    """An address opened for reading, with its size in bytes."""

    def __init__(self, address: str) -> None:
        self._open_file = fsspec.open(address, "rb")

    def __enter__(self) -> tuple[IO[bytes], int]:
        file = self._open_file.open()
        size = file.seek(0, 2)
        file.seek(0)
        return file, size

    def __exit__(self, *_: object) -> None:
        self._open_file.close()


def _split(name: str) -> tuple[str, str]:
    """A member's sample and suffix, by WebDataset's rule: the suffix begins at the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _samples(members: list[Member]) -> dict[str, list[tuple[str, Member]]]:
    samples: dict[str, list[tuple[str, Member]]] = {}
    for member in members:
        name, suffix = _split(member.name)
        if suffix:
            samples.setdefault(name.removeprefix("./"), []).append((suffix, member))
    return samples


def _last_is_thin(samples: Mapping[str, list[tuple[str, Member]]]) -> bool:
    """Whether the last sample lacks a member that the one before it has: where a tar breaks off, it may have been cut."""
    suffixes: list[set[str]] = [set(), set(), *({suffix for suffix, _ in where} for where in samples.values())]
    return not suffixes[-2] <= suffixes[-1]


def _count(address: str) -> int:
    with _open(address) as (file, size):
        return len(_samples(scan(file, size)[0])) + len(_img2dataset_rows(address)[0] or ())


def _read_sample(file: IO[bytes], key: str, where: list[tuple[str, Member]], filters: Filters) -> RawSample | Failure:
    """One sample from the places of its members."""

    def failure(reason: str, message: str) -> Failure:
        return Failure(key, "read", reason, message)

    members: Where = {}
    for suffix, member in where:
        if suffix in members:
            return failure("duplicate_member", f"the tar has two members {member.name!r}")
        members[suffix] = member
    images = [suffix for suffix in IMAGE_SUFFIXES if suffix in members]
    if not images:
        return failure("no_image", f"its members are {', '.join(sorted(members))}; none is an image")
    for suffix in (*images[:1], *(name for name in (*CAPTION_SUFFIXES, "json") if name in members)):
        bound = MAX_MEMBER_BYTES if suffix == images[0] else MAX_TEXT_BYTES
        if members[suffix].size > bound:
            return failure(
                "too_many_bytes", f"{members[suffix].name!r} has {members[suffix].size} bytes, above {bound}"
            )

    def data(suffix: str) -> bytes:
        file.seek(members[suffix].offset)
        return file.read(members[suffix].size)

    meta: dict[str, Any] = {}
    if "json" in members:
        try:
            meta = parse_json_object(data("json"))
        except MetadataError as error:
            return failure("bad_metadata", f"its json cannot be used: {error}")
    captions = [suffix for suffix in CAPTION_SUFFIXES if suffix in members]
    if captions:
        try:
            caption = data(captions[0]).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return failure("caption_not_utf8", f"its {captions[0]} is not UTF-8: {error}")
    else:
        caption = _caption_of(meta)
    if dropped := filters.drop(meta, caption):
        return failure(*dropped)
    return RawSample(key, data(images[0]), caption, meta)


def _caption_of(meta: Mapping[str, Any]) -> str:
    return next((meta[field] for field in CAPTION_FIELDS if isinstance(meta.get(field), str)), "")


# ---- beside a tar ----------------------------------------------------------------------------------------------------


def _img2dataset_rows(address: str) -> tuple[list[dict[str, Any]] | None, str]:
    """key, status and error_message of every row of the table that img2dataset writes beside its tar, None without one; and
    what is wrong with it: an img2dataset that was killed leaves half of one."""
    table_address = address.removesuffix(".tar") + ".parquet"
    fs, path = url_to_fs(table_address)
    if not fs.exists(path):
        return None, ""
    try:
        with fs.open(path, "rb") as file:
            table = pq.ParquetFile(file)
            columns = [name for name in ("key", "status", "error_message") if name in table.schema_arrow.names]
            return (table.read(columns).to_pylist() if "key" in columns else None), ""
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        return [], f"{table_address} cannot be read, so what failed upstream is not known: {error}"


def _stated_count(address: str) -> int | None:
    """How many rows img2dataset says that it tried for a tar; None if it does not say."""
    fs, path = url_to_fs(address.removesuffix(".tar") + "_stats.json")
    try:
        count = json.loads(fs.cat_file(path))["count"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return count if isinstance(count, int) and count >= 0 else None


def _is_ours(address: str) -> bool:
    folder, _, name = address.rpartition("/")
    fs, path = url_to_fs(f"{folder or '.'}/dataset.json")
    return bool(fs.exists(path)) and name.removesuffix(".tar").isdigit()
