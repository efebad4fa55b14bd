"""What changes from epoch to epoch: the learning rate, and how many channels still have soft gates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LINEAR_END = 0.75  # DeepShare Table 7: a linear schedule reaches its end at 75 % of the phase's epochs, then stays


@dataclass(frozen=True)
class Schedule:
    """A learning rate per epoch, from `start` to `end`: the two ends of Table 7's column "LR (start -> end)"."""

    kind: Literal["constant", "linear", "cosine", "step"]
    epochs: int
    start: float
    end: float
    milestones: tuple[int, ...] = ()  # of "step"
    factor: float = 0.0

    def at(self, epoch: int) -> float:
        """The rate in `epoch`, 0 .. epochs - 1.

        linear: reaches `end` at LINEAR_END * epochs; cosine: reaches it in the last epoch; step: `start`, times
        `factor` for each of the `milestones` that is done (SNL's pretraining: 0.1 after epochs 80 and 120).
        """
        if self.kind == "constant":
            return self.start
        if self.kind == "step":
            return self.start * self.factor ** sum(epoch >= milestone for milestone in self.milestones)
        if self.kind == "linear":
            way = min(1.0, epoch / (LINEAR_END * self.epochs))
        else:
            way = (1 - math.cos(math.pi * epoch / max(self.epochs - 1, 1))) / 2
        return (1 - way) * self.start + way * self.end  # in this form both ends are exact


def soft_channels_at(epoch: int, switching: int, channels: int) -> int:
    """Channels of a site that still have soft gates in `epoch` of the switch (DeepShare Alg. 1, appendix B).

    The same share of every site's channels turns hard before each of the `switching` epochs, the last channel
    first; in epoch switching - 1 and after it none is soft.
    """
    return channels * max(switching - 1 - epoch, 0) // switching
