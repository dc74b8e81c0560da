"""The table of the kinds of sources, and what a DATA argument that is no recipe stands for."""

import dataclasses
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extract.sources import Source
from extract.sources.files import IMAGE_SUFFIXES
from shards.config import load_config
from shards.errors import UsageError

# kind: (module, class). A class is a frozen dataclass whose fields are the settings; modules are imported when needed.
KINDS: dict[str, tuple[str, str]] = {
    "demo": ("extract.sources.demo", "DemoSource"),
    "folder": ("extract.sources.folder", "FolderSource"),
    "tars": ("extract.sources.tars", "TarSource"),
    "huggingface": ("extract.sources.huggingface", "HuggingFaceSource"),
    "urls": ("extract.sources.urls", "UrlSource"),
}


def source_class(kind: object) -> type[Any]:
    """The class of a kind of source. Raises UsageError for a kind that is not in the table."""
    if kind not in KINDS:
        raise UsageError(f"source.kind = {kind!r} is not one of {', '.join(KINDS)}")
    module, name = KINDS[str(kind)]
    return getattr(importlib.import_module(module), name)


def open_source(settings: Mapping[str, Any]) -> Source:
    """The source that a recipe's table [source] describes: `kind`, and the settings of that kind. Raises UsageError."""
    cls = source_class(settings.get("kind"))
    source: Source = load_config(cls, {k: v for k, v in settings.items() if k != "kind"}, where="source")
    return source


def resolve(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a source with its defaults filled in, as JSON values; what a dataset's description records."""
    source = open_source(settings)
    return {"kind": settings["kind"], **dataclasses.asdict(source)}  # type: ignore[call-overload]


def settings_of(data: str) -> dict[str, Any] | None:
    """The settings that a DATA argument stands for, where it is not a recipe; None if it is no source that is known.

    An address that ends in .tar (patterns too): those tars. A folder saved by Hugging Face `datasets`: that dataset. A
    folder with tars but no images at its top (img2dataset's, or our own output): its tars. Any other folder, and any
    other address with ://, is a folder of images.
    """
    if data.endswith(".tar"):
        return {"kind": "tars", "tars": [data]}
    path = Path(data)
    if not path.is_dir():
        return {"kind": "folder", "path": data} if "://" in data else None
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return {"kind": "huggingface", "dataset": data}
    suffixes = {os.fsencode(entry.suffix.lower()) for entry in path.iterdir()}
    if b".tar" in suffixes and not suffixes & IMAGE_SUFFIXES:
        return {"kind": "tars", "tars": [f"{data.rstrip('/')}/*.tar"]}
    return {"kind": "folder", "path": data}
