"""The files of cluster/: they parse, name what exists, and the scripts start, stop and report as they say."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"

# Programs of a Slurm cluster that only note how they were called.
STUBS = {
    "scontrol": "printf 'node1\\nnode2\\nnode3\\n'",
    "srun": 'case "$*" in *hostname*) echo 10.0.0.1;;\n'
    '*) trap "echo step ended >> $NOTES; exit 0" TERM; while :; do sleep 0.05; done;; esac',
    "ray": "",
    "python": 'trap "echo terminated >> $NOTES; exit 1" TERM; echo trapped >> "$NOTES"\n'
    "for i in $(seq ${SLEEPS:-1}); do sleep 0.1; done; exit ${STATUS:-0}",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which the commands of Slurm and Ray are stubs; they write to $NOTES."""
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$NOTES"\n{body}\n')
        path.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "NOTES": str(tmp_path / "notes"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_ID": "77",
    }


def notes(environment: dict[str, str]) -> list[str]:
    return Path(environment["NOTES"]).read_text().splitlines()


@pytest.mark.parametrize("name", ["extract.slurm", "submit.sh"])
def test_scripts_are_legal_bash_and_explain_themselves_without_arguments(name: str) -> None:
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)
    shown = subprocess.run(["bash", CLUSTER / name], capture_output=True, text=True, check=False)
    assert shown.returncode == 2 and shown.stderr.startswith("usage:")


@pytest.mark.parametrize("status", [0, 3])
def test_the_slurm_job_starts_head_and_workers_and_ends_with_the_status_of_the_driver(
    slurm: dict[str, str], status: int
) -> None:
    command = ["bash", str(CLUSTER / "extract.slurm"), "laion", "--out", "s3://b/x"]
    done = subprocess.run(command, env=slurm | {"STATUS": str(status)}, check=False, timeout=60)
    assert done.returncode == status
    said = "\n".join(notes(slurm))
    assert re.search(r"srun .*--nodelist=node1 ray start --head --node-ip-address=10\.0\.0\.1 --port=20077", said)
    assert re.search(r"srun --nodes=2 --ntasks=2 --nodelist=node2,node3 bash -c", said)
    assert "python -m extract laion --out s3://b/x --address 10.0.0.1:20077" in said
    assert said.count("step ended") == 2 and "ray stop" not in said


def test_preemption_reaches_the_driver_which_stops_cleanly(slurm: dict[str, str]) -> None:
    command = ["bash", str(CLUSTER / "extract.slurm"), "demo"]
    job = subprocess.Popen(command, env=slurm | {"SLEEPS": "300"})
    while not Path(slurm["NOTES"]).exists() or "trapped" not in notes(slurm):
        time.sleep(0.02)
    time.sleep(1.0)  # the script's own trap is on the line after
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 1 and notes(slurm)[-3:] == ["terminated", "step ended", "step ended"]


def test_a_head_that_does_not_start_ends_the_job(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\ncase "$*" in *hostname*) echo 10.0.0.1;; *) exit 1;; esac\n')
    (tmp_path / "bin" / "ray").write_text("#!/bin/bash\nexit 1\n")
    command = ["bash", str(CLUSTER / "extract.slurm"), "demo"]
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1 and "error: Ray's head ended on node1" in done.stderr


def processes_of_ray() -> set[tuple[int, str]]:
    """(process, command) of the servers that make up a Ray cluster on this machine."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has just ended
            if "gcs_server" in command or "/raylet " in command:
                found.add((int(entry.name), command))
    return found


def test_submit_hands_the_command_to_the_dashboard(slurm: dict[str, str]) -> None:
    command = ["bash", str(CLUSTER / "submit.sh"), "http://head:8265", "demo", "--out", "data/x"]
    subprocess.run(command, env=slurm, check=True)
    expected = (
        "ray job submit --address http://head:8265 --no-wait -- python -m extract demo --out data/x --address auto"
    )
    assert notes(slurm) == [expected]


def test_the_manifest_is_a_rayjob_whose_command_and_version_are_ours() -> None:
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    spec = job["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == pins["ray"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        for container in group["template"]["spec"]["containers"]:
            assert container["image"] and container["resources"]["requests"] == container["resources"]["limits"]
    help_text = subprocess.run(
        [sys.executable, "-m", "extract", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "200"},
    ).stdout
    for option in re.findall(r"--[a-z-]+", job["spec"]["entrypoint"]):
        assert option in help_text, option


def test_the_image_copies_what_exists() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert copied and all((ROOT / name).exists() for line in copied for name in line.split())
