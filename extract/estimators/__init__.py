"""Estimators: networks and rules that turn images into intrinsic maps."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from shards.intrinsics import IntrinsicMap


class Estimator(Protocol):
    """Loaded once per worker, with its device and dtype chosen outside.

    A batch of uint8 RGB images (H, W, 3), of mixed sizes, gives for each image its maps by name, at the image's own size
    and in the conventions of shards.intrinsics. An image's maps do not depend on the others of its batch beyond the
    tolerance of the dtype.
    """

    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]: ...
