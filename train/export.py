"""Makes a run folder of any checkpoint: the best by held-out loss, the last, or that of a step.

python -m train export runs/demo --out runs/demo-best                       stage 2's best, with the VAE of the run
python -m train export runs/demo --stage vae --out runs/demo-vae            stage 1's best: a folder with vae/ alone
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from infer.bases.loading import open_base
from infer.model.lora import LoraWeights
from infer.model.separate_vae import SeparateVae
from infer.run_folder import MANIFEST, Manifest, load_manifest, save_run
from shards.core.config import load_config
from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from train.cache.format import weights_digest
from train.checkpoint import Checkpoint, Checkpoints
from train.identity import MADE_FROM
from train.vae import RESULT, TRAINING, intrinsic_vae, save_result

Stage = Literal["vae", "lora"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Which checkpoint was written."""

    step: int
    score: float | None
    """Its held-out loss, if it was measured."""


def export(run: Path, *, stage: Stage, checkpoint: str, out: Path) -> Exported:
    """Writes a checkpoint's averaged weights as a run folder (stage 1: as OUT/vae). checkpoint: "best", "last" or a step.

    Raises UserError when there is no such checkpoint, it is damaged, or OUT holds a training of its own.
    """
    if (out / TRAINING).exists():
        raise UserError(f"{out} is the folder of a training, whose result would be replaced; choose another --out")
    checkpoints = Checkpoints(run / TRAINING / stage / "checkpoints", keep=1)
    chosen = checkpoints.read(_step(checkpoints, checkpoint))
    if stage == "vae":
        _export_vae(run, chosen, out)
    else:
        _export_lora(run, chosen, out)
    return Exported(step=chosen.step, score=chosen.score)


def _step(checkpoints: Checkpoints, wanted: str) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.folder} has no checkpoint: name the run folder of a training (its --out)")
    if wanted == "last":
        return steps[-1]
    if wanted == "best":
        best = checkpoints.best()
        if best is None:
            raise UserError(
                f"no checkpoint in {checkpoints.folder} was measured yet; choose --checkpoint last, or one of the steps "
                f"{', '.join(map(str, steps))}"
            )
        return best
    if not wanted.isdecimal():
        raise UsageError(f"--checkpoint {wanted}: give best, last, or a step: {', '.join(map(str, steps))}")
    return int(wanted)


def _export_vae(run: Path, chosen: Checkpoint, out: Path) -> None:
    config = chosen.result.get("vae") or _config_beside(run)
    base = chosen.identity.get("base")
    made_from = base.get("vae") if isinstance(base, Mapping) else None
    with torch.device("meta"):
        vae = AutoencoderKL.from_config({name: value for name, value in config.items() if not name.startswith("_")})
    vae.load_state_dict({name: value.clone() for name, value in chosen.average.items()}, assign=True)
    Folder(out).make()
    save_result(vae, out / RESULT, made_from)


def _config_beside(run: Path) -> dict[str, Any]:
    """The VAE's configuration for a checkpoint that does not hold it: that of the finished stage."""
    path = run / RESULT / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"the checkpoint is from before checkpoints held the VAE's configuration, and {path} cannot be read: "
            "continue the run for at least one step"
        ) from error
    return config


def _export_lora(run: Path, chosen: Checkpoint, out: Path) -> None:
    manifest = _manifest(run, chosen)
    vae = _vae(run, manifest, chosen)
    weights = LoraWeights(dict[str, Tensor](chosen.average), manifest.lora.rank, manifest.lora.alpha)
    training = {**manifest.training, "steps": chosen.step, "held_out_loss": chosen.score}
    save_run(str(out), dataclasses.replace(manifest, training=training), weights, vae)
    made_from = run / RESULT / MADE_FROM
    if manifest.shared_vae and made_from.exists():
        Folder(out).write(f"{RESULT}/{MADE_FROM}", made_from.read_bytes())


def _manifest(run: Path, chosen: Checkpoint) -> Manifest:
    if described := chosen.result.get("manifest"):
        return load_config(Manifest, dict(described))
    if not (run / MANIFEST).exists():
        raise UserError(
            f"the checkpoint of step {chosen.step} is from before checkpoints said which base they fit, and {run} has no "
            f"{MANIFEST}: continue the run for at least one step"
        )
    return load_manifest(str(run))


def _vae(run: Path, manifest: Manifest, chosen: Checkpoint) -> AutoencoderKL:
    """The VAE that the LoRA was trained with."""
    if not manifest.shared_vae:
        base: Any = open_base(manifest.base.name, dtype=torch.float32)
        vae: AutoencoderKL = SeparateVae.of(base.vae)
    else:
        if not (run / RESULT / "config.json").exists():
            raise UserError(f"{run} has no intrinsic VAE ({RESULT}/), which the LoRA of step {chosen.step} needs")
        vae = intrinsic_vae(run / RESULT)
    if weights_digest(vae) != chosen.identity.get("vae"):
        raise UserError(
            f"the VAE of {run} is not the one that the LoRA of step {chosen.step} was trained with: it was made again since"
        )
    return vae
