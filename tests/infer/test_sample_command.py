"""`python -m infer sample` from end to end over a tiny base: files, shards, workers, continuing, sentences."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from extract.workers.cluster import connected
from infer.__main__ import app
from infer.outputs import read_given
from shards.core.errors import UsageError, UserError
from shards.dataset import Dataset
from shards.intrinsics import INTRINSICS
from shards.sample import Sample
from tests.support import tiny_text

ALL = ["depth.png", "json", "line.png", "normal.png", "png", "segmentation.png", "sheet.png", "txt"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    pipeline = tiny_text.pipeline("sd15")
    pipeline.save_pretrained(root / "base")
    tiny_text.save_run(pipeline, root / "run")
    return ["--base", str(root / "base"), "--run", str(root / "run"), "--size", "64", "--steps", "2"]


def sample(models, out, *arguments: str) -> str:
    """Runs the command in this process; raises what it raises. Returns what it prints."""
    result = CliRunner().invoke(app, ["sample", *models, "--out", str(out), *arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def endings(folder, key: str) -> list[str]:
    return sorted(path.name.removeprefix(f"{key}.") for path in folder.glob(f"{key}.*"))


def keys(folder) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json") if path.stem.count(".") == 0)


def test_every_image_has_picture_maps_sheet_and_all_that_repeats_it(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cube\n\ntwo blue spheres\n")
    out = tmp_path / "out"
    printed = sample(models, out, "--prompts", str(tmp_path / "prompts.txt"), "--seed", "5", "--num", "2")
    assert "4 made" in printed
    made = keys(out)
    assert [key.rsplit("-", 1)[0] for key in made] == [
        "a-red-cube-5",
        "a-red-cube-6",
        "two-blue-spheres-5",
        "two-blue-spheres-6",
    ]
    for key in made:
        assert endings(out, key) == ALL
        stored = Sample(key, {name: (out / f"{key}.{name}").read_bytes() for name in ALL})
        assert list(stored.maps()) == list(INTRINSICS)
        assert stored.image().shape == (64, 64, 3)
        assert Image.open(out / f"{key}.sheet.png").width > 5 * 64
        assert stored.meta["intrinsics"]["depth"]["by"].startswith("ildm@")
    about = json.loads((out / f"{made[0]}.json").read_text())
    assert about["prompt"] == "a red cube" and about["seed"] == 5
    again = about["generated"]["command"].split()
    assert again[:4] == ["python", "-m", "infer", "sample"]


def test_the_command_in_the_json_repeats_the_image_to_the_bit(models, tmp_path):
    import shlex

    options = ["--schedule", "drop:tau=700", "--negative", "blurry, grey", "--guidance", "3", "--scheduler", "euler-a"]
    sample(models, tmp_path / "one", "--prompt", "it's a cube", "--num", "2", *options)
    key = keys(tmp_path / "one")[1]
    about = json.loads((tmp_path / "one" / f"{key}.json").read_text())
    words = shlex.split(about["generated"]["command"])[4:]
    result = CliRunner().invoke(app, ["sample", *words, "--out", str(tmp_path / "two")])
    assert result.exit_code == 0, result.output
    assert keys(tmp_path / "two") == [key]
    for ending in ALL:
        assert (tmp_path / "one" / f"{key}.{ending}").read_bytes() == (
            tmp_path / "two" / f"{key}.{ending}"
        ).read_bytes()


@pytest.mark.parametrize(("given", "used"), [([], "4.5"), (["--guidance", "7.5"], "7.5")])
def test_the_embedded_base_draws_with_its_own_guidance_unless_told(given: list[str], used: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["sample", "--prompt", "a red cube", "--steps", "1", *given, "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    (key,) = keys(tmp_path)
    assert f"--guidance {used} " in json.loads((tmp_path / f"{key}.json").read_text())["generated"]["command"]


def test_compare_and_shares_are_written_beside_and_what_is_there_is_not_made_again(models, tmp_path):
    sample(models, tmp_path, "--prompt", "a cube")
    (key,) = keys(tmp_path)
    before = (tmp_path / f"{key}.png").read_bytes()
    assert "0 made" in sample(models, tmp_path, "--prompt", "a cube")
    assert "1 made" in sample(models, tmp_path, "--prompt", "a cube", "--compare", "--shares")
    assert endings(tmp_path, key) == sorted([*ALL, "base.png", "shares.json"])
    assert (tmp_path / f"{key}.png").read_bytes() == before
    base, ours = (np.asarray(Image.open(tmp_path / f"{key}{name}.png")) for name in (".base", ""))
    assert base.shape == ours.shape and not np.array_equal(base, ours)
    shares = json.loads((tmp_path / f"{key}.shares.json").read_text())
    assert {"timestep", "layer", "stage", "share"} == set(shares[0])
    sample(models, tmp_path / "off", "--prompt", "a cube", "--schedule", "off", "--no-intrinsics")
    (off,) = keys(tmp_path / "off")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "off" / f"{off}.png")), base)
    assert endings(tmp_path / "off", off) == ["json", "png", "txt"]


def test_a_picture_gives_maps_and_maps_give_a_picture(models, tmp_path):
    sample(models, tmp_path / "first", "--prompt", "a cube")
    (key,) = keys(tmp_path / "first")
    prefix = tmp_path / "first" / key
    sample(models, tmp_path / "maps", "--image", f"{prefix}.png")
    sample(models, tmp_path / "picture", "--prompt", "a cube", "--given", str(prefix), "--given-maps", "depth,line")
    (picture,) = keys(tmp_path / "picture")
    for ending in ("depth.png", "line.png"):
        given = (tmp_path / "first" / f"{key}.{ending}").read_bytes()
        assert (tmp_path / "picture" / f"{picture}.{ending}").read_bytes() == given
    assert list(read_given(str(prefix), ["normal"])) == ["normal"]
    for name, message in (
        (tmp_path / "nothing", "cannot read the given json"),
        (tmp_path, "cannot read the given json"),
    ):
        with pytest.raises(UserError, match=message):
            read_given(str(name))
    with pytest.raises(UserError, match="not an intrinsic"):
        read_given(str(prefix), ["albedo"])


def test_generated_shards_are_a_dataset_that_verify_accepts(models, tmp_path):
    out, arguments = tmp_path / "data", ["--prompt", "a cube", "--prompt", "a ball", "--num", "3", "--shards"]
    sample(models, out, *arguments, "--shard-size", "4")
    dataset = Dataset.open(str(out))
    assert dataset.complete and [mark["counts"]["ok"] for mark in dataset.marks()] == [4, 2]
    read = [stored for shard in dataset.shard_names() for stored in dataset.samples(shard)]
    assert sorted(stored.key for stored in read) == sorted(dataset.keys())
    assert all(list(stored.maps()) == list(INTRINSICS) and stored.caption.startswith("a ") for stored in read)
    verify = [sys.executable, "-m", "shards", "verify", str(out)]
    result = subprocess.run(verify, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

    whole = {path.name: path.read_bytes() for path in out.glob("0*.tar")}
    (out / "000001.json").unlink()  # as if the run had been killed before its second shard
    (out / "000001.tar").unlink()
    assert "2 made" in sample(models, out, *arguments, "--shard-size", "4")
    assert {path.name: path.read_bytes() for path in out.glob("0*.tar")} == whole
    with pytest.raises(UserError, match="another config"):
        sample(models, out, *arguments, "--shard-size", "3")


@pytest.fixture(scope="module")
def ray_alone():
    """Ray, and one thread in this process, as its workers have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with connected("local", 2):
        yield
    torch.set_num_threads(threads)


def painters() -> list[int]:
    """The processes of our Ray workers that have a job: descendants of this process."""
    parents, named = {}, []
    for entry in Path("/proc").iterdir():
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if (entry / "cmdline").read_bytes().startswith(b"ray::SamplerWorker"):
                named.append(int(entry.name))
        except (ValueError, OSError):
            continue

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and pid > 1 and ours(parents[pid]))

    return [pid for pid in named if ours(pid)]


def test_ray_workers_make_the_same_files_as_one_process_even_when_one_is_killed(models, tmp_path, ray_alone):
    arguments = ["--prompt", "a cube", "--prompt", "a ball", "--num", "6"]
    sample(models, tmp_path / "one", *arguments)
    killed: list[int] = []

    def kill() -> None:
        while not killed and not finished.is_set():
            if len(list((tmp_path / "two").glob("*.json"))) >= 2:
                for pid in painters()[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            finished.wait(0.02)

    finished = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        sample(models, tmp_path / "two", *arguments, "--workers", "2")
    finally:
        finished.set()
        killer.join()
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert killed and one == two and len(one) == 12 * len(ALL)


def test_what_is_wrong_in_a_ray_worker_is_a_sentence_too(models, tmp_path, ray_alone):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    arguments = ["--prompt", "x", "--num", "2", "--workers", "2", "--image", str(tmp_path / "torn.png")]
    with pytest.raises(UserError, match="cannot read the picture") as caught:
        sample(models, tmp_path, *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to draw"),
        (["--prompts", "/nowhere.txt"], "cannot read the prompts"),
        (["--prompt", "x", "--size", "large"], "neither a number of pixels"),
        (["--prompt", "x", "--size", "63"], "multiples of 8"),
        (["--prompt", "x", "--dtype", "int8"], "not one of float32"),
        (["--prompt", "x", "--mask", "m.png"], "--mask goes with --image"),
        (["--prompt", "x", "--image", "/nowhere.png"], "cannot read /nowhere.png"),
        (["--prompt", "x", "--schedule", "sometimes"], "no schedule 'sometimes'"),
        (["--prompt", "x", "--run", "/nowhere"], "not a finished run folder"),
        (["--prompt", "x", "--base", "/nowhere"], "neither a folder here nor a hub id"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(models, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        sample(models, tmp_path, *arguments)
    assert "\n" not in str(caught.value)


def test_the_schedule_command_prints_and_draws(tmp_path):
    result = CliRunner().invoke(app, ["schedule", "drop", "--stages", "unet3", "--plot", str(tmp_path / "drop.png")])
    assert result.exit_code == 0 and "l=7" in result.output and (tmp_path / "drop.png").stat().st_size > 1000
    with pytest.raises(UsageError, match="no stage map"):
        raise CliRunner().invoke(app, ["schedule", "drop", "--stages", "unet9"]).exception
