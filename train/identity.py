"""What a checkpoint must have been made with, settings and base, compared whenever a run continues."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn

from infer.bases.loading import Base, describe_base, misfit, network_of, prediction_type_of
from shards.core.config import load_config
from shards.core.errors import UserError
from train.cache.format import weights_digest

SAME_RESULT = ("loop.gradient_checkpointing", "loop.compile", "loop.channels_last")
"""Settings that change how fast a step is made and what memory it takes, but not what it computes (up to rounding)."""
VAE_SCALE = (
    "latent_channels",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "block_out_channels",
)
"""What of a VAE's configuration decides the latents' shape and scale."""
NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "shift",
)
"""What of a scheduler's configuration decides the noise levels of training."""
_MISSING = object()


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Compared with that of a checkpoint before a run continues from it."""

    settings: Mapping[str, Any]
    """All settings that decide the result, with tables inside: {"seed": 0, "loop": {"steps": 100, ...}, ...}."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """The base as describe_pipeline or describe_vae has it; empty for a training that has none."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Value of a setting in a checkpoint that was made before the setting existed, by its flat name ("loop.clip")."""

    def document(self) -> dict[str, Any]:
        """As it is stored in a checkpoint."""
        base = {"base": dict(self.base)} if self.base else {}
        document: dict[str, Any] = json.loads(json.dumps({**self.settings, **base}))  # tuples are lists, as once read
        return document

    def check(self, made_with: Mapping[str, Any], where: Path) -> None:
        """Raises UserError, naming the setting or the part of the base that differs. where: the checkpoints' folder."""
        made_with = dict(made_with)
        base = made_with.pop("base", None)
        now = _flat({name: value for name, value in self.document().items() if name != "base"})
        self._check_settings(_flat(made_with), now, where)
        if self.base:
            _check_base(base, self.base, where)

    def _check_settings(self, before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
        for name in sorted(before.keys() | now.keys()):
            if name in SAME_RESULT:
                continue
            after = now.get(name, _MISSING)
            earlier = before.get(name, self.defaults.get(name, _MISSING))
            if earlier == after or (name == "loop.steps" and now.get("loop.schedule") == "constant"):
                continue

            if name == "loop.steps":
                raise UserError(
                    f"{where} was made with loop.steps = {earlier}, and now it is {after}: with loop.schedule = "
                    f"{now.get('loop.schedule')} the rate depends on all steps, so more of them are another training. "
                    "Give the same steps to continue, or begin a training of its own with this run's result: another "
                    "--out, and --warm-start RUN"
                )
            shown = [None if value is _MISSING else value for value in (earlier, after)]
            raise UserError(
                f"{where} was made with {name} = {shown[0]!r}, and now it is {shown[1]!r}: "
                "give the same settings to continue, or choose another --out"
            )


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """{"loop": {"steps": 5}} -> {"loop.steps": 5}; one level, as settings have it."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": one for inner, one in value.items()}
        else:
            flat[name] = value
    return flat


# ---- the base --------------------------------------------------------------------------------------------------------


def describe_vae(vae: AutoencoderKL) -> dict[str, Any]:
    """Which latents a VAE makes: its weights, their shape and their scale."""
    config: Any = vae.config
    scale = {name: config.get(name) for name in VAE_SCALE}
    described: dict[str, Any] = json.loads(json.dumps({**scale, "weights": weights_digest(vae)}))
    return described


def describe_pipeline(pipeline: Any, name: str) -> dict[str, Any]:
    """All of a base that decides the result of stage 2. name: how it was loaded; for messages only."""
    parts: Mapping[str, Any] = pipeline.components
    scheduler = pipeline.scheduler.config
    described = {
        "network": dataclasses.asdict(describe_base(network_of(pipeline), name)),
        "prediction_type": prediction_type_of(pipeline),
        "scheduler": {name: scheduler.get(name) for name in NOISE},
        "vae": describe_vae(pipeline.vae),
        "text": {
            name: weights_digest(part)
            for name, part in sorted(parts.items())
            if "text_encoder" in name and isinstance(part, nn.Module)
        },
    }
    document: dict[str, Any] = json.loads(json.dumps(described))
    return document


def _check_base(before: Any, now: Mapping[str, Any], where: Path) -> None:
    """Raises UserError when a base is not the one that a checkpoint was made with."""
    architecture = now["network"]["architecture"] if "network" in now else None
    if isinstance(before, Mapping):
        reason = _misfit(before, now)
    elif before is not None and before != architecture:  # an older checkpoint: the network's digest alone
        reason = "its base.architecture is another configuration or another network than this base's"
    else:
        reason = None
        print(
            f"note: {where} was made before checkpoints said which weights their base has: see to it that it is this one",
            file=sys.stderr,
        )
    if reason is not None:
        raise UserError(
            f"{where} was made with another base: {reason}; give the same --base to continue, or choose another --out"
        )


def _misfit(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Which part of a base differs, naming the field; None if none does."""
    if "network" in before and "network" in now:
        theirs, ours = (load_config(Base, dict(base["network"])) for base in (before, now))
        if reason := misfit(theirs, ours, other_weights=True):
            return reason
        if misfit(theirs, ours):
            return f"its base.weights are those of {theirs.name}, not those of {ours.name}"
    earlier, after = (_flat({k: v for k, v in base.items() if k != "network"}) for base in (before, now))
    return _difference(earlier, after)


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Which part of a base differs; None if none does. A digest of weights is not shown: it tells nobody anything."""
    for name in sorted(before.keys() | now.keys()):
        earlier, after = before.get(name), now.get(name)
        if earlier == after:
            continue
        if name.endswith("weights") or name.startswith("text."):
            return f"its base.{name} has other weights than this base's"
        return f"its base.{name} was {earlier!r}, and now it is {after!r}"
    return None


# ---- whose latents an intrinsic VAE shares ---------------------------------------------------------------------------

MADE_FROM = "base.json"
"""Beside an intrinsic VAE: describe_vae of the base's VAE whose latents it shares."""


def check_latents(
    folder: Path, vae: AutoencoderKL, base_vae: AutoencoderKL, *, other_weights: bool, advice: str
) -> None:
    """Raises UserError, naming the field, unless an intrinsic VAE from `folder` shares the latents of a base's VAE.

    other_weights: the base's VAE may have been fine-tuned since. advice: the end of the error message.
    """
    config: Any = vae.config
    theirs = describe_vae(base_vae)
    mine = json.loads(json.dumps({name: config.get(name) for name in VAE_SCALE}))
    for name in VAE_SCALE:
        if mine[name] != theirs[name]:
            raise UserError(
                f"{folder} is no intrinsic VAE of this base: its {name} is {mine[name]}, the base's {theirs[name]}; {advice}"
            )
    made_from = _made_from(folder)
    if made_from is not None and not other_weights and made_from.get("weights") != theirs["weights"]:
        raise UserError(
            f"{folder} is no intrinsic VAE of this base: it was trained beside a VAE with other weights than this base's "
            f"(vae.weights in {MADE_FROM}); if the base was fine-tuned since, say so with --other-weights; {advice}"
        )


def says_its_base(folder: Path) -> bool:
    """Whether an intrinsic VAE's folder says beside which base's VAE it was trained."""
    return _made_from(folder) is not None


def _made_from(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / MADE_FROM).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MADE_FROM} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{folder / MADE_FROM} is no description of a VAE; train stage 1 again")
    return found
