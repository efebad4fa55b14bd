"""A recipe: everything that decides a training run, as a value (docs/training.md explains every key)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from deepshare import data, models
from deepshare.budget import weights_of
from deepshare.data import Augment, Dataset
from deepshare.methods.snl import SNLSettings
from deepshare.plan import Plan, PlanError
from deepshare.train.compute import ComputeRecipe
from deepshare.train.errors import RecipeError, require
from deepshare.train.fields import build, plain
from deepshare.train.overrides import apply_overrides
from deepshare.train.schedule import Schedule
from deepshare.train.toml_in import find_toml, read_toml, toml_names
from deepshare.train.toml_out import to_toml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
Kind = Literal["teacher", "pretrain", "baseline", "gelu", "switch", "masks", "finetune"]
MAX_SEED = 2**63 - 1  # what torch.Generator and TOML both hold
ORDER: tuple[Kind, ...] = ("teacher", "pretrain", "baseline", "gelu", "switch", "masks", "finetune")


@dataclass(frozen=True)
class DataRecipe:
    """Which images: deepshare.data.load's arguments (`load`), and what is done to a training batch."""

    name: Literal["digits", "cifar10", "cifar100"]
    val_fraction: float = 0.1
    split_seed: int = 0
    limit: int | None = None
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        require(0 <= self.val_fraction < 1, f"data.val_fraction: wanted 0 <= v < 1, got {self.val_fraction}")
        require(0 <= self.split_seed <= MAX_SEED, f"data.split_seed: wanted 0 to 2^63 - 1, got {self.split_seed}")
        require(self.limit is None or self.limit > 1, f"data.limit: wanted at least 2, got {self.limit}")

    def load(self, root: str | Path | None) -> Dataset:
        """The images; `root` is the folder of the official files. Raises DataError."""
        return data.load(self.name, root, val_fraction=self.val_fraction, seed=self.split_seed, limit=self.limit)


@dataclass(frozen=True)
class ReuseRecipe:
    """ReLU-reuse in some convolutions (docs/deepreshape.md): their module paths, N, the form of the groups."""

    layers: tuple[str, ...]
    factor: int
    form: Literal["three", "naive"] = "three"
    shortcuts: bool = True


@dataclass(frozen=True)
class ModelRecipe:
    """deepshare.models.create's arguments; width as published by default, so are the last four."""

    name: str
    width: int | None = None
    stem_relu: bool = False
    multipliers: tuple[int, ...] | None = None
    blocks: tuple[int, ...] | None = None
    rho: float | None = None
    reuse: ReuseRecipe | None = None

    def __post_init__(self) -> None:
        if self.width is None and models.is_name(self.name):
            object.__setattr__(self, "width", models.default_width(self.name))
        fits = self.width is None or 0 < self.width <= models.MAX_WIDTH
        require(fits, f"model.width: wanted 1 to {models.MAX_WIDTH}, got {self.width}")


@dataclass(frozen=True)
class PlanRecipe:
    """What stands at the activation sites.

    method: "relu" (every site a ReLU), "uniform" (every site weighs its own size: one ratio of prototypes
        everywhere), "weights" (`weights`: relative DReLUs per site, in call order, scaled to the budget, or a label of
        a published list), "snl" (masks, learned by the phase of that name), "file" (the plan in the JSON file `file`)
    budget: DReLUs in total (not for "relu" and "file"); group: sites that share one leader's gates, or "auto"; 1 is no
        layer sharing; affine: learn alpha and beta; gamma: sharpness of the soft gate Phi(gamma x); file: with "snl"
        the plan to start from (relu and linear sites), by default every ReLU
    """

    method: Literal["relu", "uniform", "weights", "snl", "file"]
    budget: int | None = None
    group: int | Literal["auto"] = "auto"
    affine: bool = True
    gamma: float = 1.0
    weights: tuple[float, ...] | str | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        require(
            (self.method not in ("relu", "file")) == (self.budget is not None),
            f'plan.budget: wanted with every method but "relu" and "file" '
            f"(method is {self.method!r}, budget is {self.budget})",
        )
        require(
            self.method == "snl" or (self.method == "file") == (self.file is not None),
            f'plan.file: wanted with method "file", possible with "snl", and with no other (method is {self.method!r})',
        )
        require(self.budget is None or self.budget > 0, f"plan.budget: wanted at least 1, got {self.budget}")
        require(
            (self.method == "weights") == (self.weights is not None),
            f'plan.weights: wanted with method "weights" and no other (method is {self.method!r})',
        )
        numbers = self.weights if isinstance(self.weights, tuple) else ()
        require(min(numbers, default=0) >= 0, "plan.weights: wanted no number below 0")
        require(self.group == "auto" or int(self.group) > 0, f"plan.group: wanted at least 1, got {self.group}")
        require(self.gamma > 0, f"plan.gamma: wanted above 0, got {self.gamma}")


@dataclass(frozen=True)
class DistillRecipe:
    """loss = (1 - weight) * CE(labels) + weight * temperature^2 * D(teacher || student), both at `temperature`.

    method: D is "kd", Hinton's KL, or "dkd", alpha * TCKD + beta * NCKD (deepshare.train.task)
    """

    temperature: float = 4.0
    weight: float = 0.5
    method: Literal["kd", "dkd"] = "kd"
    alpha: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        for name, value, default in (("alpha", self.alpha, 1.0), ("beta", self.beta, 8.0)):
            fits = self.method == "dkd" or value is None
            require(fits, f'distill.{name}: wanted with method "dkd" alone, got {value}')
            require(value is None or value >= 0, f"distill.{name}: wanted at least 0, got {value}")
            if self.method == "dkd" and value is None:
                object.__setattr__(self, name, default)
        require(self.temperature > 0, f"distill.temperature: wanted above 0, got {self.temperature}")
        require(0 <= self.weight <= 1, f"distill.weight: wanted 0 <= w <= 1, got {self.weight}")


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


@dataclass(frozen=True)
class Recipe:
    """A training run. Two runs of equal recipes on one machine's CPU end in the same weights, bit for bit."""

    name: str
    data: DataRecipe
    model: ModelRecipe
    plan: PlanRecipe
    phase: tuple[PhaseRecipe, ...]
    seed: int = 0
    distill: DistillRecipe = field(default_factory=DistillRecipe)
    snl: SNLSettings | None = None  # of method "snl", where its defaults are the paper's
    compute: ComputeRecipe = field(default_factory=ComputeRecipe)

    def __post_init__(self) -> None:
        lone = any("\ud800" <= letter <= "\udfff" for letter in self.name)  # what Python makes of bytes in arguments
        require(not lone, f"name: wanted text that UTF-8 can hold, got {self.name!r}")
        self._check_order()
        self._check_snl()
        self._check_distillation()
        best = [phase.kind for phase in self.phase if phase.keeps_best]
        require(
            self.data.val_fraction > 0 or not best,
            f'phase.{best[0] if best else ""}.keep: "best" needs a validation split; data.val_fraction is 0',
        )

    def _check_order(self) -> None:
        kinds = [phase.kind for phase in self.phase]
        ordered = sorted(set(kinds), key=ORDER.index)
        require(bool(kinds), "phase: wanted at least one")
        require(
            kinds == ordered,
            f"phase: wanted each kind once at most, in the order {', '.join(ORDER)}; got {', '.join(kinds)}",
        )
        scratch = [kind for kind in kinds if kind in ("baseline", "gelu", "masks")]
        require(len(scratch) < 2, f"phase: {' and '.join(scratch)} are ways to one network; wanted one of them")
        require(
            "teacher" not in kinds or "pretrain" not in kinds,
            "phase: teacher and pretrain are both what others learn from; wanted one of them",
        )
        require(("gelu" in kinds) == ("switch" in kinds), "phase: wanted gelu and switch, or neither")
        require(
            "finetune" not in kinds or kinds[-2:-1] not in ([], ["teacher"], ["pretrain"]),
            "phase: finetune goes on from switch, baseline or masks, which is missing",
        )
        require(
            self.plan.method != "relu" or "gelu" not in kinds,
            'phase: gelu softens shared gates; plan.method "relu" has none',
        )

    def _check_snl(self) -> None:
        kinds, learns = [phase.kind for phase in self.phase], self.plan.method == "snl"
        require(
            learns == ("masks" in kinds),
            f'phase: wanted masks with plan.method "snl" and no other (method is {self.plan.method!r})',
        )
        require(learns or self.snl is None, f'snl: wanted with plan.method "snl" alone, it is {self.plan.method!r}')
        if learns and self.snl is None:
            object.__setattr__(self, "snl", SNLSettings())

    def _check_distillation(self) -> None:
        kinds = [phase.kind for phase in self.phase]
        for phase in self.phase:
            key = f"phase.{phase.kind}.distill"
            after_gelu = "gelu" in kinds and phase.kind in ("switch", "finetune")
            require(phase.distill != "gelu" or after_gelu, f"{key}: there is no gelu phase before it")
            require(phase.kind not in ("teacher", "pretrain") or phase.distill == "none", f'{key}: wanted "none"')
        needed = self._needed()
        require(
            len(needed | (set(kinds) & {"teacher", "pretrain"})) < 2,
            "phase: some need a teacher phase, others a pretrain phase; wanted one of them",
        )

    def _needed(self) -> set[str]:
        distilled = {phase.distill for phase in self.phase} & {"teacher", "pretrain"}
        return distilled | {"pretrain" for phase in self.phase if phase.start == "pretrain"}

    @property
    def needs(self) -> Literal["teacher", "pretrain"] | None:
        """The phase whose network others distil from or start from: a checkpoint may take its place."""
        needed = self._needed()
        return "teacher" if "teacher" in needed else "pretrain" if needed else None

    def phase_of(self, kind: Kind) -> PhaseRecipe | None:
        """The phase of this kind, None if the recipe has none."""
        return next((phase for phase in self.phase if phase.kind == kind), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every key resolved: what goes into checkpoints."""
        return dict(plain(self))

    def to_toml(self) -> str:
        """TOML that load_recipe reads back to an equal recipe."""
        return to_toml(self.to_dict())


def load_recipe(path_or_name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in the file `path_or_name`, or the one of that name that comes with the package.

    overrides: `key=value` strings, see deepshare.train.overrides.
    Raises RecipeError naming file, key, what was wanted and what came.
    """
    path = find_toml(path_or_name, RECIPES, "recipe")
    try:
        return build(Recipe, _with_weights(apply_overrides(read_toml(path), overrides)))
    except (OSError, ValueError, RecipeError) as error:  # ValueError: not UTF-8, or not TOML
        raise RecipeError(f"{path}: {error}") from error


def _with_weights(values: dict[str, Any]) -> dict[str, Any]:
    """plan.weights_from, a plan's file, becomes plan.weights, its DReLUs per site, in the place of others: the recipe
    holds what decides."""
    plan = values.get("plan")
    if not isinstance(plan, dict) or "weights_from" not in plan:
        return values
    file = plan["weights_from"]
    require(isinstance(file, str), f"plan.weights_from: wanted the path of a plan.json, got {file!r:.80}")
    try:
        weights = list(weights_of(Plan.load(file)).values())
    except (OSError, PlanError) as error:
        raise RecipeError(f"plan.weights_from: {error}") from error
    kept = {key: value for key, value in plan.items() if key != "weights_from"}
    return {**values, "plan": {**kept, "weights": weights}}


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return toml_names(RECIPES)


def first_difference(one: Recipe, other: Recipe) -> str | None:
    """The first key in which two recipes differ, with both values; None if they are equal."""
    ours, theirs = _flat(one.to_dict()), _flat(other.to_dict())
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            return f"{key} ({ours.get(key)!r} against {theirs.get(key)!r})"
    return None


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        pairs = [(f"{key}.{name}" if key else name, item) for name, item in values.items()]
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        pairs = [(f"{key}.{item.get('kind', index)}", item) for index, item in enumerate(values)]
    else:
        return {key: values}
    return {flat: value for name, item in pairs for flat, value in _flat(item, name).items()}
