"""The table [plan] of a recipe: what stands at the activation sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepshare.train.errors import require

BUDGETED = ("uniform", "weights", "snl")  # the methods that have a budget


@dataclass(frozen=True)
class PlanRecipe:
    """What stands at the activation sites.

    method: "relu" (every site a ReLU), "uniform" (every site weighs its own size: one ratio of prototypes
        everywhere), "weights" (`weights`: relative DReLUs per site, in call order, scaled to the budget, or a label of
        a published list), "snl" (masks, learned by the phase of that name), "file" (the plan in the JSON file `file`),
        "stages" (every ReLU but those of the stages `culled`, and of the stages `thinned` every second one: DeepReDuce,
        DeepReShape; names as "S1", "conv1" for the stem)
    budget: DReLUs in total (with "uniform", "weights", "snl"); group: sites that share one leader's gates, or "auto"; 1
        is no layer sharing; affine: learn alpha and beta; affine_start: "uniform" draws those that are learned from
        U(-1, 1), by default they start at 1 and 0; gamma: sharpness of the soft gate Phi(gamma x); file: with "snl" the
        plan to start from (relu and linear sites), by default every ReLU
    counts_of: with "weights", in place of `weights`: the name of the recipe whose masks (DReLUs per site, same seed)
        are the weights; only `deepshare reproduce` runs that one first
    """

    method: Literal["relu", "uniform", "weights", "snl", "file", "stages"]
    budget: int | None = None
    group: int | Literal["auto"] = "auto"
    affine: bool = True
    affine_start: Literal["uniform"] | None = None
    gamma: float = 1.0
    weights: tuple[float, ...] | str | None = None
    file: str | None = None
    counts_of: str | None = None
    culled: tuple[str, ...] | None = None
    thinned: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require(
            (self.method in BUDGETED) == (self.budget is not None),
            f'plan.budget: wanted with every method but "relu", "file" and "stages" '
            f"(method is {self.method!r}, budget is {self.budget})",
        )
        require(
            self.method == "snl" or (self.method == "file") == (self.file is not None),
            f'plan.file: wanted with method "file", possible with "snl", and with no other (method is {self.method!r})',
        )
        require(self.budget is None or self.budget > 0, f"plan.budget: wanted at least 1, got {self.budget}")
        self._check_method()
        numbers = self.weights if isinstance(self.weights, tuple) else ()
        require(min(numbers, default=0) >= 0, "plan.weights: wanted no number below 0")
        require(self.group == "auto" or int(self.group) > 0, f"plan.group: wanted at least 1, got {self.group}")
        require(self.gamma > 0, f"plan.gamma: wanted above 0, got {self.gamma}")

    def _check_method(self) -> None:
        weighed = (self.weights is not None) + (self.counts_of is not None)
        require(
            weighed == (self.method == "weights"),
            f'plan.weights: wanted with method "weights" and no other, or else plan.counts_of (method is '
            f"{self.method!r}, weights are given in {weighed} ways)",
        )
        dropped = bool(self.culled or self.thinned)
        require(
            dropped == (self.method == "stages"),
            f'plan.culled, plan.thinned: one or both wanted with method "stages", with no other (method is '
            f"{self.method!r}, culled {list(self.culled or ())}, thinned {list(self.thinned or ())})",
        )
