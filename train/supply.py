"""The batches of each step, and what ends a training for want of them: a store that stays away, or data that breaks."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator

from shards.core.errors import StoreAway, UserError
from train.data import Batch, Sample, Samples

FEWEST = 1000
"""Samples that the share of broken ones is of, at least, as long as the dataset has so many: ten at the start prove nothing."""


class TooMuchBroken(UserError):
    """More of the data cannot be read than data.max_broken allows."""


class Interrupted(Exception):
    """A signal came while a batch was waited for."""


class BrokenData:
    """What could not be read: each file is said once, when it happens; each sample is counted once, whatever the epoch."""

    def __init__(self, known: Iterable[str], *, seen: int, epoch: int, max_broken: float) -> None:
        """known: entries of an earlier run (Item.skipped). seen: samples that this process has asked for so far.
        epoch: how many it asks for in an epoch."""
        self._entries: dict[tuple[str, str], str] = {}
        self.files = Counter[str]()
        """Samples that could not be read, by the tar that should have them."""
        self._seen, self._epoch, self._max_broken = seen, max(1, epoch), max_broken
        for entry in known:
            self._add(entry)

    @property
    def entries(self) -> tuple[str, ...]:
        """All that is known, one line for each sample."""
        return tuple(sorted(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def note(self, samples: Sequence[Sample]) -> None:
        """Counts what stood in for broken samples. Raises TooMuchBroken."""
        self._seen += len(samples)
        for sample in samples:
            for entry in sample.skipped:
                file = self._add(entry)
                if file is not None and self.files[file] == 1:
                    print(
                        f"note: a sample cannot be read, another stands in for it: {entry} (the log counts what else of "
                        "this file cannot be read)",
                        file=sys.stderr,
                        flush=True,
                    )
        self._check()

    def _add(self, entry: str) -> str | None:
        """The entry's file, unless its sample is known already. The words of an error may differ from time to time."""
        file, _, rest = entry.partition(".tar ")
        name = file + ".tar", rest.partition(": ")[0]
        if name in self._entries:
            return None
        self._entries[name] = entry
        self.files[name[0]] += 1
        return name[0]

    def _check(self) -> None:
        of = max(min(self._seen, self._epoch), min(FEWEST, self._epoch))
        if len(self) <= self._max_broken * of:
            return
        worst = ", ".join(f"{count} of {file}" for file, count in self.files.most_common(3))
        raise TooMuchBroken(
            f"{len(self)} samples cannot be read ({worst}), more than data.max_broken = {self._max_broken:g} of {of}: mend the "
            "dataset (`python -m shards verify` says what is wrong) and give the same command again, or allow more"
        )


class Supply:
    """Hands out the batches of one step after the other. All processes agree on where they end."""

    def __init__(
        self, samples: Samples, batches: Iterator[Batch], broken: BrokenData, accelerator: Accelerator
    ) -> None:
        self._samples, self._batches, self.broken, self._accelerator = samples, batches, broken, accelerator
        self.trouble: UserError | None = None
        """Why there are no more batches; None if a signal ended them."""
        self.waits = False
        """Whether a batch is being waited for: a signal may then raise Interrupted."""

    def interrupt(self) -> None:
        """For a handler of signals: ends the waiting for a batch, and nothing else."""
        if self.waits:
            self.waits = False
            self._samples.stop_waiting()  # first: threads that wait would be waited for
            raise Interrupted

    def take(self, count: int) -> list[Batch] | None:
        """The next batches; None if there are no more, for this process or for another."""
        taken: list[Batch] = []
        code = 0  # the same in all processes: 1 if a signal ended it, 2 for trouble
        try:
            self.waits = True
            for _ in range(count):
                taken.append(next(self._batches))
            self.waits = False
            for batch in taken:
                self.broken.note(batch.samples)
        except Interrupted:
            code = 1
        except (StoreAway, TooMuchBroken) as error:
            self.trouble, code = error, 2
        finally:
            self.waits = False

        code = self._largest(code)
        if not code:
            return taken
        self._samples.stop_waiting()
        if code == 2 and self.trouble is None:
            self.trouble = UserError("another process of this training could not read its data; see its error message")
        return None

    def _largest(self, code: int) -> int:
        if self._accelerator.num_processes == 1:
            return code
        flag = torch.tensor(code, device=self._accelerator.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag.item())
