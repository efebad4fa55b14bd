"""Which tickets a party has used: the last number of each model version, beside its keys.

It stands with the keys and not with the tickets, so that copying a folder of tickets back from where it came brings no
used number back. The entry is on the disk before the ticket's first use, and numbers only rise.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepshare.files import write_whole
from deepshare.secure.errors import SecureError
from deepshare.secure.net.folders import sync_folder


class Ledger:
    """`ledger.json` in the folder of a party's keys: {version: last number used}."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.json"

    def last(self, version: str) -> int:
        """The last number of `version` that was used; 0 for none. Raises SecureError for a damaged file."""
        return self._read().get(version, 0)

    def use(self, version: str, number: int) -> None:
        """Writes `number` down as used.

        Raises:
            SecureError: it, or a later one, was used before.
        """
        with self.locked():
            used = self._read()
            if number <= used.get(version, 0):
                raise SecureError(
                    f"secure: ticket {number} of version {version[:8]} was used before "
                    f"(the ledger {self.path} stands at {used[version]})"
                )
            write_whole(self.path, json.dumps({**used, version: number}, indent=1) + "\n", mode=0o600)
            sync_folder(self.path.parent)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time."""
        with open(self.path.with_suffix(".lock"), "a", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read(self) -> dict[str, int]:
        try:
            used = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            used = None
        if not isinstance(used, dict) or not all(type(number) is int for number in used.values()):
            raise SecureError(f"secure: the ledger {self.path} is damaged: which tickets were used cannot be known")
        return used
