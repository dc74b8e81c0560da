"""The JSON files of a dataset: dataset.json and the commit mark of each shard, in canonical form with a checksum."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from shards.core.errors import UserError

VERSION = 1
DATASET = "dataset.json"


class MarkError(UserError):
    """A dataset.json or commit mark that is damaged or was written by another version."""


def shard_name(index: int) -> str:
    """The name of a shard without suffix: at least six digits."""
    return f"{index:06d}"


def canonical(document: Mapping[str, Any]) -> bytes:
    """One line of JSON with sorted keys."""
    return (json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def digest(document: Mapping[str, Any]) -> str:
    """sha256, in hex, of a document's canonical form."""
    return hashlib.sha256(canonical(document)).hexdigest()


def seal(document: Mapping[str, Any]) -> bytes:
    """The file for a document: canonical, with the checksum of all the rest under "checksum"."""
    body = {key: value for key, value in document.items() if key != "checksum"}
    return canonical(body | {"checksum": digest(body)})


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """The document of a sealed file. Raises MarkError when a bit of it changed, or another version wrote it."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MarkError(f"{name} is damaged: it is not JSON ({error})") from error
    if not isinstance(document, dict) or "checksum" not in document:
        raise MarkError(f"{name} is damaged: it has no checksum")
    if document.get("version") != VERSION:
        raise MarkError(f"{name} has format version {document.get('version')!r}; this program reads version {VERSION}")
    try:
        whole = seal(document) == data
    except (ValueError, RecursionError):  # half a surrogate pair or NaN, which json reads but we never write
        whole = False
    if not whole:
        raise MarkError(f"{name} is damaged: its checksum does not fit; make the dataset again with the same command")
    return document


# ---- what a crafted file may hold, although its checksum fits ---------------------------------------------------------


def mark_faults(mark: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong inside a mark whose checksum fits."""
    counts, index = mark.get("counts"), mark.get("index")
    for name in ("tar", "failures"):
        stated = mark.get(name)
        if not (isinstance(stated, dict) and isinstance(stated.get("sha256"), str) and is_count(stated.get("size"))):
            yield f"the field {name!r} does not state a sha256 and a size"
    if not (isinstance(counts, dict) and is_count(counts.get("in")) and is_count(counts.get("ok"))
            and isinstance(counts.get("failed"), dict) and all(map(is_count, counts["failed"].values()))):  # fmt: skip
        yield "the field 'counts' does not state in, ok and failed"
    elif counts["in"] != counts["ok"] + sum(counts["failed"].values()):
        yield f"the counts do not add up: in is {counts['in']}, ok {counts['ok']}, failed {shortened(counts['failed'])}"
    elif isinstance(index, dict) and counts["ok"] != len(index):
        yield f"counts.ok is {counts['ok']}, but the index has {len(index)} samples"
    places = index.values() if isinstance(index, dict) else [None]
    if not all(isinstance(place, dict) and place and all(map(_is_place, place.values())) for place in places):
        yield "the field 'index' does not state an offset and a size for each member"


def is_count(value: Any) -> bool:
    """Whether this is a number of things."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_place(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(is_count(number) and number < 1 << 63 for number in value)
    )


def shortened(value: Any) -> str:
    """A value of a file in an error message."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 300 else text[:300] + "..."
