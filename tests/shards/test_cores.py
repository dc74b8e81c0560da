"""The cores that a process may use: affinity and quotas, read from control groups that the test writes."""

import os
from pathlib import Path

import pytest

from shards.core.cores import cores

MANY = 1 << 10


@pytest.fixture(autouse=True)
def affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MANY)))


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2, V1 = "0::/kubepods/pod7/main\n", "3:memory:/docker/1\n7:cpu,cpuacct:/docker/1\n0::/docker/1\n"
QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        (V2, {"kubepods/pod7/main/cpu.max": "400000 100000\n"}, 4),
        (V2, {"kubepods/pod7/main/cpu.max": "max 100000\n"}, MANY),
        (V2, {"kubepods/pod7/main/cpu.max": "max 100000\n", "kubepods/pod7/cpu.max": "150000 100000\n"}, 2),
        (V2, {"kubepods/pod7/main/cpu.max": "800000 100000\n", "kubepods/cpu.max": "300000 100000\n"}, 3),
        (V2, {"cpu.max": "50000 100000\n"}, 1),  # a container sees its own group as the root
        ("0::/../other\n", {"cpu.max": "200000 100000\n"}, 2),
        (V1, {f"cpu,cpuacct/docker/1/{QUOTA}": "600000\n", f"cpu,cpuacct/docker/1/{PERIOD}": "100000\n"}, 6),
        (V1, {f"cpu/{QUOTA}": "250000\n", f"cpu/{PERIOD}": "50000\n"}, 5),
        (V1, {f"cpu,cpuacct/{QUOTA}": "-1\n", f"cpu,cpuacct/{PERIOD}": "100000\n"}, MANY),
        ("2:cpuset:/\n", {f"cpu/{QUOTA}": "100000\n", f"cpu/{PERIOD}": "100000\n"}, MANY),  # not this process's
        (V2, {"kubepods/pod7/main/cpu.max": "what is this\n"}, MANY),
        ("", {}, MANY),
    ],
)
def test_the_least_quota_of_the_group_and_its_parents_counts(
    tmp_path: Path, group: str, files: dict[str, str], expected: int
) -> None:
    root = lay_out(tmp_path, {"proc/self/cgroup": group} | {f"sys/fs/cgroup/{name}": files[name] for name in files})
    assert cores(root) == expected


def test_affinity_counts_where_it_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = lay_out(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "800000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6})
    assert cores(root) == 3


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cores(tmp_path) == MANY
