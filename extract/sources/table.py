"""The table of the kinds of sources, and what a DATA argument that is no recipe stands for."""

import dataclasses
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extract.sources import Source
from extract.sources.captions import TABLE_SUFFIXES
from extract.sources.files import IMAGE_SUFFIXES, walk
from shards.core.config import load_config
from shards.core.errors import UsageError
from shards.core.storage import Folder

# kind: (module, settings, source): the names of two classes. Settings are a frozen dataclass; a source that needs no more
# than its settings is that dataclass itself. Modules are imported when needed.
KINDS: dict[str, tuple[str, str, str]] = {
    "demo": ("extract.sources.demo", "DemoSettings", "DemoSource"),
    "folder": ("extract.sources.folder", "FolderSource", "FolderSource"),
    "tars": ("extract.sources.tars", "TarSource", "TarSource"),
    "huggingface": ("extract.sources.huggingface", "HuggingFaceSource", "HuggingFaceSource"),
    "urls": ("extract.sources.urls", "UrlSource", "UrlSource"),
}


COMPRESSED_TARS = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tgz", ".tbz2", ".txz")


def open_source(settings: Mapping[str, Any]) -> Source:
    """The source that a recipe's table [source] describes: `kind`, and the settings of that kind. Raises UsageError."""
    loaded = _load(settings)
    module, _, name = KINDS[settings["kind"]]
    cls = getattr(importlib.import_module(module), name)
    source: Source = loaded if isinstance(loaded, cls) else cls(loaded)
    return source


def resolve(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a source with its defaults filled in; what a dataset's description records. Raises UsageError."""
    return {"kind": settings.get("kind"), **dataclasses.asdict(_load(settings))}


def _load(settings: Mapping[str, Any]) -> Any:
    """The settings of a source as their dataclass."""
    kind = settings.get("kind")
    if kind not in KINDS:
        raise UsageError(f"source.kind = {kind!r} is not one of {', '.join(KINDS)}")
    module, name, _ = KINDS[str(kind)]
    given = {key: value for key, value in settings.items() if key != "kind"}
    return load_config(getattr(importlib.import_module(module), name), given, where="source")


def settings_of(data: str) -> dict[str, Any] | None:
    """The settings that a DATA argument stands for, where it is not a recipe; None if it is no source that is known.

    An address that ends in .tar (patterns too): those tars; one that ends like a table (.parquet, .csv, ...): URLs. A
    folder saved by Hugging Face `datasets`: that dataset. A folder with tars but no images at its top (img2dataset's, or
    our own output): its tars. A folder with tables at its top and no image anywhere: URLs. Any other folder, and any other
    address with ://, is a folder of images.
    """
    if data.lower().endswith(COMPRESSED_TARS):
        raise UsageError(
            f"{data} is compressed, and cannot be read from the middle; decompress it first: gzip -d, zstd -d"
        )
    if data.endswith(".tar"):
        return {"kind": "tars", "tars": [data]}
    if data.endswith(TABLE_SUFFIXES):
        return {"kind": "urls", "tables": data}
    path = Path(data)
    if not path.is_dir():
        return {"kind": "folder", "path": data} if "://" in data else None
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return {"kind": "huggingface", "dataset": data}
    suffixes = {os.fsencode(entry.suffix.lower()) for entry in path.iterdir()}
    if b".tar" in suffixes and not suffixes & IMAGE_SUFFIXES:
        return {"kind": "tars", "tars": [f"{data.rstrip('/')}/*.tar"]}
    if suffixes & set(map(os.fsencode, TABLE_SUFFIXES)) and next(walk(Folder(data)), None) is None:
        return {"kind": "urls", "tables": data}
    return {"kind": "folder", "path": data}
