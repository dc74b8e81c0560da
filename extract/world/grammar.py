"""Captions of the demo world read back: the exact inverse of extract/world/captions.py, which holds the grammar."""

import re
from dataclasses import dataclass

from extract.world.vocabulary import COLOURS, FLOORS, MATERIALS, PAINTS, RELATIONS, SHAPES, SKIES, WALLS
from shards.core.errors import UserError


def _either(words: list[str]) -> str:
    """A pattern that takes any of these, longest first."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


def _walls() -> dict[str, tuple[str, str]]:
    """phrase -> (wall, paint) for every wall that a caption can name; paint is "" for walls that are not painted."""
    found = {}
    for name, wall in WALLS.items():
        for paint in PAINTS if "{colour}" in wall.phrase else [""]:
            phrase = wall.phrase.format(colour=paint)
            found[f"an {phrase[2:]}" if phrase[2] in "aeiou" else phrase] = (name, paint)
    return found


_FLOORS = {floor.phrase: name for name, floor in FLOORS.items()}
_SKIES = {sky.phrase: name for name, sky in SKIES.items()}
_WALLS = _walls()
_MATERIALS = {material.word: name for name, material in MATERIALS.items() if material.word}
_NAME = rf"an? (?:(?:{_either(list(_MATERIALS))}) )?(?:(?:{_either(list(COLOURS))}) )?(?:{_either(list(SHAPES))})"
_RELATION = _either(list(RELATIONS))
_CAPTION = re.compile(
    rf"(?P<there>there is )?(?P<first>{_NAME})"
    rf"(?:(?: (?P<relation>{_RELATION}) (?P<second>{_NAME})(?: and (?P<relation2>{_RELATION}) (?P<third>{_NAME}))?)"
    rf"|(?: and (?P<other>{_NAME})))?"
    rf"(?: on (?P<floor>{_either(list(_FLOORS))}))?"
    rf"(?:(?: in front of (?P<wall>{_either(list(_WALLS))}))|(?: under (?P<sky>{_either(list(_SKIES))})))?"
)


@dataclass(frozen=True)
class Named:
    """An object that a caption names. material and colour are "" where it does not say them."""

    shape: str
    colour: str = ""
    material: str = ""

    def __str__(self) -> str:
        words = [MATERIALS[self.material].word if self.material else "", self.colour, self.shape]
        text = " ".join(word for word in words if word)
        return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


@dataclass(frozen=True)
class Stated:
    """objects[subject] is `relation` objects[object]."""

    subject: int
    relation: str
    object: int


@dataclass(frozen=True)
class Caption:
    """What a caption says. floor, wall, paint, sky: names in the vocabulary's tables, "" where it is silent."""

    objects: tuple[Named, ...]
    relations: tuple[Stated, ...] = ()
    floor: str = ""
    wall: str = ""
    paint: str = ""
    sky: str = ""
    there_is: bool = False

    def __str__(self) -> str:
        """The caption itself again."""
        text = " and ".join(str(one) for one in self.objects)
        if self.relations:
            stated = [f"{one.relation} {self.objects[one.object]}" for one in self.relations]
            text = f"{self.objects[0]} {' and '.join(stated)}"
        wall = next((phrase for phrase, pair in _WALLS.items() if pair == (self.wall, self.paint)), "")
        parts = [f"there is {text}" if self.there_is else text]
        parts += [f"on {FLOORS[self.floor].phrase}"] if self.floor else []
        parts += [f"in front of {wall}"] if wall else []
        parts += [f"under {SKIES[self.sky].phrase}"] if self.sky else []
        return " ".join(parts)


def parse(text: str) -> Caption:
    """Reads a caption of the demo world's grammar. Raises UserError for any other text."""
    found = _CAPTION.fullmatch(text.strip())
    if found is None:
        raise UserError(
            f"{text!r} is no caption of the demo world, such as 'a red sphere left of a blue cube on grass'"
        )
    part = found.groupdict(default="")
    names = [part["first"], part["second"], part["third"], part["other"]]
    objects = tuple(_named(name) for name in names if name)
    relations = [Stated(0, part[key], number) for number, key in ((1, "relation"), (2, "relation2")) if part[key]]
    wall, paint = _WALLS[part["wall"]] if part["wall"] else ("", "")
    return Caption(
        objects=objects,
        relations=tuple(relations),
        floor=_FLOORS.get(part["floor"], ""),
        wall=wall,
        paint=paint,
        sky=_SKIES.get(part["sky"], ""),
        there_is=bool(part["there"]),
    )


def is_caption(text: str) -> bool:
    """Whether the text is in the grammar, so that its layout can be judged."""
    return _CAPTION.fullmatch(text.strip()) is not None


def _named(text: str) -> Named:
    words = text.split()[1:]
    *before, shape = words
    colour = next((word for word in before if word in COLOURS), "")
    material = next((_MATERIALS[word] for word in before if word in _MATERIALS), "")
    return Named(shape, colour, material)
