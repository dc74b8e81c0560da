"""Networks of the transformers library from a checkpoint folder: strictly, from this machine only, never code of theirs."""

import json
from pathlib import Path
from typing import Any

import torch

from extract.estimators.batching import IMAGENET_MEAN, IMAGENET_STD
from extract.estimators.checkpoints import unreadable
from shards.core.errors import UserError

PREPROCESSOR = "preprocessor_config.json"


def load_pretrained(auto_class: str, folder: Path, device: str) -> Any:
    """The model of transformers.<auto_class> in a folder, in float32 (autocast lowers what may be lowered), to predict.

    Raises UserError when a file is damaged, of an architecture that the class does not know, or lacks weights, which the
    library would replace by random ones.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # what a damaged folder raises depends on where it is damaged
        raise unreadable(folder, error) from error
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise UserError(
            f"the estimator checkpoint {folder} cannot be loaded: it has no fitting weights for {lacking[0]} and "
            f"{len(lacking) - 1} others; fetch it again, or check its row"
        )
    return model.eval().to(device=torch.device(device), memory_format=torch.channels_last)


def mean_and_std(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """How the network wants its input normalised, as its preprocessor's file says; ImageNet's if there is none."""
    path = folder / PREPROCESSOR
    if not path.is_file():
        return IMAGENET_MEAN, IMAGENET_STD
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if not said.get("do_normalize", True):
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        mean, std = said.get("image_mean") or IMAGENET_MEAN, said.get("image_std") or IMAGENET_STD
        return tuple(float(value) for value in mean), tuple(float(value) for value in std)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise unreadable(path, error) from error
