"""Which of several processes still live: each one counts in a common store, and whose count stands still is gone."""

import threading
import time
from types import TracebackType

from torch.distributed import DistError, Store

BEAT = 0.5  # seconds between two beats
SILENCE = 3.0  # seconds without one after which a rank counts as gone; a starved thread may miss a few


class Heartbeat:
    """Beats for `rank` of `world` in `store` while it is entered; a thread does it, so that waiting ranks beat too."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deepshare-heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._beat(0)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def gone(self) -> list[int]:
        """The ranks that do not beat, after waiting for SILENCE.

        What the first rank finds is what all say: a rank that ends because of another one stops beating itself. The
        store lives with rank 0 (or with torchrun): where it does not answer, that is who is gone.
        """
        try:
            before = self._counts()
            time.sleep(SILENCE)
            silent = [rank for rank, count in enumerate(self._counts()) if count == before[rank] and rank != self.rank]
            if not silent:
                return []
            found = self.store.compare_set("gone", "", ",".join(map(str, silent)))
            time.sleep(2 * BEAT if self.rank == 0 else 0)  # the store may end with rank 0: the others read it first
        except DistError:
            return [0]
        return [int(rank) for rank in found.decode().split(",")]

    def _counts(self) -> list[bytes]:
        return [self.store.get(f"beat/{rank}") for rank in range(self.world)]

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(BEAT):
            count += 1
            try:
                self._beat(count)
            except DistError:
                return  # the store's process is gone; who waits for it is told by the collective

    def _beat(self, count: int) -> None:
        self.store.set(f"beat/{self.rank}", str(count))
