"""The commit of files under one name, so that of several writers exactly one wins, and a crash at any instant heals.

For the name 000000 and a writer's random token:

 1. The writer has written its files in full, and synced, as .writing/000000.TOKEN.SUFFIX.
 2. .writing/000000.winner is created exclusively, holding TOKEN. Only its owner may go on; everyone else discards.
 3. The files get their final names, the last suffix last. Then the winner file is removed.

If the winner dies in step 3, whoever comes next finishes its step 3 (each part of it may be repeated). A writer that wins
after another one's commit sees that and discards its own work. Files of two writers are thus never mixed. What is to be
replaced goes the same way: the writer names the checksum of what it replaces, and any other is newer.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from shards.core.errors import UserError
from shards.core.storage import WRITING, Folder
from shards.marks import canonical


@dataclass(frozen=True)
class Commit:
    """The files of one name."""

    folder: Folder
    name: str
    suffixes: tuple[str, ...]
    """In the order of publication."""
    committed: Callable[[], str | None]
    """The checksum of what stands under the name now; None if nothing does."""

    @property
    def _winner(self) -> str:
        return f"{WRITING}/{self.name}.winner"

    def attempt(
        self,
        token: str,
        replaces: str | None,
        *,
        check: Callable[[], object] = lambda: None,
        won: Callable[[], object] = lambda: None,
    ) -> bool:
        """Publishes the files of `token` if what stands there is still `replaces`; False if another writer was faster.

        check: called when the commit is won and nothing is published yet; what it raises gives the commit up.
        won: called right before the publication, from when on the files belong to the dataset.
        """
        self.recover()
        claim = canonical({"token": token, "replaces": replaces})
        if self.committed() != replaces or not self.folder.create(self._winner, claim):
            self.recover()
            return False

        try:
            superseded = self.committed() != replaces  # by a commit that ended, and removed its winner file, in between
            if not superseded:
                check()
        except BaseException:
            self._release(claim)
            raise
        if superseded:
            self._release(claim)
            return False

        won()
        self._publish(token)
        self._release(claim)
        return True

    def recover(self) -> None:
        """Finishes the commit of a writer that died after it had won; does nothing if there is none."""
        try:
            claim = self.folder.read(self._winner)
        except UserError:
            if self.folder.exists(self._winner):
                raise
            return
        content = json.loads(claim)
        if self.committed() == content["replaces"]:
            self._publish(content["token"])
        self._release(claim)

    def _publish(self, token: str) -> None:
        for suffix in self.suffixes:
            self.folder.publish(f"{WRITING}/{self.name}.{token}.{suffix}", f"{self.name}.{suffix}")
        for suffix in self.suffixes:
            self.folder.remove(
                f"{WRITING}/{self.name}.{token}.{suffix}"
            )  # object stores copy: the source is still there

    def _release(self, claim: bytes) -> None:
        """Removes the winner file, unless it is another writer's by now."""
        with contextlib.suppress(UserError):  # it is gone: somebody else finished the commit
            if self.folder.read(self._winner) == claim:
                self.folder.remove(self._winner)
