"""A party's process cannot import the dealer: whoever holds both keys of a ticket could read what the parties send."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

from deepshare.secure.errors import SecureError

DEALER = "deepshare.secure.dealer"


class _NoDealer(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if _is_dealer(name):
            raise ImportError(f"{name}: a party's process must not import the dealer", name=name)


def forbid_dealer() -> None:
    """From now on importing the dealer raises ImportError in this process.

    Raises:
        SecureError: it has been imported already.
    """
    loaded = sorted(name for name in sys.modules if _is_dealer(name))
    if loaded:
        raise SecureError(f"secure: a party's process must not have the dealer (imported: {loaded[0]})")
    if not any(isinstance(finder, _NoDealer) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NoDealer())


def _is_dealer(name: str) -> bool:
    return name == DEALER or name.startswith(DEALER + ".")
