"""The models that ship with the package, by name. Imports nothing heavy, so that a wrong name is said at once."""

from pathlib import Path

from shards.core.errors import UserError

EMBEDDED = Path(__file__).parent
"""Embedded models live here: NAME/base, a diffusers folder, and NAME/run, a run folder for it."""


GUIDANCE = 7.5
"""Classifier-free guidance, the paper's."""


def usual_guidance(base: str) -> float:
    """Classifier-free guidance where none is said: the paper's; for the small embedded base less, at which pictures and
    maps agree better (docs/evaluation.md)."""
    return {"demo": 4.5}.get(base, GUIDANCE)


def is_embedded(name: str) -> bool:
    """Whether this names an embedded model, and not a path or a hub id."""
    return Path(name).name == name and (EMBEDDED / name).is_dir()


def resolve(name: str, kind: str) -> str:
    """The path or hub id of a base or run (kind): embedded ones are named "demo", all else is returned as it is."""
    path = EMBEDDED / name / kind
    if is_embedded(name) and path.is_dir():
        return str(path)
    if name == "demo":
        what = "--base FOLDER, a diffusers folder or a hub id" if kind == "base" else "--run FOLDER, a run folder"
        raise UserError(f"no embedded {kind} is shipped with this version yet; pass {what}")
    return name
