"""Finds the rows that repeat an earlier one, exactly, among any number of rows and in bounded memory.

A row is known by the first 16 bytes of the BLAKE2b digest of its text (two different texts of a billion are taken for
one with a probability of 1e-21). Digests and row numbers are written into partitions on the disk by the digest's first
byte, 24 bytes a row; each partition is then sorted by itself. Memory: one bit for each row, and one partition (24 bytes
for each 256th row): 25 MB for 100 million rows, which take 2.4 GB of temporary disk.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

_PARTITIONS = 256
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u8")])


class Repeats:
    """Which rows repeat an earlier one."""

    def __init__(self, rows: int, bits: np.ndarray) -> None:
        self.rows = rows
        self._bits = bits

    def within(self, start: int, stop: int) -> list[int]:
        """Those of the rows start..stop, counted from `start`."""
        first = start // 8
        flags = np.unpackbits(self._bits[first : (stop + 7) // 8], bitorder="little")
        return [int(row) for row in np.flatnonzero(flags[start - first * 8 : stop - first * 8])]


def find_repeats(batches: Iterable[Sequence[str | None]]) -> Repeats:
    """The rows whose text stands in an earlier row too. None is a row that does not count, neither first nor second."""
    with tempfile.TemporaryDirectory(prefix="ildm-duplicates-") as folder:
        paths = [Path(folder) / f"{number:03d}" for number in range(_PARTITIONS)]
        rows = _partition(batches, paths)
        bits = np.zeros((rows + 7) // 8, np.uint8)
        for path in paths:
            if path.exists():
                repeated = _repeated(np.fromfile(path, _ENTRY))
                np.bitwise_or.at(bits, repeated // 8, (1 << (repeated % 8)).astype(np.uint8))
                path.unlink()
    return Repeats(rows, bits)


def _partition(batches: Iterable[Sequence[str | None]], paths: Sequence[Path]) -> int:
    """Writes an entry for each row that counts; returns how many rows there were."""
    rows = 0
    waiting: list[np.ndarray] = []
    for texts in batches:
        counted = [number for number, text in enumerate(texts) if text is not None]
        digests = b"".join(_digest(text) for text in texts if text is not None)
        entries = np.empty(len(counted), _ENTRY)
        pairs = np.frombuffer(digests, "<u8").reshape(-1, 2)
        entries["high"], entries["low"] = pairs[:, 0], pairs[:, 1]
        entries["row"] = np.array(counted, np.uint64) + np.uint64(rows)
        rows += len(texts)
        waiting.append(entries)
        if sum(map(len, waiting)) >= 1 << 20:
            _append(np.concatenate(waiting), paths)
            waiting = []
    if waiting:
        _append(np.concatenate(waiting), paths)
    return rows


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _append(entries: np.ndarray, paths: Sequence[Path]) -> None:
    partition = entries["high"].astype(np.uint8)  # the digest's first byte; numpy sorts bytes by counting them
    order = np.argsort(partition, kind="stable")
    edges = np.searchsorted(partition[order], np.arange(_PARTITIONS + 1))
    entries = entries[order]
    for number, path in enumerate(paths):
        part = entries[edges[number] : edges[number + 1]]
        if len(part):
            with path.open("ab") as file:
                part.tofile(file)


def _repeated(entries: np.ndarray) -> np.ndarray:
    """The row numbers of all entries but the first of each digest, int64. The entries come in the order of their rows."""
    order = np.lexsort((entries["low"], entries["high"]))  # a stable sort
    entries = entries[order]
    same = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
    return entries["row"][1:][same].astype(np.int64)
