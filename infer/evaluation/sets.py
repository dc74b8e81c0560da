"""Sets of prompts: captions of unseen demo scenes, Parti's, the paper's Multi, or one's own file."""

import csv
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from extract.world import compose
from extract.world.grammar import is_caption, parse
from shards.core.errors import UsageError

DATA = Path(__file__).with_name("data")
UNSEEN = 606
"""The world's seed of the evaluated captions; nothing embedded learned from it (they have 1 and 100)."""
DEMO_CAPTIONS = 1000
"""How many of the set demo are evaluated as a rule: none of them is in the set depth."""
MULTI_CLASSES = (3, 5)
"""How many classes a Multi prompt names, from .. to."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts without repetition. scenes: for demo captions the number of each one's scene in the world's seed, else ()."""

    name: str
    prompts: tuple[str, ...]
    scenes: tuple[int, ...] = ()

    @property
    def in_grammar(self) -> bool:
        """Whether every prompt is a caption of the demo world, whose layout can be judged."""
        return all(is_caption(prompt) for prompt in self.prompts)


def prompt_set(name: str, count: int, file: Path | None = None) -> PromptSet:
    """The first `count` prompts of a set: demo, depth, multi, parti (file: PartiPrompts.tsv) or file (one prompt a line).

    Raises UsageError for an unknown set, a missing file, or a file without prompts.
    """
    if name == "demo":
        return demo_captions(count)
    if name == "depth":
        return depth_captions(count)
    if name == "multi":
        return PromptSet("multi", tuple(multi_prompts(count)))
    if name not in ("parti", "file"):
        raise UsageError(
            f"there is no prompt set {name!r}; the sets are demo, depth, multi, parti, or a file with --prompts"
        )
    if file is None:
        raise UsageError(
            "the set parti is read from PartiPrompts.tsv of github.com/google-research/parti; pass it with --prompts"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the prompts in {file}: {error}") from error
    lines = parti_prompts(text, str(file)) if name == "parti" else [line.strip() for line in text.splitlines()]
    prompts = tuple(dict.fromkeys(line for line in lines if line))[:count]
    if not prompts:
        raise UsageError(f"{file} holds no prompts")
    return PromptSet(name if name == "parti" else file.stem, prompts)


def demo_captions(count: int) -> PromptSet:
    """The first `count` different captions of the world's unseen scenes, of those that name all that is there.

    They are what `python -m train base` learns from; any other caption can be asked for with --prompts.
    """
    return _of_scenes("demo", itertools.islice(_unseen(), count))


def depth_captions(count: int, after: int = DEMO_CAPTIONS) -> PromptSet:
    """The first `count` that say what is behind or in front of what, none of them among the first `after` of demo."""
    told = (
        (caption, scene)
        for caption, scene in itertools.islice(_unseen(), after, None)
        if any(stated.relation in ("behind", "in front of") for stated in parse(caption).relations)
    )
    return _of_scenes("depth", itertools.islice(told, count))


def _unseen() -> Iterator[tuple[str, int]]:
    """Different captions of unseen scenes that name all that is there, with the scenes' numbers; endless."""
    known = set[str]()
    for index in itertools.count():
        scene = compose(UNSEEN, index)
        if len(scene.mentioned) == len(scene.things) and scene.caption not in known:
            known.add(scene.caption)
            yield scene.caption, index


def _of_scenes(name: str, found: Iterable[tuple[str, int]]) -> PromptSet:
    captions, scenes = zip(*found, strict=True)
    return PromptSet(name, captions, scenes)


def multi_prompts(count: int, seed: int = 0) -> list[str]:
    """The paper's Multi: "{class}s and {class}s and ... in a {place}", 3 to 5 COCO classes and a Places365 place.

    The paper's own 1,000 prompts are not published: these are drawn from the same names, and are the same for a seed.
    """
    classes, places = (read_names(name) for name in ("coco", "places365"))
    rng = np.random.default_rng([seed, 365])
    found: dict[str, None] = {}
    while len(found) < count:
        chosen = rng.permutation(len(classes))[: rng.integers(MULTI_CLASSES[0], MULTI_CLASSES[1] + 1)]
        things = " and ".join(f"{classes[i]}s" for i in chosen)
        found[f"{things} in a {place_words(places[rng.integers(len(places))])}"] = None
    return list(found)


def place_words(category: str) -> str:
    """A Places365 category as words, the kind before the place: "library/indoor" -> "indoor library" (our reading)."""
    place, _, kind = category.replace("_", " ").partition("/")
    return f"{kind} {place}".strip()


def read_names(name: str) -> list[str]:
    """The names in one of the data files; lines with # say where they are from."""
    lines = (DATA / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def parti_prompts(text: str, where: str) -> list[str]:
    """The column Prompt of PartiPrompts.tsv. Raises UsageError when there is none."""
    rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    if "Prompt" not in (rows.fieldnames or []):
        raise UsageError(
            f"{where} has no column Prompt; it is to be PartiPrompts.tsv of github.com/google-research/parti"
        )
    return [(row["Prompt"] or "").strip() for row in rows]
