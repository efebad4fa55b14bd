"""Beaver triples and random bits made before the input arrives, so that online and dealing time can be told apart.

The provider is CrypTen's TrustedFirstParty: party 0 makes every triple itself and so knows them all. It is a stand-in
for a dealer apart from both parties; costs are real, the secrecy of the values opened under these triples is not.
"""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any


class Material:
    """Records one inference's requests and makes the same material again before each further one.

    CrypTen's providers keep a request list and a cache for this; requests of equal shape are interchangeable and both
    parties take them in the same order.
    """

    def __init__(self, crypten: ModuleType, on_made: Callable[[], None]) -> None:
        self._provider = crypten.mpc.get_default_provider()
        self._on_made = on_made
        self._requests: dict[int, list[Any]] = {}

    def record(self, batch: int, inference: Callable[[], object]) -> None:
        """Runs `inference` on a batch of this size, with material made as it goes, and keeps its requests."""
        self._provider.tuple_cache = {}
        self._provider.request_cache = []
        self._provider.trace(True)
        inference()
        self._provider.trace(False)
        self._requests[batch] = self._provider.request_cache

    def deal(self, batch: int) -> float:
        """Makes the material of one inference on a batch of this size; returns the seconds it took."""
        start = time.perf_counter()
        self._provider.tuple_cache = {}  # what an aborted inference left is never used
        cache = self._provider.tuple_cache
        for name, args, kwargs in self._requests[batch]:
            key = (name, args, frozenset(kwargs.items()))
            cache.setdefault(key, []).append(getattr(self._provider.__class__, name)(self._provider, *args, **kwargs))
            self._on_made()
        return time.perf_counter() - start

    def assert_used_up(self) -> None:
        """Every dealt triple was used exactly once."""
        left = sum(len(kept) for kept in self._provider.tuple_cache.values())
        if left:
            raise AssertionError(f"{left} dealt tuples were not used")
