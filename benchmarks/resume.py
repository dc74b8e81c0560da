"""Kills a training again and again at random places, resumes it, and compares what comes out bit for bit.

    python -m benchmarks.resume                 20 deaths for each stage, on 1 and on 2 processes: three to ten minutes
    python -m benchmarks.resume --deaths 2

Tiny models, CPU, accumulation over two batches, two loader processes. A death is kill -9 of one process in the middle of a
forward; the others of its group are then killed too, as a launcher does. Equal: weights, average, optimiser, position.
"with a checkpoint" counts the deaths after which a start had something to go on from.
"""

import random
import signal
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from tests.support import tiny_text
from tests.support.training import config_of, die_at_forward, in_processes, write_scenes
from train.checkpoint import Checkpoint, Checkpoints
from train.lora import train_lora
from train.run import quiet
from train.vae import save_result, train_vae

STAGES = {"vae": train_vae, "lora": train_lora}
FORWARDS = {"vae": 500, "lora": 2400}
"""Calls of single layers within which a start dies: to the first checkpoint (386 and 1446 calls), and a few steps more."""
STEPS = 60


def start(stage: str, shards: str, base: str, out: Path, kill_at: int, rank: int) -> None:
    """One start of a stage in this process; rank 0 dies at the kill_at-th call of a layer, if that is not 0."""
    loop = [f"{stage}.loop.{setting}" for setting in (f"steps={STEPS}", "checkpoint_every=1")]
    config = config_of(shards, base, out, *loop, "data.memory_gb=0", "data.workers=2")
    if kill_at and rank == 0:
        die_at_forward(kill_at)
    STAGES[stage](config)


def checkpoints(out: Path, stage: str) -> Checkpoints:
    return Checkpoints(out / "training" / stage / "checkpoints", 2)


def final(out: Path, stage: str) -> Checkpoint:
    found = checkpoints(out, stage).load()
    assert found is not None
    return found


def same(a: Checkpoint, b: Checkpoint) -> bool:
    parts = [(getattr(a, part), getattr(b, part)) for part in ("weights", "average", "optimiser")]
    equal = all(x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in parts)
    return equal and (a.step, a.consumed, a.score) == (b.step, b.consumed, b.score)


def main(
    deaths: Annotated[int, typer.Option(help="Deaths of each stage.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the places where it dies.")] = 0,
) -> None:
    """Prints the table; exit status 1 if anything differs, or nothing was ever resumed."""
    torch.set_num_threads(1)
    quiet()
    columns = ("stage", "processes", "deaths", "with a checkpoint", "starts", "bit-equal")
    table = Table(*columns, title="Killed and resumed")
    rng, wrong = random.Random(seed), False
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        shards, base = write_scenes(root / "shards"), tiny_text.models("sd21")[0]
        for stage in STAGES:
            for world in (1, 2):
                died = resumable = starts = 0
                folders = {name: root / f"{stage}-{world}-{name}" for name in ("calm", "killed")}
                for folder in folders.values():
                    if stage == "lora":
                        folder.mkdir()
                        save_result(tiny_text.intrinsic_vae(), folder / "vae")
                job, log = (stage, shards, base), root / "trace"
                assert not any(in_processes(start, *job, folders["calm"], 0, world=world, log=log))
                while died < deaths:
                    kill_at = rng.randint(1, FORWARDS[stage])
                    statuses = in_processes(start, *job, folders["killed"], kill_at, world=world, log=log)
                    starts += 1
                    if statuses[0] == -signal.SIGKILL:
                        died += 1
                        resumable += bool(checkpoints(folders["killed"], stage).steps())
                    elif starts > 50 * deaths or not any(
                        statuses
                    ):  # it reached the end: from here there is nothing to kill
                        break
                assert not any(in_processes(start, *job, folders["killed"], 0, world=world, log=log))
                equal = same(final(folders["calm"], stage), final(folders["killed"], stage))
                wrong |= not equal or not resumable
                table.add_row(*map(str, (stage, world, died, resumable, starts + 1, "yes" if equal else "NO")))
    Console().print(table)
    raise typer.Exit(int(wrong))


if __name__ == "__main__":
    typer.run(main)
