"""Which tickets a party has used, and which weights a version's masks hide: beside its keys.

It stands with the keys and not with the tickets, so that copying a folder of tickets back from where it came brings no
used number back. The entry is on the disk before the ticket's first use, and numbers only rise.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepshare.files import write_whole
from deepshare.secure.errors import SecureError
from deepshare.secure.net.folders import sync_folder


class Ledger:
    """`ledger.json` in the folder of a party's keys: {version: last number used}; at the server `weights.json` too.

    `weights.json` is {version: what tells its weights from others}.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.json"
        self.weights = folder / "weights.json"

    def last(self, version: str) -> int:
        """The last number of `version` that was used; 0 for none. Raises SecureError for a damaged file."""
        return _read(self.path, int, "which tickets were used cannot be known").get(version, 0)

    def use(self, version: str, number: int) -> None:
        """Writes `number` down as used.

        Raises:
            SecureError: it, or a later one, was used before.
        """
        with self.locked():
            used = _read(self.path, int, "which tickets were used cannot be known")
            if number <= used.get(version, 0):
                raise SecureError(
                    f"secure: ticket {number} of version {version[:8]} was used before "
                    f"(the ledger {self.path} stands at {used[version]})"
                )
            write_whole(self.path, json.dumps({**used, version: number}, indent=1) + "\n", mode=0o600)
            sync_folder(self.path.parent)

    def claim(self, version: str, weights: str) -> None:
        """Writes down that the masks of `version` hide these weights, before anything masked is given away.

        One mask on two models' weights W and W' would tell a client that has both F = W - B and F' = W' - B the
        difference W - W'.

        Raises:
            SecureError: they hide others.
        """
        with self.locked():
            claimed = _read(self.weights, str, "which weights are masked cannot be known")
            if claimed.setdefault(version, weights) != weights:
                raise SecureError(
                    f"secure: the weight masks of version {version[:8]} were used for another model, and another under "
                    f"the same masks would give the difference away: deal again ({self.weights} has it)"
                )
            write_whole(self.weights, json.dumps(claimed, indent=1) + "\n", mode=0o600)
            sync_folder(self.weights.parent)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time."""
        with open(self.path.with_suffix(".lock"), "a", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _read(path: Path, kind: type, otherwise: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(type(value) is kind for value in found.values()):
        raise SecureError(f"secure: the ledger {path} is damaged: {otherwise}")
    return found
