"""Where a training begins when it does not begin anew: with another run of the same base (TrainConfig.start)."""

from pathlib import Path
from typing import Any

import torch

from infer.bases.loading import describe_base, network_of, prediction_type_of
from infer.embedded import resolve
from infer.model.lora import read_lora
from infer.run_folder import LORA, MANIFEST, LoraShape, load_manifest
from shards.core.errors import UserError
from train.config import TrainConfig
from train.streams import Streams

ANEW = "--warm-start '' begins anew"


def started_from(config: TrainConfig, pipeline: Any) -> Path | None:
    """The folder of the run to learn on from; None to begin anew.

    Raises UserError when it was made for another base (with config.other_weights: one of another architecture), or with
    another kind of VAE. A run that has only its first stage does not say for which base.
    """
    if not config.start:
        return None
    run = Path(resolve(config.start, "run"))
    if (run / MANIFEST).exists():
        manifest = load_manifest(str(run))
        try:
            base, prediction = describe_base(network_of(pipeline), config.base), prediction_type_of(pipeline)
            manifest.check(base, prediction, other_weights=config.other_weights)
        except UserError as error:
            raise UserError(f"cannot start from {config.start}: {error}; {ANEW}") from error
        if manifest.shared_vae != config.lora.shared_vae:
            raise UserError(
                f"cannot start from {config.start}: it was trained with lora.shared_vae = {_said(manifest.shared_vae)}, "
                f"and now it is {_said(config.lora.shared_vae)}; {ANEW}"
            )
    return run


def _said(value: bool) -> str:
    return str(value).lower()  # as in a recipe


def begin_with(run: Path, streams: Streams, config: TrainConfig) -> None:
    """Copies the LoRA of a run into untrained adapters. Raises UserError unless rank, alpha and layers are the same."""
    manifest = load_manifest(str(run))
    theirs, mine = read_lora(run / LORA), streams.trainable()
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (theirs.tensors, mine)]
    made = streams.weights(mine)
    shape = LoraShape(rank=made.rank, alpha=made.alpha, targets=config.lora.targets)
    if shapes[0] != shapes[1] or theirs.alpha != shape.alpha:
        raise UserError(
            f"{run} has another LoRA than this training: {manifest.lora}, not {shape}; set [lora] alike, or {ANEW}"
        )
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(theirs.tensors[name])
