"""How many CPU cores this process may use: affinity, and the quotas of containers (cgroup v1 and v2)."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """The cores of the process's affinity, or the CPU time that its container grants, whichever is less.

    A quota of one and a half cores counts as two: rounded up, no granted time stays unused.
    root: where /proc and /sys are.
    """
    allowed = len(os.sched_getaffinity(0))
    quotas = [math.ceil(quota) for quota in _quotas(root)]
    return max(1, min([allowed, *quotas]))


def _quotas(root: Path) -> Iterator[float]:
    """The quotas, in cores, of the process's control group and of all groups above it: each of them binds."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mounts = root / "sys/fs/cgroup"

        if hierarchy == "0" and not controllers:
            for group in _with_parents(mounts, path):
                yield from _quota_v2(group)
        elif "cpu" in controllers.split(","):
            for mount in dict.fromkeys((mounts / controllers, mounts / "cpu")):
                for group in _with_parents(mount, path):
                    yield from _quota_v1(group)


def _with_parents(mount: Path, path: str) -> list[Path]:
    """The folders of a group and its parents, up to the mount. In a container only the mount may be there."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _quota_v2(group: Path) -> Iterator[float]:
    """cpu.max: "QUOTA PERIOD" in microseconds, or "max PERIOD" where there is no quota."""
    words = _text(group / "cpu.max").split()
    if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
        yield int(words[0]) / int(words[1])


def _quota_v1(group: Path) -> Iterator[float]:
    """cpu.cfs_quota_us and cpu.cfs_period_us; a quota of -1 is none."""
    quota, period = (_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if quota.isdigit() and period.isdigit() and int(quota) and int(period):
        yield int(quota) / int(period)


def _text(path: Path) -> str:
    """The content of a file of the kernel; "" where there is none, as without control groups."""
    try:
        return path.read_text()
    except OSError:
        return ""
