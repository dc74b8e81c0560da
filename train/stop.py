"""SIGTERM (a preempted job) and Ctrl-C end a training after the step at hand, saved."""

import contextlib
import signal
from collections.abc import Callable
from typing import Any

import torch


class Stopped(Exception):
    """A training was asked to stop, and did so, saved."""


class Stop:
    """Within its context, SIGTERM and SIGINT are only noted; a second SIGINT interrupts at once.

    Whatever must not be cut short (a step, a checkpoint, the run folder) happens inside, and asks between its parts.
    """

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        """then: called once the first signal is noted; what it raises ends what the main thread is at."""
        self._asked, self._then = False, then
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        with contextlib.suppress(ValueError):  # not in the main thread: whoever runs us handles signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        self._then()

    def asked(self, world: int = 1, device: torch.device | None = None) -> bool:
        """Whether any of `world` processes was asked to stop: all must agree on the step, so each of them calls this."""
        if world == 1:
            return self._asked
        flag = torch.tensor(int(self._asked), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def check(self, name: str, step: int) -> None:
        """Raises Stopped if this process was asked to stop. name, step: what was trained, and how far; it is saved."""
        if self._asked:
            raise Stopped(f"stopped after step {step} of {name}, saved; the same command continues")
