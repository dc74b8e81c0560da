"""Compiled networks: slower to start, faster after. A row asks for it by `compile = true`.

The first size of images is compiled for itself, the next ones for all that may come: torch sees by then which sides change.
Sums come out in another order than without, so that maps agree within the tolerance of the dtype.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from extract.estimators import Estimator
from shards.core.errors import UsageError, UserError

TRIED_PX = 512


def compile_networks(estimator: Estimator, name: str, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles the networks of an estimator (row `name`) in place, and tries them on noise.

    Raises UsageError where it has none that can be compiled, UserError where this machine cannot.
    """
    networks: list[nn.Module] = getattr(estimator, "networks", list)()
    if not networks:
        raise UsageError(f"row.{name}.compile: it has no network that can be compiled; leave the setting out")
    for network in networks:
        network.compile(backend=backend)
    try:
        estimator([np.random.default_rng(0).integers(0, 256, (TRIED_PX, TRIED_PX, 3), np.uint8)])
    except Exception as error:  # a compiler is foreign code, and may not be there
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name} cannot be compiled on this machine: {reason}; leave out compile = true") from error
