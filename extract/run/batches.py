"""Gives images to an estimator, in batches that its memory holds; what it cannot do is each image's own failure.

Batches are a function of the images and of the batch size alone. The size falls when memory runs out, and stays there; what
comes out is the same within the tolerance of the dtype, and on the CPU in float32 to the bit.
"""

import gc
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from extract.estimators import Estimator
from shards.intrinsics import IntrinsicMap

Maps = dict[str, IntrinsicMap]
ATTEMPTS = 3
"""At an image for which alone memory does not suffice: another process may have held it."""
PROBE_SHARE = 0.85
"""Of the memory that the worker may use, what batches may fill: the allocator needs some room of its own."""


class DeviceLost(Exception):
    """The accelerator is in a state from which this process cannot recover; a new one can."""


@dataclass
class BatchSize:
    """How many images an estimator is given at once. It only falls."""

    now: int

    def fall_to(self, size: int) -> None:
        self.now = max(1, min(self.now, size))


def estimate_all(
    estimator: Estimator, images: Sequence[np.ndarray], size: BatchSize, moved: Callable[[], None] = lambda: None
) -> list[Maps | Exception]:
    """For each image (H, W, 3) its maps, or what the estimator raised on it. Images of like proportions share batches.

    moved: called after every batch. Raises DeviceLost.
    """
    order = sorted(range(len(images)), key=lambda i: (images[i].shape[1] / images[i].shape[0], images[i].shape[0], i))
    found: dict[int, Maps | Exception] = {}
    tried = Counter[int]()
    waiting = [order[start : start + size.now] for start in range(0, len(order), size.now)]
    waiting.reverse()
    while waiting:
        moved()
        members = waiting.pop()
        if len(members) > size.now:  # memory ran out since
            waiting += reversed(halves(members))
            continue
        try:
            results = estimator([images[i] for i in members])
        except (
            Exception
        ) as error:  # an estimator is foreign code: whatever it raises belongs to the images it was given
            short = _out_of_memory(error)
            if not short and "CUDA error" in str(error):  # but not this: nothing works in this process any more
                raise DeviceLost(str(error)) from error
            if short:
                size.fall_to(len(members) // 2)
                _free_memory()
                tried[members[0]] += len(members) == 1
                error = MemoryError(f"not even one image at a time fits the memory: {error}")
            if len(members) > 1:
                waiting += reversed(halves(members))
            elif short and tried[members[0]] < ATTEMPTS:
                waiting.append(members)
            else:
                found[members[0]] = error
            continue
        found |= dict(zip(members, results, strict=True))
    return [found[i] for i in range(len(images))]


def halves(members: list[int]) -> list[list[int]]:
    middle = (len(members) + 1) // 2
    return [members[:middle], members[middle:]]


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of whatever library and device."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in message or "can't allocate memory" in message


def _free_memory() -> None:
    """Gives back what a failed batch held and what the allocator of a GPU keeps."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- the probe -------------------------------------------------------------------------------------------------------


def probe_size(estimator: Estimator, size: BatchSize, side_px: int, share: float) -> None:
    """On a GPU, of whose memory this process may use `share`: lets the batch size fall to what fits.

    Measured with noise of `side_px` by 4/3 of it: what one image takes is what two take more than one.
    """
    import torch

    image = np.random.default_rng(0).integers(0, 256, (side_px, side_px * 4 // 3, 3), np.uint8)
    peaks = []
    for count in (1, 1, 2):  # the first warms up: libraries allocate at the first call
        torch.cuda.reset_peak_memory_stats()
        estimate_all(estimator, [image] * count, size)
        peaks.append(torch.cuda.max_memory_allocated())
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    size.fall_to(fitting(peaks[1], peaks[2], PROBE_SHARE * share * total))


def fitting(one: float, two: float, budget: float) -> int:
    """The largest power of two of images that fits `budget` bytes, if one takes `one` in all and two take `two`; from 1."""
    each = max(two - one, 1.0)
    most = int((budget - one) / each) + 1
    return 1 << (max(most, 1).bit_length() - 1)
