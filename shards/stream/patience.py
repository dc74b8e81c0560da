"""Waits for files that cannot be reached for a while: an object store without answer, a network disk that is away."""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from shards.core.errors import StoreAway

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


@dataclass
class Patience:
    """Repeats reads while a store is away, for at most limit_s from when it was first noticed. Threads share one."""

    limit_s: float
    """Seconds; 0 never waits."""
    _since: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """Ends all waiting, now and later: nobody wants the files any more."""
        self._stopped.set()

    def read(self, fetch: Callable[[], T]) -> T:
        """What `fetch` gives. Raises StoreAway where the store stays away for too long; other errors at once."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                found = fetch()
            except StoreAway as error:
                self._note_away(error)
                if self._stopped.wait(pause):
                    raise
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            if self._since is not None:
                self._note_back()
            return found

    def _note_away(self, error: StoreAway) -> None:
        with self._lock:
            now = time.monotonic()
            if self._since is None:
                self._since = now
                if self.limit_s:
                    _say(f"{error}; waiting for it, {self.limit_s:g} s at most")
            away_s = now - self._since
        if away_s >= self.limit_s:
            raise StoreAway(f"{error}; it was waited for {away_s:.0f} s") from error

    def _note_back(self) -> None:
        with self._lock:
            if self._since is not None:
                _say(f"the files can be reached again after {time.monotonic() - self._since:.0f} s")
            self._since = None


def _say(text: str) -> None:
    """A note, by one of a loader's workers for all."""
    number, _ = loader_worker()
    if number == 0:
        print(f"note: {text}", file=sys.stderr, flush=True)


def loader_worker() -> tuple[int, int]:
    """This process's number among a DataLoader's workers, and how many there are; (0, 1) outside of one."""
    if "torch" in sys.modules:
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        if info is not None:
            return info.id, info.num_workers
    return 0, 1
