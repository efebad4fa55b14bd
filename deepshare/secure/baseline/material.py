"""Beaver triples and random bits made before the input arrives, so that online and dealing time can be told apart.

TFP, CrypTen's TrustedFirstParty: party 0 makes every triple itself and so knows them all. It is a stand-in for a dealer
apart from both parties; costs are real, the secrecy of the values opened under these triples is not.
TTP, its TrustedThirdParty: a third process makes them. Each party draws its shares from a seed it has in common with
the dealer; of each product, bit or AND, party 0 is sent its share, 8 bytes an element.
"""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from deepshare.secure.baseline.costs import WORD


class Material:
    """Records one inference's requests and makes the same material again before each further one.

    CrypTen's providers keep a request list and a cache for this; requests of equal shape are interchangeable and both
    parties take them in the same order.
    """

    def __init__(self, crypten: ModuleType, on_made: Callable[[], None]) -> None:
        self._provider = crypten.mpc.get_default_provider()
        self._on_made = on_made
        self._requests: dict[int, list[Any]] = {}
        self._received = 0
        if self._provider.NAME == "TTP":
            self._count(crypten.mpc.provider.ttp_provider.TTPClient.get())

    def record(self, batch: int, inference: Callable[[], object]) -> None:
        """Runs `inference` on a batch of this size, with material made as it goes, and keeps its requests."""
        self._provider.tuple_cache = {}
        self._provider.request_cache = []
        self._provider.trace(True)
        inference()
        self._provider.trace(False)
        self._requests[batch] = self._provider.request_cache

    def _count(self, client: Any) -> None:
        """Counts the words the dealer sends: CrypTen's counters add the Python sizes of the request objects to them."""
        request = type(client).ttp_request.__get__(client)

        def counted(*arguments: Any, **settings: Any) -> Any:
            correction = request(*arguments, **settings)
            self._received += correction.numel()
            return correction

        client.ttp_request = counted

    def deal(self, batch: int) -> tuple[float, int]:
        """Makes the material of one inference on such a batch: (seconds it took, bytes the dealer sent this party)."""
        start, received = time.perf_counter(), self._received
        self._provider.tuple_cache = {}  # what an aborted inference left is never used
        cache = self._provider.tuple_cache
        for name, args, kwargs in self._requests[batch]:
            key = (name, args, frozenset(kwargs.items()))
            cache.setdefault(key, []).append(getattr(self._provider.__class__, name)(self._provider, *args, **kwargs))
            self._on_made()
        return time.perf_counter() - start, WORD * (self._received - received)

    def assert_used_up(self) -> None:
        """Every dealt triple was used exactly once."""
        left = sum(len(kept) for kept in self._provider.tuple_cache.values())
        if left:
            raise AssertionError(f"{left} dealt tuples were not used")
