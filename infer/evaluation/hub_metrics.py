"""Measures that need models of the hub: CLIP score, CMMD's features, HPSv2, ImageReward.

A judge gives each image a score for its prompt; CLIP's also gives the features of CMMD. Checkpoints are read as
safetensors, or with torch's weights_only reader: never unpickled.

    CLIP score     cosine of image and text                                         (as the paper's 0.27)
    HPSv2          the same with a CLIP that was tuned on people's choices, as a folder of transformers
    CMMD           unit image features of CLIP (its paper takes ViT-L/14 at 336 px)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from infer.content import of_model
from infer.evaluation.generate import Arrays
from shards.core.errors import UserError


class Judge(Protocol):
    """Scores images for their prompts: the column `name` of the table, under its `title`."""

    name: str
    title: str

    def fingerprint(self) -> str: ...

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Arrays:
        """images: uint8 RGB (H, W, 3). Returns {name: float32 (N,)}, and perhaps features under name_features (N, F)."""
        ...


@dataclass
class ClipJudge:
    """CLIP's cosine of image and prompt under `name`, and its unit image features under `name`_features."""

    name: str
    title: str
    source: str
    model: Any
    processor: Any
    tokenizer: Any
    device: str

    @classmethod
    def load(cls, name: str, title: str, source: str, device: str = "cpu") -> "ClipJudge":
        """source: a folder or hub id of a transformers CLIPModel with its processor. Raises UserError."""
        try:
            model = CLIPModel.from_pretrained(source, use_safetensors=True)
            processor, tokenizer = AutoImageProcessor.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            kind = (
                "check the folder" if Path(source).is_dir() else "pass a local folder, or check the id and the network"
            )
            raise UserError(f"cannot load the CLIP model {source} for the {title}: {reason}; {kind}") from error
        return cls(name, title, source, model.eval().to(device), processor, tokenizer, device)

    def fingerprint(self) -> str:
        return f"{self.name}:{of_model(self.source)}"

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Arrays:
        pixels = self.processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        longest = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        seen = _unit(self.model.get_image_features(pixel_values=pixels["pixel_values"].to(self.device)))
        read = _unit(
            self.model.get_text_features(**{k: words[k].to(self.device) for k in ("input_ids", "attention_mask")})
        )
        cosine = (seen * read).sum(dim=1)
        return {self.name: cosine.cpu().numpy(), f"{self.name}_features": seen.cpu().numpy()}


def _unit(features: Any) -> torch.Tensor:
    """(N, F) of length 1; transformers 5 wraps the projected features in an output of the model."""
    tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return F.normalize(tensor.float(), dim=1)
