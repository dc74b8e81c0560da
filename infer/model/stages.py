"""Which stage l (the paper's block number) each self-attention layer of a base network belongs to: data, checked.

The data is in stages.toml, one table per kind of base; a network that is none of those is counted from its input by the
same rule. A map that misses a layer, or names a stage without being asked, is an error: never a silent default.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from infer.model import schedules
from shards.core.errors import UserError

DATA = Path(__file__).with_name("stages.toml")


@dataclass(frozen=True)
class StageMap:
    """An ordered list of stages; each is the prefixes of the layers that belong to it."""

    name: str
    prefixes: tuple[tuple[str, ...], ...]
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False)  # settings of drop, gaussian
    said: str = "ours"

    @property
    def stages(self) -> int:
        """How many stages there are; they are numbered 1..stages."""
        return len(self.prefixes)

    def stage(self, layer: str) -> int:
        """The stage, from 1, of a layer such as "down_blocks.0.attentions.1.transformer_blocks.0.attn1"."""
        for number, group in enumerate(self.prefixes, 1):
            if any(layer == prefix or layer.startswith(prefix + ".") for prefix in group):
                return number
        raise UserError(f"stage map {self.name} does not say to which stage layer {layer} belongs: choose another map.")

    def of(self, layers: Iterable[str]) -> dict[str, int]:
        """Layer name -> stage for every layer; UserError if one is in none."""
        return {layer: self.stage(layer) for layer in layers}

    def schedule(self, text: str) -> schedules.Schedule:
        """A schedule from text such as "gaussian" or "drop:tau=800", with this base's defaults.

        UserError unless it is one for this base's stages.
        """
        chosen = schedules.parse(text, self.defaults)
        chosen.check(self.stages)
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """JSON for a manifest: {"name", "stages": [[prefix, ...], ...]}."""
        return {"name": self.name, "stages": [list(group) for group in self.prefixes]}


@cache
def stage_maps() -> dict[str, StageMap]:
    """The maps of stages.toml by name."""
    return {name: _from_table(name, table) for name, table in _tables().items()}


def stage_map_of(network: nn.Module) -> StageMap:
    """The map for this network: the table whose network class and top-level blocks are its own, else counted from the input."""
    found = _blocks(network)
    for name, table in _tables().items():
        if table["network"] == type(network).__name__ and tuple(table["stages"]) == found:
            return stage_maps()[name]
    return StageMap(f"counted-{len(found)}", tuple((prefix,) for prefix in found), _counted_defaults(len(found)))


@cache
def _tables() -> dict[str, dict[str, Any]]:
    return tomllib.loads(DATA.read_text(encoding="utf-8"))


def _from_table(name: str, table: dict[str, Any]) -> StageMap:
    prefixes = tuple((entry,) if isinstance(entry, str) else tuple(entry) for entry in table["stages"])
    return StageMap(name, prefixes, {key: table[key] for key in ("drop", "gaussian") if key in table}, table["said"])


def _blocks(network: nn.Module) -> tuple[str, ...]:
    """The top-level blocks in the order in which they run."""
    names: list[str] = []
    for holder in ("down_blocks", "mid_block", "up_blocks", "transformer_blocks"):
        module = getattr(network, holder, None)
        if isinstance(module, nn.ModuleList):
            names += [f"{holder}.{i}" for i in range(len(module))]
        elif module is not None:
            names.append(holder)
    if not names:
        raise UserError(f"{type(network).__name__} has no blocks to count: joint attention knows U-Nets and PixArt.")
    return tuple(names)


def _counted_defaults(stages: int) -> dict[str, dict[str, Any]]:
    """Ours, for a network that no table names: Drop in the middle half of the stages."""
    margin = round(stages / 4)
    return {"drop": {"tau": 900.0, "stages": list(range(1 + margin, stages - margin + 1))}}
