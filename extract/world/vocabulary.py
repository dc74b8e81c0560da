"""What a scene can be made of, and the words that say so. Tables only: composition, captions and evaluation read them.

Colours are sRGB in 0..1. Every object of a plain scene has a colour name of its own, so a (colour, shape) pair names
one object of the picture.
"""

from dataclasses import dataclass

Colour = tuple[float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (0.80, 0.09, 0.08),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (0.95, 0.80, 0.10),
    "green": (0.12, 0.55, 0.16),
    "cyan": (0.10, 0.72, 0.76),
    "blue": (0.09, 0.24, 0.80),
    "purple": (0.46, 0.14, 0.66),
    "pink": (0.98, 0.54, 0.70),
    "brown": (0.40, 0.22, 0.10),
    "white": (0.90, 0.90, 0.88),
    "gray": (0.46, 0.47, 0.49),
    "black": (0.06, 0.06, 0.07),
}


@dataclass(frozen=True, kw_only=True)
class Material:
    """How a surface takes the light, and its pattern. `word` is "" where a caption does not mention it."""

    word: str
    texture: str = "plain"
    repeats: float = 1.0
    """How many periods of the texture go round an object."""
    specular: float = 0.04
    """Reflectance seen head-on, 0..1."""
    gloss: float = 20.0
    """Exponent of the highlight; larger is tighter."""
    metal: bool = False


MATERIALS: dict[str, Material] = {
    "plain": Material(word="", specular=0.04, gloss=35),
    "matte": Material(word="matte", specular=0.0),
    "shiny": Material(word="shiny", specular=0.12, gloss=180),
    "metal": Material(word="metal", specular=0.65, gloss=90, metal=True),
    "striped": Material(word="striped", texture="stripes", repeats=5, specular=0.04, gloss=35),
    "checkered": Material(word="checkered", texture="checks", repeats=4, specular=0.04, gloss=35),
    "dotted": Material(word="dotted", texture="dots", repeats=8, specular=0.04, gloss=35),
}

SHAPES = ("sphere", "cube", "cylinder", "cone", "pyramid", "table", "chair", "house", "tree")
COMPOSITES = ("table", "chair", "house", "tree")
SUPPORTS = ("cube", "cylinder", "table")
"""Shapes with a flat top that carries another object."""
SMALL_ENOUGH = ("sphere", "cube", "cylinder", "cone", "pyramid")
"""Shapes that are put on top of others."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A floor or a wall: its texture, how large one period is in metres, and the colour pairs that it comes in."""

    phrase: str
    texture: str
    period_m: float
    pairs: tuple[tuple[Colour, Colour], ...]
    indoors: bool = True
    outdoors: bool = True
    specular: float = 0.0
    gloss: float = 20.0


FLOORS: dict[str, Ground] = {
    "wood": Ground(
        phrase="a wooden floor",
        texture="planks",
        period_m=2.4,
        pairs=(
            ((0.62, 0.42, 0.24), (0.78, 0.58, 0.36)),
            ((0.42, 0.26, 0.14), (0.56, 0.36, 0.20)),
            ((0.74, 0.62, 0.46), (0.86, 0.76, 0.60)),
        ),
        outdoors=False,
        specular=0.04,
        gloss=40,
    ),
    "tiles": Ground(
        phrase="a tiled floor",
        texture="checks",
        period_m=1.2,
        pairs=(
            ((0.88, 0.87, 0.84), (0.20, 0.21, 0.23)),
            ((0.86, 0.80, 0.70), (0.58, 0.40, 0.30)),
            ((0.84, 0.88, 0.90), (0.36, 0.50, 0.60)),
        ),
        specular=0.05,
        gloss=120,
    ),
    "carpet": Ground(
        phrase="a carpet",
        texture="carpet",
        period_m=1.6,
        pairs=(
            ((0.48, 0.14, 0.16), (0.76, 0.62, 0.46)),
            ((0.18, 0.24, 0.42), (0.70, 0.68, 0.62)),
            ((0.62, 0.58, 0.50), (0.46, 0.42, 0.36)),
        ),
        outdoors=False,
    ),
    "marble": Ground(
        phrase="a marble floor",
        texture="marble",
        period_m=2.8,
        pairs=(
            ((0.90, 0.89, 0.87), (0.56, 0.56, 0.58)),
            ((0.62, 0.70, 0.64), (0.30, 0.40, 0.34)),
            ((0.30, 0.30, 0.33), (0.70, 0.68, 0.64)),
        ),
        specular=0.06,
        gloss=200,
    ),
    "grass": Ground(
        phrase="grass",
        texture="grass",
        period_m=2.0,
        pairs=(
            ((0.16, 0.36, 0.08), (0.44, 0.58, 0.18)),
            ((0.24, 0.38, 0.10), (0.58, 0.62, 0.26)),
        ),
        indoors=False,
    ),
    "sand": Ground(
        phrase="sand",
        texture="sand",
        period_m=2.4,
        pairs=(((0.72, 0.58, 0.38), (0.88, 0.77, 0.56)), ((0.78, 0.64, 0.48), (0.90, 0.80, 0.66))),
        indoors=False,
    ),
    "snow": Ground(
        phrase="snow",
        texture="sand",
        period_m=4.0,
        pairs=(((0.78, 0.83, 0.90), (0.93, 0.95, 0.98)),),
        indoors=False,
    ),
    "stone": Ground(
        phrase="a stone floor",
        texture="bricks",
        period_m=1.8,
        pairs=(((0.36, 0.35, 0.33), (0.62, 0.60, 0.56)), ((0.42, 0.38, 0.34), (0.68, 0.60, 0.50))),
    ),
}

WALLS: dict[str, Ground] = {
    "brick": Ground(
        phrase="a brick wall",
        texture="bricks",
        period_m=1.0,
        pairs=(((0.74, 0.70, 0.66), (0.58, 0.25, 0.18)), ((0.60, 0.57, 0.54), (0.66, 0.42, 0.28))),
    ),
    "wood": Ground(
        phrase="a wooden wall",
        texture="planks",
        period_m=2.4,
        pairs=(((0.50, 0.33, 0.20), (0.66, 0.47, 0.30)), ((0.72, 0.66, 0.56), (0.84, 0.79, 0.70))),
    ),
    "painted": Ground(phrase="a {colour} wall", texture="plaster", period_m=3.0, pairs=()),
}
PAINTS: dict[str, Colour] = {
    "white": (0.88, 0.87, 0.84),
    "gray": (0.60, 0.61, 0.62),
    "blue": (0.46, 0.60, 0.80),
    "green": (0.55, 0.70, 0.54),
    "yellow": (0.90, 0.80, 0.50),
    "pink": (0.90, 0.70, 0.72),
    "purple": (0.62, 0.54, 0.74),
    "orange": (0.90, 0.66, 0.46),
}
"""Colours of painted walls: paler than the objects'."""


@dataclass(frozen=True, kw_only=True)
class Sky:
    """Colours of the sky from the horizon to straight up, how cloudy it is (0..1), and the light that it sends."""

    phrase: str
    horizon: Colour
    zenith: Colour
    clouds: float
    sun: Colour
    sun_power: float


SKIES: dict[str, Sky] = {
    "blue": Sky(
        phrase="a blue sky",
        horizon=(0.76, 0.86, 0.95),
        zenith=(0.20, 0.45, 0.84),
        clouds=0.15,
        sun=(1.0, 0.95, 0.86),
        sun_power=1.0,
    ),
    "cloudy": Sky(
        phrase="a cloudy sky",
        horizon=(0.84, 0.86, 0.88),
        zenith=(0.56, 0.62, 0.70),
        clouds=0.8,
        sun=(0.96, 0.97, 1.0),
        sun_power=0.72,
    ),
    "evening": Sky(
        phrase="an evening sky",
        horizon=(0.98, 0.66, 0.38),
        zenith=(0.30, 0.30, 0.56),
        clouds=0.35,
        sun=(1.0, 0.74, 0.48),
        sun_power=0.95,
    ),
}

RELATIONS = ("left of", "right of", "behind", "in front of", "on top of")
INVERSE = {"left of": "right of", "right of": "left of", "behind": "in front of", "in front of": "behind"}
STANDS_ON = "standing on"
"""The relation of an object to the floor, in the scene's description."""
ANONYMOUS = "object"
"""What captions call a body of a randomised scene that has no name, such as a squeezed sphere."""
FUNCTION_WORDS = ("a", "an", "and", "in", "front", "of", "on", "top", "left", "right", "behind", "under", "there", "is")


def words() -> list[str]:
    """Every word that a caption can hold, sorted. All are lower case."""
    grounds = [ground.phrase for ground in (*FLOORS.values(), *WALLS.values())]
    phrases = [*grounds, *(sky.phrase for sky in SKIES.values()), *(m.word for m in MATERIALS.values())]
    tables = {word for phrase in phrases for word in phrase.replace("{colour}", "").split()}
    return sorted(tables | set(COLOURS) | set(SHAPES) | set(FUNCTION_WORDS) | {ANONYMOUS})
