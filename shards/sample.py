"""One sample of a dataset: an image, its caption, its metadata and its intrinsic maps, as the bytes of a shard."""

import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from shards.core.errors import UserError
from shards.intrinsics import INTRINSICS, Empty, IntrinsicMap, MapError

IMAGE_MEMBERS = ("jpg", "png", "webp")
CACHES = ("latents.safetensors", "text.safetensors")
"""What `python -m train cache` adds to samples; opaque here."""
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
KEY = re.compile(r"[A-Za-z0-9_-]{1,100}\Z")

MAX_MEMBER_BYTES = 256 << 20
"""A larger member is refused before it is read; with MAX_IMAGE_PIXELS it bounds the memory that one sample can ask for."""
MAX_IMAGE_PIXELS = 1 << 27


class SampleError(UserError):
    """A sample that breaks the format: a bad key, a missing or damaged member."""


def check_key(key: str) -> str:
    """Returns `key` if it is legal: 1 to 100 letters, digits, `_` and `-`. Raises SampleError."""
    if not KEY.match(key):
        raise SampleError(f"{key!r} is not a legal key: use 1 to 100 letters, digits, '_' and '-'")
    return key


def member_names(image: str, intrinsics: tuple[str, ...], caches: Container[str] = ()) -> list[str]:
    """The members of every sample, in their order in the tar: image, txt, json, the maps as in the table, caches."""
    maps = (row.member for name, row in INTRINSICS.items() if name in intrinsics)
    return [image, "txt", "json", *maps, *(name for name in CACHES if name in caches)]


def encode_meta(meta: Mapping[str, Any]) -> bytes:
    """The json member: UTF-8, keys in their order, no NaN. Raises SampleError where a value has no JSON form."""
    try:
        return json.dumps(meta, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise SampleError(f"metadata that JSON cannot hold: {error}") from error


@dataclass(frozen=True)
class Sample:
    """A sample as stored. Members decode on demand; nothing in them is ever executed.

    Reading allocates at most MAX_MEMBER_BYTES for a member and 3 bytes for each of MAX_IMAGE_PIXELS while decoding.
    """

    key: str
    members: Mapping[str, bytes]

    def _member(self, name: str) -> bytes:
        if name not in self.members:
            raise SampleError(f"sample {self.key} has no member {name!r}; it has {', '.join(self.members)}")
        return self.members[name]

    @property
    def image_member(self) -> str:
        """The name of the image's member: jpg, png or webp."""
        for name in IMAGE_MEMBERS:
            if name in self.members:
                return name
        raise SampleError(f"sample {self.key} has no image; it has {', '.join(self.members)}")

    def image(self, empty: Empty = np.empty) -> np.ndarray:
        """The image, uint8 RGB (H, W, 3), into `empty`."""
        name = self.image_member
        try:
            with Image.open(BytesIO(self.members[name]), formats=_IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise SampleError(f"{self.key}.{name}: {image.width} x {image.height} pixels is above the limit")
                rgb = image if image.mode == "RGB" else image.convert("RGB")
                pixels = empty((rgb.height, rgb.width, 3), np.uint8)
                pixels[:] = np.asarray(rgb)
                return pixels
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise SampleError(f"{self.key}.{name} is damaged: {error}") from error

    @property
    def caption(self) -> str:
        try:
            return self._member("txt").decode("utf-8")
        except UnicodeDecodeError as error:
            raise SampleError(f"{self.key}.txt is not UTF-8: {error}") from error

    @property
    def meta(self) -> dict[str, Any]:
        """The metadata: the source's own fields, and ours under "intrinsics"."""
        try:
            meta = json.loads(self._member("json"))
        except (ValueError, RecursionError) as error:
            raise SampleError(f"{self.key}.json is not JSON: {error}") from error
        if not isinstance(meta, dict):
            raise SampleError(f"{self.key}.json is not a JSON object")
        return meta

    @property
    def intrinsics(self) -> tuple[str, ...]:
        """The names of the maps that this sample has."""
        return tuple(name for name, row in INTRINSICS.items() if row.member in self.members)

    def map(self, name: str) -> IntrinsicMap:
        """One intrinsic map, decoded. Raises SampleError naming the member."""
        row = INTRINSICS[name]
        described = self.meta.get("intrinsics")
        info = described.get(name) if isinstance(described, dict) else None
        try:
            return row.decode(self._member(row.member), info if isinstance(info, dict) else {})
        except MapError as error:
            raise SampleError(f"{self.key}.{row.member}: {error}") from error

    def maps(self) -> dict[str, IntrinsicMap]:
        """All intrinsic maps of the sample, decoded."""
        return {name: self.map(name) for name in self.intrinsics}
