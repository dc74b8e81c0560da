"""How each kind of base is called in training: its text, its further conditions, its scheduler's noise."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infer.bases.loading import network_of, prediction_type_of
from infer.bases.prompts import encode_prompts
from shards.core.errors import UserError


@torch.no_grad()
def encode_nothing(pipeline: Any) -> dict[str, Tensor]:
    """What the pipeline itself takes for no prompt in classifier-free guidance (SD: that of ""; SDXL: zeros): one row."""
    found = encode_prompts(pipeline, [""], None, 2.0, {})
    return {
        name.replace("negative_", ""): value.chunk(2)[0]
        for name, value in found.items()
        if isinstance(value, Tensor) and "negative" in name
    }


def network_arguments(pipeline: Any, text: Mapping[str, Tensor], sizes: Tensor) -> dict[str, Any]:
    """The network's conditions beside latents and timesteps, for as many rows as `text` has.

    sizes: (rows, 6), train.conditions.Sizes. They stay in float32: in bfloat16 1,023 would be 1,024. The networks embed them
    in float32 themselves.
    """
    kind, embeds = type(pipeline).__name__, text["prompt_embeds"]
    sizes = sizes.to(embeds.device, torch.float32)
    if kind == "StableDiffusionPipeline":
        return {"encoder_hidden_states": embeds}
    if kind == "StableDiffusionXLPipeline":
        size_and_text = {"text_embeds": text["pooled_prompt_embeds"], "time_ids": sizes}
        return {"encoder_hidden_states": embeds, "added_cond_kwargs": size_and_text}
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if getattr(network_of(pipeline), "use_additional_conditions", False):
        added = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 4:5] / sizes[:, 5:]}
    mask = text["prompt_attention_mask"]
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "added_cond_kwargs": added}


def signal_levels(pipeline: Any) -> Tensor:
    """alphas_cumprod, float32 (T,). Raises UserError for a base that is not trained as a discrete diffusion."""
    scheduler = pipeline.scheduler
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"{type(scheduler).__name__} has no alphas_cumprod: this base cannot be trained with eq. 5")
    if prediction_type_of(pipeline) not in ("epsilon", "v_prediction"):
        raise UserError(f"the base predicts {prediction_type_of(pipeline)}; training knows epsilon and v_prediction")
    return torch.as_tensor(scheduler.alphas_cumprod).float()
