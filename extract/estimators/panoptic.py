"""Panoptic segments with labels by the transformers library: Mask2Former, OneFormer, EoMT.

Which pixel belongs to which segment, as where they were published: masks whose class is sure enough compete, each weighted
with its score; the winner keeps the pixels where its own probability is at least `mask_threshold`; a mask that loses more
than 1 - `overlap` of its area to others goes. Labels from `fuse_from` on are stuff (sky, road): one segment each. Ids are by
falling area, then by position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from extract.estimators import Estimator
from extract.estimators.batching import NetworkEstimator, Resolution, Size, normalised, resized
from extract.estimators.checkpoints import unreadable
from extract.estimators.pretrained import load_pretrained, mean_and_std
from shards.intrinsics import IntrinsicMap, describe_segments, order_segments

TASK = "the task is panoptic"
"""What OneFormer is told."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """threshold: least score of a mask. The others: see above."""

    threshold: float = 0.8
    mask_threshold: float = 0.5
    overlap: float = 0.8
    fuse_from: int = 80


def load(
    *, device: str, dtype: str, weights: Path, resolution: dict[str, Any], rules: dict[str, Any] | None = None
) -> Estimator:
    model = load_pretrained("AutoModelForUniversalSegmentation", weights, device)
    kind = model.config.model_type
    task = _task_tokens(weights, int(model.config.task_seq_len)).to(device) if kind == "oneformer" else None
    pad_to = int(model.config.image_size) if kind.startswith("eomt") else 0
    labels = {int(number): str(name) for number, name in model.config.id2label.items()}
    network = Panoptic(model, Rules(**(rules or {})), labels, *mean_and_std(weights), task, pad_to)
    return NetworkEstimator(network, Resolution(**resolution), torch.device(device), getattr(torch, dtype))


def _task_tokens(folder: Path, length: int) -> Tensor:
    """The task as (1, length) token ids, 0 beyond its end."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what a damaged folder raises depends on where it is damaged
        raise unreadable(folder / "tokenizer.json", error) from error
    found = tokenizer([TASK], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    tokens: Tensor = found["input_ids"] * found["attention_mask"]
    return tokens


@dataclass
class Panoptic:
    """A Network (extract.estimators.batching).

    task: OneFormer's, (1, length). pad_to: EoMT's fixed square, to whose corner images are put: it normalises each token for
    itself, so that the black rest is not seen by any normalisation.
    """

    model: Any
    rules: Rules
    labels: dict[int, str]
    mean: Sequence[float]
    std: Sequence[float]
    task: Tensor | None = None
    pad_to: int = 0

    def predict(self, x: Tensor, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        inner = (x.shape[2], x.shape[3])
        if self.pad_to:
            x = F.pad(x, (0, self.pad_to - inner[1], 0, self.pad_to - inner[0]))
        whole = (x.shape[2], x.shape[3])
        more = {} if self.task is None else {"task_inputs": self.task.expand(len(x), -1)}
        out = self.model(pixel_values=normalised(x, self.mean, self.std), **more)
        scores, classes = out.class_queries_logits.float().softmax(dim=-1).max(dim=-1)  # (N, Q)
        nothing = out.class_queries_logits.shape[-1] - 1
        found = []
        for masks, score, label, size in zip(out.masks_queries_logits, scores, classes, sizes, strict=True):
            sure = (label != nothing) & (score > self.rules.threshold)
            inside = resized(masks[sure], whole)[:, : inner[0], : inner[1]] if self.pad_to else masks[sure]
            found.append(self._compete(inside, score[sure], label[sure], size))
        return found

    def _compete(self, masks: Tensor, score: Tensor, label: Tensor, size: Size) -> dict[str, Tensor]:
        """logits (K, h, w), their scores and classes (K,) -> winner int32 (H, W), 0 none, else 1 + its place in `label`."""
        if not len(masks):
            return {"winner": masks.new_zeros(size, dtype=torch.int32), "label": label, "score": score}
        probability = resized(masks, size).sigmoid()
        winner = (probability * score[:, None, None]).argmax(dim=0)
        within = probability >= self.rules.mask_threshold
        held = torch.bincount(winner.flatten(), minlength=len(masks))
        kept = held > self.rules.overlap * within.sum(dim=(1, 2))
        mine = within.gather(0, winner[None])[0] & kept[winner]
        return {"winner": torch.where(mine, winner + 1, 0).int(), "label": label, "score": score}

    def maps(self, found: dict[str, np.ndarray], size: Size) -> dict[str, IntrinsicMap]:
        return {"segmentation": segments(found["winner"], found["label"], found["score"], self.labels, self.rules)}


def segments(
    winner: np.ndarray, label: np.ndarray, score: np.ndarray, labels: dict[int, str], rules: Rules
) -> IntrinsicMap:
    """The map from winners (H, W), 0 none, else 1 + place in `label` and `score` (K,); stuff of one label becomes one."""
    first: dict[int, int] = {}
    place = np.arange(len(label) + 1)
    for i, one in enumerate(label.tolist(), 1):
        if one >= rules.fuse_from:
            place[i] = first.setdefault(one, i)
    fused = place[winner]
    ids = order_segments(fused)
    of = {int(new): int(fused.flat[at]) - 1 for new, at in zip(*np.unique(ids, return_index=True), strict=True) if new}
    scores = {new: round(float(score[old]), 4) for new, old in of.items()}
    names = {new: labels.get(int(label[old]), str(label[old])) for new, old in of.items()}
    return IntrinsicMap(ids, {"segments": describe_segments(ids, scores, names)})
