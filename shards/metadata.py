"""The limits of a sample's metadata, which hold on every way into a dataset; what is within them, every reader can read.

Python's JSON reader gives up at about 980 levels, sooner where its caller is deep in the stack already, and other readers
have limits of their own; a megabyte of metadata belongs to no image.
"""

import json
from collections.abc import Mapping
from typing import Any

from shards.sample import SampleError

MAX_METADATA_BYTES = 1 << 20
"""Of a source's fields as compact JSON, without what we add under "intrinsics"."""
MAX_METADATA_DEPTH = 64
"""Lists and objects inside each other, the metadata's own object among them."""


class MetadataError(SampleError):
    """Metadata that is too large or nested too deep. The message is the end of a sentence about it."""


def check_metadata(fields: Mapping[str, Any]) -> None:
    """Raises MetadataError for fields that are beyond the limits, or that JSON cannot hold."""
    check_depth(fields)
    try:
        size = len(json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode())
    except (TypeError, ValueError) as error:
        raise MetadataError(f"it has a value that JSON cannot hold: {error}") from error
    if size > MAX_METADATA_BYTES:
        raise MetadataError(f"it has {size:,} bytes; {MAX_METADATA_BYTES:,} are allowed")


def check_depth(fields: Mapping[str, Any]) -> None:
    """Raises MetadataError for fields that are nested too deep. Looks at lists and objects alone, level by level."""
    level: list[Any] = [fields]
    for _ in range(MAX_METADATA_DEPTH):
        level = [
            item
            for node in level
            for item in (node.values() if isinstance(node, Mapping) else node)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise MetadataError(f"it is nested more than {MAX_METADATA_DEPTH} deep")
