"""A run in slices: how many minutes a call may take, and whether another epoch fits into them."""

import math
import time

from deepshare.train.errors import TrainingError


class Allowance:
    """The time of one call of `train`, from now on; without `minutes` there is no end to it.

    trained: epochs so far. Every call trains one at least, however long it takes, so that calls come to an end.
    """

    def __init__(self, minutes: float | None) -> None:
        if minutes is not None and not 0 < minutes < math.inf:
            raise TrainingError(f"max_minutes: wanted above 0 and finite, got {minutes}")
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._began = self._took = 0.0
        self.trained = 0

    def begin_epoch(self) -> None:
        self._began = time.monotonic()

    def end_epoch(self) -> None:
        self._took = time.monotonic() - self._began
        self.trained += 1

    @property
    def fits_another(self) -> bool:
        """Whether an epoch as long as the last one would end in time."""
        return self.trained == 0 or time.monotonic() + self._took <= self._end

    @property
    def ends(self) -> bool:
        return self._end < math.inf

    @property
    def over(self) -> bool:
        return time.monotonic() > self._end
