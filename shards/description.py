"""dataset.json, changed so that a folder never holds shards of two runs with different settings.

A run creates dataset.json exclusively, so that of several runs that begin at once exactly one does. A run that may change
the description of a dataset (another estimator, a larger limit) replaces the very file that it read, as a shard is replaced
(shards.commit), or fails. Whoever commits a shard looks, after it has won the commit, whether the description is still its
own: a run whose dataset was taken over by another one is thus refused at its next shard.
"""

import uuid
from collections.abc import Mapping
from typing import Any

from shards.commit import Commit
from shards.core.errors import UserError
from shards.core.storage import WRITING, Folder
from shards.marks import DATASET, VERSION, digest, seal, unseal

_NAME = DATASET.removesuffix(".json")
_DECIDING = ("config", "image", "members", "estimators")
_ATTEMPTS = 20


class DescriptionChanged(UserError):
    """Another run changed the dataset's description while this one was at work."""


def kind_of(info: Mapping[str, Any]) -> str:
    """A digest of what decides the bytes of a dataset's shards: its description without totals and rounds of retries."""
    return digest({name: info.get(name) for name in _DECIDING})


def read_info(folder: Folder) -> dict[str, Any] | None:
    """The content of dataset.json; None if there is none. Raises MarkError when it is damaged."""
    _commit(folder).recover()
    if not folder.exists(DATASET):
        return None
    return unseal(folder.read(DATASET), folder.address(DATASET))


def create_info(folder: Folder, info: Mapping[str, Any]) -> bool:
    """Writes dataset.json if there is none; False if there is one. Of several callers exactly one gets True."""
    return folder.create(DATASET, _sealed(info))


def replace_info(folder: Folder, info: Mapping[str, Any], replaces: str) -> bool:
    """Writes dataset.json in the place of the one with the checksum `replaces`; False if that is not there any more."""
    token = uuid.uuid4().hex
    name = f"{WRITING}/{_NAME}.{token}.json"
    try:
        folder.make(WRITING)
        folder.write(name, _sealed(info))
        won = _commit(folder).attempt(token, replaces)
    except UserError:
        if folder.exists(name):
            raise
        return False  # a run that ended meanwhile swept the folder of files that are being written
    if not won:
        folder.remove(name)
    return won


def update_info(folder: Folder, info: Mapping[str, Any]) -> None:
    """Replaces dataset.json by a later state of the same dataset (totals, rounds of retries).

    Raises DescriptionChanged if another run changed what decides the bytes.
    """
    for _ in range(_ATTEMPTS):
        current = check_kind(folder, kind_of(info))
        if _sealed(current) == _sealed(info) or replace_info(folder, info, current["checksum"]):
            return
    raise DescriptionChanged(
        f"{folder.address(DATASET)} is changed by other runs all the time; let one of them work alone"
    )


def check_kind(folder: Folder, kind: str) -> dict[str, Any]:
    """The content of dataset.json. Raises DescriptionChanged if it does not describe a dataset of this kind."""
    current = read_info(folder)
    if current is None or kind_of(current) != kind:
        what = "is gone" if current is None else "was changed by another run, with other settings,"
        raise DescriptionChanged(
            f"{folder.address(DATASET)} {what} while this run was at work; this run stops, and what the other one makes is "
            "whole. Let one run work in a folder at a time"
        )
    return current


def _sealed(info: Mapping[str, Any]) -> bytes:
    return seal({"version": VERSION, **info})


def _checksum(folder: Folder) -> str | None:
    if not folder.exists(DATASET):
        return None
    return str(unseal(folder.read(DATASET), folder.address(DATASET))["checksum"])


def _commit(folder: Folder) -> Commit:
    return Commit(folder, _NAME, ("json",), lambda: _checksum(folder))
