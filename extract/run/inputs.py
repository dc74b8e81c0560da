"""What a shard was made from and with, as its mark keeps it; and whether an earlier mark is still up to date.

A mark's `made` has the digest of the unit, the estimators' ids, a digest of the image settings, and the sizes (and tags) of
the unit's input files. So a tar that grew, or a table that was replaced, has its shards made again, by name. Marks of
earlier versions lack the last two: of these shards nobody can tell whether their inputs changed, and they are kept.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from extract.images.prepare import ImageRules
from extract.sources import InputFile, Unit
from shards.marks import digest

CONTENT = ("listing", "bytes", "fingerprint")
"""Fields of a source's description that say what its inputs contain, and not which inputs they are: a change of them does
not make another dataset, but has the units concerned made again."""
NAMES, PLACE = "names", "place"
"""Digests of the inputs' names, and of the source's address, in a source's description."""
_NAMED = 3
_LINES = 20


def made_of(unit: Unit, estimators: Mapping[str, str], image: ImageRules) -> dict[str, Any]:
    """What a unit's mark says of how it was made, as JSON gives it back."""
    made: dict[str, Any] = {
        "unit": digest({"items": unit.items}),
        "estimators": dict(estimators),
        "image": digest(dataclasses.asdict(image)),
    }
    if unit.files:
        made["inputs"] = {
            "names": digest({"names": [file.name for file in unit.files]})[:16],
            "sizes": [file.size for file in unit.files],
            "tags": [file.tag for file in unit.files] if any(file.tag for file in unit.files) else [],
        }
    return made


def is_current(old: Mapping[str, Any], made: Mapping[str, Any]) -> bool:
    """Whether a shard with the mark `old` is what making it now would give, as far as the mark can tell."""
    known = {name: value for name, value in made.items() if name in old or name not in ("image", "inputs")}
    return dict(old) == known


def same_source(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of the same inputs, which may have changed since.

    Where the address changed too, the content must be the same: another folder with the same names is another source.
    """
    without_place = [{name: value for name, value in side.items() if name != PLACE} for side in (old, new)]
    if all(NAMES in side for side in (old, new)) and old.get(PLACE) == new.get(PLACE):
        without_place = [{n: v for n, v in side.items() if n not in CONTENT} for side in without_place]
    elif NAMES not in old:  # written by an earlier version
        without_place[1].pop(NAMES, None)
    return without_place[0] == without_place[1]


@dataclass
class Changes:
    """Collects what is to be said of shards that are made again because their inputs changed."""

    shards: int = 0
    untold: int = 0
    """Shards whose marks say nothing of their inputs."""
    _lines: list[str] = field(default_factory=list)

    def look(self, shard: str, old: Mapping[str, Any], made: Mapping[str, Any], files: Sequence[InputFile]) -> str:
        """What is to be said of a shard that was made before: "" if nothing, else a sentence."""
        if is_current(old, made):
            self.untold += bool(files) and "inputs" not in old
            return ""
        if old.get("inputs") == made.get("inputs") or "inputs" not in old or "inputs" not in made:
            return ""  # other estimators, or a larger limit
        self.shards += 1
        if self.shards > _LINES:
            return ""
        return f"inputs changed: shard {shard} is made again because {_difference(old['inputs'], files)}"

    def summary(self) -> list[str]:
        """What is to be said when all units were looked at."""
        said = []
        if self.shards > _LINES:
            said.append(f"inputs changed: {self.shards} shards in all are made again")
        if self.untold:
            said.append(
                f"{self.untold} shards were made by an earlier version, which kept no sizes of input files: whether their "
                "inputs changed since cannot be told, and they are kept; remove a shard's .json to have it made again"
            )
        return said


def _difference(old: Mapping[str, Any], files: Sequence[InputFile]) -> str:
    """What happened to the input files of a shard."""
    sizes, tags = old["sizes"], old["tags"] or [""] * len(old["sizes"])
    if old["names"] != digest({"names": [file.name for file in files]})[:16] or len(sizes) != len(files):
        return f"it has other input files than before ({_listed([file.name for file in files])})"
    words = [_what(size, tag, file) for size, tag, file in zip(sizes, tags, files, strict=True)]
    return _listed([word for word in words if word])


def _what(size: int, tag: str, file: InputFile) -> str:
    if size == file.size:
        return "" if tag == file.tag else f"{file.name} was replaced by another of the same size"
    if size < 0 or file.size < 0:
        return f"{file.name} {'was not there before' if size < 0 else 'is not there any more'}"
    return f"{file.name} {'grew' if file.size > size else 'shrank'} from {size} to {file.size} bytes"


def _listed(words: Sequence[str]) -> str:
    counted = list(Counter(words))
    more = f" and {len(counted) - _NAMED} more" if len(counted) > _NAMED else ""
    return ", ".join(counted[:_NAMED]) + more
