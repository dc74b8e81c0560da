"""The JSON files of a dataset: dataset.json and the commit mark of each shard, in canonical form with a checksum."""

import hashlib
import json
from collections.abc import Mapping
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
