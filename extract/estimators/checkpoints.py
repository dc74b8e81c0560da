"""Checkpoints: where their files are published, where they lie on this machine, what they are, and how they are read.

A run never downloads: `python -m extract --fetch --estimators SET` does, once, into the cache that all programs of the
Hugging Face hub share (HF_HOME), or for any other address (s3://, https://, ...) into ILDM_CACHE (~/.cache/ildm).
Nothing is ever unpickled that could run code.
"""

import fnmatch
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.core.errors import UserError
from shards.core.storage import Folder

ANY_FILES = ("*.json", "*.safetensors")
"""The files of a checkpoint folder in the usual form. An entry may list alternatives, `a|b`: the first that is there
counts. An empty last one, `a|`, says that the file may be missing."""


@dataclass(frozen=True)
class Published:
    """A repository of the hub, and a revision of it: a branch, or a commit, which pins it for good."""

    repo: str
    revision: str = "main"

    @property
    def pinned(self) -> bool:
        return re.fullmatch("[0-9a-f]{40}", self.revision) is not None

    def __str__(self) -> str:
        if self.revision == "main":
            return self.repo
        return f"{self.repo}@{self.revision[:8] if self.pinned else self.revision}"


Weights = Path | str | Published
"""A folder of this machine; an fsspec URL of a folder; or a repository of the hub."""


def locate(weights: Weights, files: Sequence[str], name: str, origin: str = "") -> Path:
    """The folder on this machine that holds the files. Raises UserError, with the command that fetches them, if none does.

    name: the estimator's, and origin: what --estimators names where it is not the table's, for that command.
    """
    folder = _place(weights)
    lacking = _lacking(_names(folder), files) if folder else list(files)
    if folder is not None and not lacking:
        return folder
    if not _is_remote(weights):
        raise UserError(
            f"the estimator checkpoint {weights} is missing: there is no {lacking[0].rstrip('|')} in it; "
            f"check the path of {name}"
        )
    raise UserError(
        f"the weights of the estimator {name} ({weights}) are not on this machine; fetch them with: "
        f"python -m extract --fetch --estimators {origin or name}"
    )


def fetch(weights: Weights, files: Sequence[str], name: str) -> Path:
    """Brings the files onto this machine if they are not there; returns their folder. Raises UserError if that fails."""
    if isinstance(weights, Published):
        _fetch_published(weights, files, name)
    elif _is_remote(weights):
        _fetch_url(str(weights), files, name)
    return locate(weights, files, name)


def digest_of(folder: Path, files: Sequence[str]) -> str:
    """sha256 over the names and contents of a checkpoint's files."""
    total = hashlib.sha256()
    for relative in sorted(_chosen(_names(folder), files)):
        with (folder / relative).open("rb") as file:
            total.update(relative.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_weights(folder: Path, *names: str) -> dict[str, Any]:
    """The tensors of the first of these files that is there, .safetensors before others, on the CPU.

    A .pth may hold tables in tables (model_state_dict, ...); it is read without unpickling anything but tensors and plain
    values. Raises UserError naming the file.
    """
    there = [
        name for name in sorted(names, key=lambda name: not name.endswith(".safetensors")) if (folder / name).is_file()
    ]
    if not there:
        raise UserError(f"the estimator checkpoint {folder} has no {' and no '.join(names)}")
    path = folder / there[0]
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        import torch

        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise unreadable(path, error) from error
    if not isinstance(found, Mapping):
        raise UserError(
            f"the estimator checkpoint {path} cannot be loaded: it holds a {type(found).__name__}, no weights"
        )
    return dict(found)


def load_strictly(net: Any, weights: Mapping[str, Any], where: Path) -> None:
    """Gives a torch module its weights: all of its keys, and no others. Raises UserError naming what does not fit.

    One that was built on the "meta" device, which saves making random weights first, takes the tensors themselves.
    """
    unmade = any(parameter.is_meta for parameter in net.parameters())
    try:
        net.load_state_dict(weights, strict=True, assign=unmade)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise unreadable(where, error) from error


def unreadable(where: Path, error: Exception) -> UserError:
    """The sentence for a checkpoint that is there and cannot be used."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    message = " ".join(lines[:2])[:300].rstrip(".:")
    return UserError(f"the estimator checkpoint {where} cannot be loaded: {message}; fetch it again, or check its row")


# ---- places ----------------------------------------------------------------------------------------------------------


def _is_remote(weights: Weights) -> bool:
    return isinstance(weights, Published) or (isinstance(weights, str) and "://" in weights)


def _place(weights: Weights) -> Path | None:
    """The folder in which the files lie if they are on this machine."""
    if isinstance(weights, Published):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            # no patterns: whether all that the row needs is there is our question, not whether all of the repository is
            there = snapshot_download(weights.repo, revision=weights.revision, local_files_only=True, allow_patterns=[])
            return Path(there)
        except LocalEntryNotFoundError:
            return None
        except HFValidationError as error:
            raise UserError(f"{weights.repo!r} is not the name of a repository of the hub: {error}") from error
    return _url_place(weights) if isinstance(weights, str) and _is_remote(weights) else Path(weights)


def _url_place(url: str) -> Path:
    root = Path(os.environ.get("ILDM_CACHE") or Path.home() / ".cache" / "ildm")
    return root / f"{url.rstrip('/').rsplit('/', 1)[-1]}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def _names(folder: Path) -> list[str]:
    """The relative paths of the files below a folder."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _chosen(names: Sequence[str], files: Sequence[str]) -> set[str]:
    """The names that are needed: of each entry those that its first matching alternative matches."""
    return {name for entry in files for name in next(filter(None, _hits(names, entry)), [])}


def _lacking(names: Sequence[str], files: Sequence[str]) -> list[str]:
    """The entries for which there is nothing, and should be."""
    return [entry for entry in files if not entry.endswith("|") and not any(_hits(names, entry))]


def _hits(names: Sequence[str], entry: str) -> Iterator[list[str]]:
    return (fnmatch.filter(names, pattern) for pattern in entry.split("|"))


def _fetch_published(weights: Published, files: Sequence[str], name: str) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        siblings = HfApi().model_info(weights.repo, revision=weights.revision).siblings or []
        names = [sibling.rfilename for sibling in siblings]
        if lacking := _lacking(names, files):
            raise UserError(f"{weights} has no {lacking[0]}, which the estimator {name} needs")
        snapshot_download(weights.repo, revision=weights.revision, allow_patterns=sorted(_chosen(names, files)))
    except GatedRepoError as error:
        raise UserError(
            f"{weights.repo} is gated: accept its terms on its page of the hub, log in with `hf auth login`, and fetch again"
        ) from error
    except UserError:
        raise
    except Exception as error:  # no connection, a full disk, ...: what is raised depends on the library's HTTP client
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot fetch {weights} for the estimator {name}: {message}") from error


def _fetch_url(url: str, files: Sequence[str], name: str) -> None:
    """Copies a folder of any store; it appears in the cache when it is whole."""
    source, place = Folder(url), _url_place(url)
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    try:
        with source.explained("", "read"):
            names = [str(path)[len(source.path) :].lstrip("/") for path in source.fs.find(source.path)]
            if lacking := _lacking(names, files):
                raise UserError(f"{url} has no {lacking[0]}, which the estimator {name} needs")
            for relative in _chosen(names, files):
                (temporary / relative).parent.mkdir(parents=True, exist_ok=True)
                source.fs.get_file(f"{source.path}/{relative}", str(temporary / relative))
        shutil.rmtree(place, ignore_errors=True)
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
