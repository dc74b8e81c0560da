"""WebDataset tars as a source: those of img2dataset, plain ones, and our own output.

One input tar is one unit, and so one output shard: the tars' own partition is kept. Members of a sample may stand in any
order and anywhere in their tar. Nothing is unpickled, nothing is unpacked to the disk; members that are not an image,
a caption or json are ignored.

    image     .jpg .jpeg .png .webp .gif .bmp .tif .tiff .avif
    caption   .txt .caption .text ... (extract.sources.caption_names), else a field of .json
    metadata  .json, kept as it came

Beside a tar of img2dataset lies a parquet table of all its rows: what failed there is listed here as a failure, too.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from extract.sources import Failure, InputFile, RawSample, Unit
from extract.sources.caption_names import CAPTION_SUFFIXES, CAPTION_TREE, IMAGE_TREE, LIKELY_SUFFIXES
from extract.sources.caption_reader import Caption, caption_in, caption_of_bytes
from extract.sources.caption_report import CaptionReport, Glance, report_of
from extract.sources.files import ReadProblem, input_file
from extract.sources.filters import Filters
from extract.sources.foreign_tar import Member, read_member, scan
from extract.sources.tar_keys import Origin, TarKeys, are_apart, labels_of
from extract.sources.values import parse_json_object, with_kept_fields
from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from shards.dataset import Dataset
from shards.metadata import MAX_METADATA_BYTES, MetadataError
from shards.sample import KEY, MAX_MEMBER_BYTES
from shards.writer import committed_mark

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
MAX_TEXT_BYTES = MAX_METADATA_BYTES
"""Captions and json above this are refused; they are read whole into memory."""
_COUNTED_TARS = 10_000
_LOOKED_UP = 64
_GLANCED_BYTES = 256 << 20

Where = dict[str, Member]
"""The members of one sample: suffix -> place."""


@dataclass(frozen=True)
class TarSource:
    """tars: one address or several, local or fsspec, with braces (`{00000..00099}.tar`) or globs (`*.tar`).

    keys: "own" keeps the keys of the tars, which must then be unique over all of them; "prefixed" puts the tar's name
    before each; "auto" is "own" where a tar comes from img2dataset or from us, else "prefixed".
    image_member: the member that is the image, such as "webp" or "original.jpg"; without it the one that has the suffix of
    an image, and a sample that has several is a failure.
    columns: the fields of the json that are kept; None for all.
    captions: "auto", or "none": they are left out. caption_suffix: of the members that hold them, instead of the usual ones.
    caption_column: the field of the json that holds them (`caption.en`: an entry of it); it comes before all members.
    encoding: of members that are not UTF-8.
    filters: on the fields of a sample's json, and on its caption; applied before its image is read.
    """

    tars: tuple[str, ...]
    keys: str = "auto"
    image_member: str | None = None
    columns: tuple[str, ...] | None = None
    captions: Literal["auto", "none"] = "auto"
    caption_suffix: str | None = None
    caption_column: str | None = None
    encoding: str | None = None
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self) -> None:
        if not self.tars:
            raise UsageError("source.tars is empty; name at least one tar, such as 'data/{00000..00099}.tar'")
        if self.keys not in ("auto", "own", "prefixed"):
            raise UsageError(f"source.keys = {self.keys!r} is not one of 'auto', 'own', 'prefixed'")
        if self.image_member is not None and not self.image_member.strip("."):
            raise UsageError("source.image_member is empty; give what follows the key's dot, such as 'jpg'")

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
        chosen = {name: getattr(self, name) for name in ("caption_suffix", "caption_column", "encoding")}
        chosen["captions"] = None if self.captions == "auto" else self.captions
        described = {name: value for name, value in chosen.items() if value is not None} | {
            "kind": "tars",
            "tars": len(addresses),
            "listing": hashlib.sha256(listing).hexdigest(),
            "keys": self.keys,
            "filters": json.loads(json.dumps(dataclasses.asdict(self.filters))),
            **({} if self.columns is None else {"columns": list(self.columns)}),
        }
        return described if self.image_member is None else {**described, "image_member": self.image_member}

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
        addresses = self.addresses()
        labels = self._labels(addresses)
        left = limit
        for index, (address, files) in enumerate(_with_files(addresses)):
            items: dict[str, Any] = {"tar": address, "first": None}
            if left is not None:
                if left <= 0:
                    return
                count = _count(address)
                items["first"] = min(left, count)
                left -= count
            if label := labels.get(address.rpartition("/")[0]):
                items["label"] = label
            yield Unit(index, items, files)

    def caption_report(self, limit: int | None = None) -> CaptionReport:
        """Where captions come from, by the first tars' first samples."""
        if self.captions == "none":
            return CaptionReport(inputs=0, filled=0, complete=True, wanted=False)
        settings = {"member": "source.caption_suffix", "field": "source.caption_column"}
        return report_of(self._glances(), limit=limit, settings=settings)

    def _glances(self) -> Iterator[Glance]:
        """What each sample has for a caption; of a large tar, that of its first samples."""
        for address in self.addresses():
            try:
                with _open(address) as (file, size):
                    samples = _samples(scan(file, min(size, _GLANCED_BYTES))[0])
                    if size > _GLANCED_BYTES and len(samples) > 1:
                        samples.popitem()  # it may go on
                    for where in samples.values():
                        yield from _glance(file, where, self)
            except OSError:
                continue  # a failure of its own

    def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
        """The samples of one tar in the order of their first members; then what img2dataset lists as failed."""
        address, first = unit.items["tar"], unit.items["first"]
        outputs = self._read_tar(address, unit.items.get("label", ""))
        ours = is_shard_of_ours(address)  # its maps are kept, and what we noted of its images
        for number, output in enumerate(outputs):
            if first is not None and number >= first:
                return
            yield output if ours and self.columns is None else with_kept_fields(output, self.columns)

    def _labels(self, addresses: Sequence[str]) -> Mapping[str, str]:
        """What stands before the keys of each folder's tars, so that all keys differ: see extract.sources.tar_keys."""
        if self.keys != "own" and are_apart(addresses):
            return {}
        with ThreadPoolExecutor(16) as pool:
            origins = list(pool.map(_origin, addresses))
        tars = [
            TarKeys(address, self.keys == "own" or (self.keys == "auto" and origin != "other"), origin)
            for address, origin in zip(addresses, origins, strict=True)
        ]
        return labels_of(tars, self.keys == "own", _names)

    def _read_tar(self, address: str, label: str) -> Iterator[RawSample | Failure]:
        stem = address.rsplit("/", 1)[-1].removesuffix(".tar")
        folder_label = f"{label}-" if label else ""
        rows, damage = _img2dataset_rows(address)
        own = self.keys == "own" or (self.keys == "auto" and (rows is not None or _is_ours(address)))
        prefix = folder_label if own else f"{folder_label}{stem}-"
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
                    yield _read_sample(file, legal_key(prefix + name), where, self)
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
    """The members by sample. Folders are none, unless they have the name of an image.

    Where several archives stand in one file and have a sample of the same name, each has its own.
    """
    samples: dict[str, list[tuple[str, Member]]] = {}
    for member in members:
        name, suffix = _split(member.name)
        if not suffix or (member.is_folder and suffix not in IMAGE_SUFFIXES):
            continue
        name = name.removeprefix("./")
        if any(s == suffix and other.archive != member.archive for s, other in samples.get(name, ())):
            name = f"{name} (archive {member.archive + 1})"
        samples.setdefault(name, []).append((suffix, member))
    return _with_trees(samples)


def _with_trees(samples: dict[str, list[tuple[str, Member]]]) -> dict[str, list[tuple[str, Member]]]:
    """The samples, with captions of a folder of their own (`captions/a.txt`) at their images (`images/a.jpg`)."""
    alone = {name for name, where in samples.items() if "/" in name and not any(s in IMAGE_SUFFIXES for s, _ in where)}
    if not alone:
        return samples
    images: dict[str, list[str]] = {}
    for name in samples.keys() - alone:
        images.setdefault(_without_tree(name, IMAGE_TREE), []).append(name)
    for name in sorted(alone):
        plain = _without_tree(name, CAPTION_TREE)
        owners = images.get(plain, []) if plain != name else []
        suffixes = {suffix for suffix, _ in samples[name]}
        if (
            len(owners) == 1
            and suffixes <= {*CAPTION_SUFFIXES, "json"}
            and suffixes.isdisjoint(dict(samples[owners[0]]))
        ):
            samples[owners[0]] += samples.pop(name)
    return samples


def _without_tree(name: str, tree: re.Pattern[str]) -> str:
    """A sample's name without the first folder that is called like a tree."""
    *folders, base = name.split("/")
    at = next((at for at, folder in enumerate(folders) if tree.fullmatch(folder)), None)
    return name if at is None else "/".join((*folders[:at], *folders[at + 1 :], base))


def _last_is_thin(samples: Mapping[str, list[tuple[str, Member]]]) -> bool:
    """Whether the last sample lacks a member that the one before it has: where a tar breaks off, it may have been cut."""
    suffixes: list[set[str]] = [set(), set(), *({suffix for suffix, _ in where} for where in samples.values())]
    return not suffixes[-2] <= suffixes[-1]


def _count(address: str) -> int:
    with _open(address) as (file, size):
        return len(_samples(scan(file, size)[0])) + len(_img2dataset_rows(address)[0] or ())


def _read_sample(file: IO[bytes], key: str, where: list[tuple[str, Member]], source: TarSource) -> RawSample | Failure:
    """One sample from the places of its members."""

    def failure(reason: str, message: str) -> Failure:
        return Failure(key, "read", reason, message)

    members: Where = {}
    for suffix, member in where:
        if suffix in members:
            return failure("duplicate_member", f"the tar has two members {member.name!r}")
        members[suffix] = member
    images = _images_among(members, source.image_member)
    if not images:
        return failure("no_image", _no_image(members, source.image_member))
    if len(images) > 1:
        names = " and ".join(repr(members[suffix].name) for suffix in images)
        dots = "; a sample's name ends at its first dot, so rename them if they are two" if "." in images[-1] else ""
        return failure(
            "several_images", f"both {names} may be its image; choose with source.image_member = {images[0]!r}{dots}"
        )
    texts, fields = _caption_members(members, images[0], source), _json_member(members, images[0])
    for suffix in (images[0], *texts[:1], *fields):
        member = members[suffix]
        if member.problem:
            return failure(*member.problem)
        if member.is_folder:
            return failure("not_a_file", f"{member.name!r} is a folder, not a file")
        bound = MAX_MEMBER_BYTES if suffix == images[0] else MAX_TEXT_BYTES
        if members[suffix].size > bound:
            return failure(
                "too_many_bytes", f"{members[suffix].name!r} has {members[suffix].size} bytes, above {bound}"
            )

    meta: dict[str, Any] = {}
    if fields:
        try:
            meta = parse_json_object(_data(file, members[fields[0]]))
        except MetadataError as error:
            return failure("bad_metadata", f"its json cannot be used: {error}")
    try:
        caption = _caption_of(file, members, texts, meta, source)
    except ReadProblem as problem:
        return failure(problem.reason, problem.message)
    if dropped := source.filters.drop(meta, caption.text):
        return failure(*dropped)
    return RawSample(key, _data(file, members[images[0]]), caption.text, meta, caption.passed_over)


def _images_among(members: Where, image_member: str | None) -> list[str]:
    """The suffixes of the members that may be the image: the one that is asked for, or all that look like images.

    A further image counts where it has a caption of its own (`a.jpg`, `a.txt`, `a.5.jpg`, `a.5.txt`): then names have dots.
    """
    if image_member is None:
        plain = [suffix for suffix in IMAGE_SUFFIXES if suffix in members]
        return plain + [suffix for suffix in sorted(members) if plain and _is_captioned(members, suffix)]
    suffix = image_member.strip(".").lower()
    return [suffix] if suffix in members else []


def _is_captioned(members: Where, suffix: str) -> bool:
    """Whether a member is an image of more than one suffix (`5.jpg`) beside a caption of its own (`5.txt`)."""
    stem, dot, last = suffix.rpartition(".")
    return bool(dot) and last in IMAGE_SUFFIXES and any(f"{stem}.{name}" in members for name in CAPTION_SUFFIXES)


def _no_image(members: Where, image_member: str | None) -> str:
    listed = f"its members are {', '.join(sorted(members))}"
    if image_member is not None:
        return f"{listed}; there is no {image_member!r}, which source.image_member asks for"
    likely = next((suffix for suffix in sorted(members) if suffix.rpartition(".")[2] in IMAGE_SUFFIXES), None)
    advice = f"; source.image_member = {likely!r} would take that one" if likely else ""
    return f"{listed}; none is an image{advice}"


def _glance(file: IO[bytes], where: list[tuple[str, Member]], source: TarSource) -> Iterator[Glance]:
    """What a sample has for a caption; nothing for one that is a failure."""
    members = dict(where)
    images = _images_among(members, source.image_member)
    if len(images) != 1 or any(member.problem or member.is_folder for member in members.values()):
        return
    image = images[0]
    texts, fields = _caption_members(members, image, source), _json_member(members, image)
    if any(members[suffix].size > MAX_TEXT_BYTES for suffix in (*fields, *texts[:1])):
        return
    try:
        meta = parse_json_object(_data(file, members[fields[0]])) if fields else {}
        caption = _caption_of(file, members, texts, meta, source)
    except (ReadProblem, MetadataError):
        return
    in_member = caption.field.startswith(".")
    origin = f"member {caption.field}" if in_member else f"field {caption.field!r} of the .json"
    yield Glance(origin, caption.text, caption.passed_over)


def _data(file: IO[bytes], member: Member) -> bytes:
    return read_member(file, member)


def _json_member(members: Mapping[str, Member], image: str) -> list[str]:
    """The suffix of a sample's metadata, if there are any: `a.json`, or `a.jpg.json` of the image `a.jpg`."""
    return [suffix for suffix in ("json", f"{image}.json") if suffix in members][:1]


def _caption_members(members: Mapping[str, Member], image: str, source: TarSource) -> list[str]:
    """The suffixes of a sample's members that may hold its caption, in order; those that are empty come last."""
    if source.captions == "none":
        return []
    given = source.caption_suffix
    suffixes = CAPTION_SUFFIXES if given is None else (given.lower().lstrip("."),)
    if stem := image.rpartition(".")[0]:  # of `5.jpg` first `5.txt`
        suffixes = (*(f"{stem}.{name}" for name in suffixes), *suffixes)
    named = [suffix for name in suffixes for suffix in (name, f"{name}.gz", f"{image}.{name}", f"{image}.{name}.gz")]
    found = [suffix for suffix in named if suffix in members]
    return sorted(found, key=lambda suffix: members[suffix].size == 0)


def _caption_of(
    file: IO[bytes], members: Mapping[str, Member], texts: list[str], meta: Mapping[str, Any], source: TarSource
) -> Caption:
    """The caption of a sample: of the field that the user named, its first member with text, or its json."""
    if source.captions == "none":
        return Caption("")
    if source.caption_column is not None:
        return caption_in(meta, source.caption_column, MAX_TEXT_BYTES)
    for suffix in texts[:1]:
        text = caption_of_bytes(_data(file, members[suffix]), MAX_TEXT_BYTES, suffix, source.encoding)
        if text.strip():
            return Caption(text, f".{suffix}")
    found = caption_in(meta, None, MAX_TEXT_BYTES)
    others = [suffix for suffix in members if suffix in LIKELY_SUFFIXES and members[suffix].size]
    return (
        found
        if found.text.strip()
        else Caption("", "", (*(f"member .{suffix}" for suffix in others), *found.passed_over))
    )


# ---- beside a tar ----------------------------------------------------------------------------------------------------


def _img2dataset_rows(address: str) -> tuple[list[dict[str, Any]] | None, str]:
    """key, status and error_message of every row of the table that img2dataset writes beside its tar, None without one; and
    what is wrong with it: an img2dataset that was killed leaves half of one."""
    table_address = _table_beside(address)
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


def _with_files(addresses: Sequence[str]) -> Iterator[tuple[str, tuple[InputFile, ...]]]:
    """Each tar with the files that its samples come from: itself, and the table beside it. Some are looked up at once, as
    an object store takes its time for each."""
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(addresses), _LOOKED_UP):
            group = addresses[start : start + _LOOKED_UP]
            tars = pool.map(lambda address: input_file(address, ends=True), group)
            tables = pool.map(lambda address: input_file(_table_beside(address)), group)
            yield from zip(group, zip(tars, tables, strict=True), strict=True)


def _table_beside(address: str) -> str:
    return address.removesuffix(".tar") + ".parquet"


def _stated_count(address: str) -> int | None:
    """How many rows img2dataset says that it tried for a tar; None if it does not say."""
    fs, path = url_to_fs(address.removesuffix(".tar") + "_stats.json")
    try:
        count = json.loads(fs.cat_file(path))["count"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return count if isinstance(count, int) and count >= 0 else None


def _origin(address: str) -> Origin:
    """Who wrote a tar, as far as what lies beside it tells."""
    fs, path = url_to_fs(_table_beside(address))
    if fs.exists(path):
        return "img2dataset"
    return "ours" if _is_ours(address) else "other"


def _names(tar: TarKeys) -> list[str]:
    """The names of a tar's samples, from the table or mark beside it, else from its headers; [] if it cannot be read."""
    try:
        if tar.origin == "img2dataset":
            return [str(row["key"]) for row in _img2dataset_rows(tar.address)[0] or ()]
        if tar.origin == "ours":
            folder, _, name = tar.address.rpartition("/")
            if (mark := committed_mark(Folder(folder or "."), name.removesuffix(".tar"))) is not None:
                return list(mark["index"])
        with _open(tar.address) as (file, size):
            return list(_samples(scan(file, size)[0]))
    except (OSError, UserError):
        return []  # a failure of its own, when its turn comes


def _is_ours(address: str) -> bool:
    folder, _, name = address.rpartition("/")
    fs, path = url_to_fs(f"{folder or '.'}/dataset.json")
    return bool(fs.exists(path)) and name.removesuffix(".tar").isdigit()


def is_shard_of_ours(address: str) -> bool:
    """Whether a tar is a shard of a dataset that we wrote: its mark and the dataset's description are whole, and fit it."""
    folder, _, name = address.rpartition("/")
    shard = name.removesuffix(".tar")
    if not shard.isdigit():
        return False
    try:
        dataset = Dataset.open(folder or ".")
        return bool(dataset.mark(shard)["tar"]["size"] == dataset.folder.size(name))
    except (UserError, KeyError, TypeError):
        return False
