"""A table [[phase]] of a recipe, and the kinds of phases in the order in which they run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from deepshare.train.errors import require
from deepshare.train.schedule import Schedule

Kind = Literal["teacher", "pretrain", "baseline", "gelu", "switch", "masks", "finetune"]
ORDER: tuple[Kind, ...] = ("teacher", "pretrain", "baseline", "gelu", "switch", "masks", "finetune")


@dataclass(frozen=True)
class PhaseRecipe:
    """One phase of training.

    kind: "teacher" (GELU at every site), "pretrain" (the network with its ReLUs, before any is taken), "baseline" (the
        plan's hard network from scratch), "gelu" (its soft twin from scratch), "switch" (soft to hard gates, channel by
        channel), "masks" (SNL's Algorithm 1: Adam on weights and masks, `epochs` at most), "finetune" (hard gates)
    distill: whose soft labels: "none", "teacher", "pretrain", or "gelu" (this run's network as that phase left it)
    keep: which epoch's weights go on: "best" on the validation split, or "last" (always so for "switch" and "masks")
    hold: the last epochs of "switch", in which no channel is left to switch
    start: of "masks", from the network of "pretrain" or from "fresh" weights (SNL appendix B.2)
    decay_affine: whether weight decay pulls on alpha, beta and learned masks too
    milestones, factor: of schedule "step": after each of these epochs lr is multiplied by factor
    """

    kind: Kind
    epochs: int
    batch_size: int
    lr: float
    distill: Literal["none", "teacher", "pretrain", "gelu"]
    lr_end: float | None = None
    schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    milestones: tuple[int, ...] | None = None
    factor: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay_affine: bool = False
    keep: Literal["best", "last"] = "best"
    hold: int = 0
    start: Literal["pretrain", "fresh"] | None = None

    def __post_init__(self) -> None:
        require(self.epochs > 0, f"phase.{self.kind}.epochs: wanted at least 1, got {self.epochs}")
        require(self.batch_size > 1, f"phase.{self.kind}.batch_size: wanted at least 2, got {self.batch_size}")
        for name in ("lr", "lr_end", "weight_decay"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < math.inf,
                f"phase.{self.kind}.{name}: wanted at least 0 and finite, got {value}",
            )
        require(0 <= self.momentum < 1, f"phase.{self.kind}.momentum: wanted 0 <= m < 1, got {self.momentum}")
        require(
            (self.schedule in ("constant", "step")) == (self.lr_end is None),
            f'phase.{self.kind}.lr_end: wanted with schedule "linear" or "cosine" and no other '
            f"(schedule is {self.schedule!r}, lr_end is {self.lr_end})",
        )
        most = self.epochs - 1 if self.kind == "switch" else 0
        require(0 <= self.hold <= most, f"phase.{self.kind}.hold: wanted 0 to {most}, got {self.hold}")
        self._check_steps()
        require(
            self.start is None or self.kind == "masks",
            f"phase.{self.kind}.start: wanted in phase masks alone, got {self.start!r}",
        )
        if self.kind == "masks" and self.start is None:
            object.__setattr__(self, "start", "pretrain")

    def _check_steps(self) -> None:
        for name in ("milestones", "factor"):
            value = getattr(self, name)
            require(
                (self.schedule == "step") == (value is not None),
                f'phase.{self.kind}.{name}: wanted with schedule "step" and no other '
                f"(schedule is {self.schedule!r}, {name} is {value})",
            )
        require(
            self.factor is None or 0 <= self.factor <= 1, f"phase.{self.kind}.factor: wanted 0 to 1, got {self.factor}"
        )
        epochs = self.milestones or ()
        require(
            all(one < other for one, other in pairwise((0, *epochs))),
            f"phase.{self.kind}.milestones: wanted rising epochs from 1 on, got {list(epochs)}",
        )

    @property
    def learning_rate(self) -> Schedule:
        end = self.lr if self.lr_end is None else self.lr_end
        return Schedule(self.schedule, self.epochs, self.lr, end, self.milestones or (), self.factor or 0.0)

    @property
    def keeps_best(self) -> bool:
        """Never in switch and masks: an early epoch is better because more of its gates are soft, or left."""
        return self.keep == "best" and self.kind not in ("switch", "masks")
