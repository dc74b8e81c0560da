"""The demo world: small scenes with exact depth, normals, segments, outlines and captions."""

from extract.world.composition import compose
from extract.world.rendering import Rendering, contact_sheet, render
from extract.world.scene import Scene

__all__ = ["Rendering", "Scene", "compose", "contact_sheet", "render"]
