"""What files hold, for the keys of results: other content under the same path is another result."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from infer.embedded import is_embedded
from shards.core.errors import UserError

_MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".pt")


def sha256_of(path: str | Path) -> str:
    """sha256 of a file, in hex. Raises UserError."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def of_sample(prefix: str) -> str:
    """sha256 over the files of an unpacked sample: PREFIX.json, PREFIX.depth.png and so on."""
    path = Path(prefix)
    there = sorted(path.parent.glob("*")) if path.parent.is_dir() else []
    return _together(path.parent, [file for file in there if file.name.startswith(f"{path.name}.")])


def of_model(name: str) -> str:
    """What stands for a model in a key: its files' sha256 where it is a file or a folder here, else its name.

    Hub ids and embedded models keep their names, which say what they are. Weights of other formats are not loaded, and so do
    not count.
    """
    path = Path(name)
    if is_embedded(name) or not path.exists():
        return name
    if path.is_file():
        return f"sha256:{sha256_of(path)}"
    hidden = [file for file in sorted(path.rglob("*")) if file.suffix in _MODEL_FILES and file.is_file()]
    files = [file for file in hidden if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return f"sha256:{_together(path, files)}"


def of_embeddings(texts: Sequence[str]) -> list[list[str]]:
    """Of textual inversions, "TOKEN=FILE" or "FILE": how they are called, and what they hold."""
    found = []
    for text in texts:
        token, equals, file = text.rpartition("=")
        found.append([token if equals else Path(file).name, sha256_of(file)])
    return found


def _together(folder: Path, files: Sequence[Path]) -> str:
    """sha256 over names and contents; a few files at once, since the large ones are gigabytes."""
    total = hashlib.sha256()
    with ThreadPoolExecutor(4) as pool:
        for file, found in zip(files, pool.map(sha256_of, files), strict=True):
            total.update(f"{file.relative_to(folder).as_posix()} {found}\n".encode())
    return total.hexdigest()
