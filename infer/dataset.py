"""Generated images as a dataset of WebDataset shards: what `python -m shards`, training and any tar reader take."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any

from infer.jobs import Job, Request, SampleFiles
from infer.outputs import IMAGE, maker
from infer.run_folder import Manifest
from shards.core.errors import UserError
from shards.core.storage import Folder
from shards.dataset import Dataset, add_counts, write_info
from shards.intrinsics import INTRINSICS
from shards.marks import DATASET, digest, shard_name
from shards.sample import member_names
from shards.writer import ShardWriter, recover


def write_dataset(
    url: str,
    request: Request,
    manifest: Manifest,
    jobs: Sequence[Job],
    paint: Callable[[Sequence[Job]], Iterable[SampleFiles]],
    *,
    shard_size: int,
    progress: Callable[[int], None],
) -> int:
    """Writes the jobs' samples as the dataset at `url`, shard by shard; continues one that was begun. Returns how many.

    Raises UserError if the folder holds a dataset of another command.
    """
    folder = Folder(url)
    folder.make()
    info = _info(request, manifest, jobs, shard_size)
    _begin(folder, info)
    todo = []
    for start in range(0, len(jobs), shard_size):
        index, part = start // shard_size, jobs[start : start + shard_size]
        recover(folder, shard_name(index))
        if not folder.exists(f"{shard_name(index)}.json"):
            todo.append((index, part))
        else:
            progress(len(part))
    painted = iter(paint([job for _, part in todo for job in part]))
    for index, part in todo:
        _write_shard(folder, index, part, painted, info, progress)
    totals = add_counts(Dataset.open(url).marks())
    write_info(folder, info | {"shards": len(totals["shards"]), "totals": totals})
    folder.sweep()
    return sum(len(part) for _, part in todo)


def _info(request: Request, manifest: Manifest, jobs: Sequence[Job], shard_size: int) -> dict[str, Any]:
    made_by = maker(manifest)
    names = tuple(INTRINSICS) if request.intrinsics else ()
    asked = request.described() | {"samples": digest({"keys": [job.key for job in jobs]}), "shard_size": shard_size}
    return {
        "recipe": "generated",
        "config": asked,
        "members": member_names(IMAGE, names),
        "image": IMAGE,
        "depth_kind": manifest.packing.depth.kind,
        "estimators": dict.fromkeys(names, made_by),
        "shards": None,
        "totals": None,
    }


def _begin(folder: Folder, info: dict[str, Any]) -> None:
    """Writes dataset.json, or checks that the one that is there is of the same command."""
    if not folder.exists(DATASET):
        write_info(folder, info)
        return
    there = Dataset.open(folder.url).info
    for field in ("recipe", "config", "members", "estimators"):
        if _plain(there[field]) != _plain(info[field]):
            raise UserError(f"{folder.url} holds a dataset with another {field}; choose another --out")


def _plain(value: Any) -> str:
    return digest({"value": value})


def _write_shard(
    folder: Folder,
    index: int,
    jobs: Sequence[Job],
    painted: Iterator[SampleFiles],
    info: dict[str, Any],
    progress: Callable[[int], None],
) -> None:
    started = perf_counter()
    made = {"config": digest(info["config"]), "first": jobs[0].key, "last": jobs[-1].key}
    with ShardWriter(folder, index, members=info["members"], made=made) as writer:
        for _ in jobs:
            sample = next(painted)
            writer.add(sample.key, sample.members)
            progress(1)
        writer.commit({"total_s": perf_counter() - started})
