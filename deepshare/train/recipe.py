"""A recipe: everything that decides a training run, as a value (docs/training.md explains every key)."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deepshare.data import Augment
from deepshare.models import MAX_WIDTH
from deepshare.train.errors import RecipeError
from deepshare.train.fields import build, plain
from deepshare.train.overrides import apply_overrides
from deepshare.train.schedule import Schedule
from deepshare.train.toml_out import to_toml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
Kind = Literal["teacher", "baseline", "gelu", "switch", "finetune"]
MAX_SEED = 2**63 - 1  # what torch.Generator and TOML both hold
ORDER: tuple[Kind, ...] = ("teacher", "baseline", "gelu", "switch", "finetune")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RecipeError(message)


@dataclass(frozen=True)
class DataRecipe:
    """Which images: deepshare.data.load's arguments, and what is done to a training batch."""

    name: Literal["digits", "cifar10", "cifar100"]
    val_fraction: float = 0.1
    split_seed: int = 0
    limit: int | None = None
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        _require(0 <= self.val_fraction < 1, f"data.val_fraction: wanted 0 <= v < 1, got {self.val_fraction}")
        _require(0 <= self.split_seed <= MAX_SEED, f"data.split_seed: wanted 0 to 2^63 - 1, got {self.split_seed}")
        _require(self.limit is None or self.limit > 1, f"data.limit: wanted at least 2, got {self.limit}")


@dataclass(frozen=True)
class ModelRecipe:
    """deepshare.models.create's arguments."""

    name: str
    width: int = 64
    stem_relu: bool = False

    def __post_init__(self) -> None:
        _require(0 < self.width <= MAX_WIDTH, f"model.width: wanted 1 to {MAX_WIDTH}, got {self.width}")


@dataclass(frozen=True)
class PlanRecipe:
    """What stands at the activation sites.

    method: "relu" (every site a ReLU), "uniform" (every site weighs its own size: one ratio of prototypes
        everywhere), "weights" (`weights`: relative DReLUs per site, in call order, scaled to the budget)
    budget: DReLUs in total (not for "relu"); group: sites that share one leader's gates, or "auto"; 1 is no layer
        sharing; affine: learn alpha and beta; gamma: sharpness of the soft gate Phi(gamma x)
    """

    method: Literal["relu", "uniform", "weights"]
    budget: int | None = None
    group: int | Literal["auto"] = "auto"
    affine: bool = True
    gamma: float = 1.0
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        shares = self.method != "relu"
        _require(
            shares == (self.budget is not None),
            f'plan.budget: wanted with every method but "relu" (method is {self.method!r}, budget is {self.budget})',
        )
        _require(self.budget is None or self.budget > 0, f"plan.budget: wanted at least 1, got {self.budget}")
        _require(
            (self.method == "weights") == (self.weights is not None),
            f'plan.weights: wanted with method "weights" and no other (method is {self.method!r})',
        )
        _require(self.weights is None or min(self.weights, default=0) >= 0, "plan.weights: wanted no number below 0")
        _require(self.group == "auto" or int(self.group) > 0, f"plan.group: wanted at least 1, got {self.group}")
        _require(self.gamma > 0, f"plan.gamma: wanted above 0, got {self.gamma}")


@dataclass(frozen=True)
class DistillRecipe:
    """loss = (1 - weight) * CE(labels) + weight * temperature^2 * KL(teacher || student), both at `temperature`."""

    temperature: float = 4.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        _require(self.temperature > 0, f"distill.temperature: wanted above 0, got {self.temperature}")
        _require(0 <= self.weight <= 1, f"distill.weight: wanted 0 <= w <= 1, got {self.weight}")


@dataclass(frozen=True)
class PhaseRecipe:
    """One phase of training.

    kind: "teacher" (GELU at every site), "baseline" (the plan's hard network from scratch), "gelu" (its soft twin
        from scratch), "switch" (soft to hard gates, channel by channel), "finetune" (hard gates)
    distill: whose soft labels: "none", "teacher", or "gelu" (this run's network as the gelu phase left it)
    keep: which epoch's weights go on: "best" on the validation split, or "last" (always so for "switch")
    hold: the last epochs of "switch", in which no channel is left to switch
    decay_affine: whether weight decay pulls on alpha and beta too
    """

    kind: Kind
    epochs: int
    batch_size: int
    lr: float
    distill: Literal["none", "teacher", "gelu"]
    lr_end: float | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay_affine: bool = False
    keep: Literal["best", "last"] = "best"
    hold: int = 0

    def __post_init__(self) -> None:
        _require(self.epochs > 0, f"phase.{self.kind}.epochs: wanted at least 1, got {self.epochs}")
        _require(self.batch_size > 1, f"phase.{self.kind}.batch_size: wanted at least 2, got {self.batch_size}")
        for name in ("lr", "lr_end", "weight_decay"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value < math.inf,
                f"phase.{self.kind}.{name}: wanted at least 0 and finite, got {value}",
            )
        _require(0 <= self.momentum < 1, f"phase.{self.kind}.momentum: wanted 0 <= m < 1, got {self.momentum}")
        _require(
            (self.schedule == "constant") == (self.lr_end is None),
            f'phase.{self.kind}.lr_end: wanted with schedule "linear" or "cosine" and no other '
            f"(schedule is {self.schedule!r}, lr_end is {self.lr_end})",
        )
        most = self.epochs - 1 if self.kind == "switch" else 0
        _require(0 <= self.hold <= most, f"phase.{self.kind}.hold: wanted 0 to {most}, got {self.hold}")

    @property
    def learning_rate(self) -> Schedule:
        return Schedule(self.schedule, self.epochs, self.lr, self.lr if self.lr_end is None else self.lr_end)

    @property
    def keeps_best(self) -> bool:
        """Never in the switch: an early epoch has better gates because it has more soft ones."""
        return self.keep == "best" and self.kind != "switch"


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

    def __post_init__(self) -> None:
        lone = any("\ud800" <= letter <= "\udfff" for letter in self.name)  # what Python makes of bytes in arguments
        _require(not lone, f"name: wanted text that UTF-8 can hold, got {self.name!r}")
        self._check_order()
        self._check_distillation()
        best = [phase.kind for phase in self.phase if phase.keeps_best]
        _require(
            self.data.val_fraction > 0 or not best,
            f'phase.{best[0] if best else ""}.keep: "best" needs a validation split; data.val_fraction is 0',
        )

    def _check_order(self) -> None:
        kinds = [phase.kind for phase in self.phase]
        ordered = sorted(set(kinds), key=ORDER.index)
        _require(bool(kinds), "phase: wanted at least one")
        _require(
            kinds == ordered,
            f"phase: wanted each kind once at most, in the order {', '.join(ORDER)}; got {', '.join(kinds)}",
        )
        _require(
            "baseline" not in kinds or "gelu" not in kinds,
            "phase: baseline and gelu both begin from scratch; wanted one of them",
        )
        _require(("gelu" in kinds) == ("switch" in kinds), "phase: wanted gelu and switch, or neither")
        _require(
            "finetune" not in kinds or kinds[-2:-1] not in ([], ["teacher"]),
            "phase: finetune goes on from switch or baseline, which is missing",
        )
        _require(
            self.plan.method != "relu" or "gelu" not in kinds,
            'phase: gelu softens shared gates; plan.method "relu" has none',
        )

    def _check_distillation(self) -> None:
        kinds = [phase.kind for phase in self.phase]
        for phase in self.phase:
            key = f"phase.{phase.kind}.distill"
            after_gelu = "gelu" in kinds and phase.kind in ("switch", "finetune")
            _require(phase.distill != "gelu" or after_gelu, f"{key}: there is no gelu phase before it")
            _require(phase.kind != "teacher" or phase.distill == "none", f'{key}: wanted "none"')

    @property
    def needs_teacher(self) -> bool:
        return any(phase.distill == "teacher" for phase in self.phase)

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
    path = _find(path_or_name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return build(Recipe, apply_overrides(values, overrides))
    except (OSError, ValueError, RecipeError) as error:  # ValueError: not UTF-8, or not TOML
        raise RecipeError(f"{path}: {error}") from error


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


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


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    packaged = RECIPES / f"{path_or_name}.toml"
    if path.suffix != ".toml" and packaged.is_file():
        return packaged
    raise RecipeError(f"{path_or_name}: no such file and no such recipe; there are {', '.join(recipe_names())}")
