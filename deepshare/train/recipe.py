"""A recipe: everything that decides a training run, as a value (docs/training.md explains every key)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from deepshare.methods.snl import SNLSettings
from deepshare.train.compute import ComputeRecipe
from deepshare.train.errors import require
from deepshare.train.fields import plain
from deepshare.train.phase_recipe import ORDER, Kind, PhaseRecipe
from deepshare.train.plan_recipe import PlanRecipe
from deepshare.train.recipe_parts import DataRecipe, DistillRecipe, ModelRecipe, PublishedRow
from deepshare.train.toml_out import to_toml

MAX_NAME = 200  # bytes, of the 255 that a file's name may have; temporary ones have something around it
NOT_IN_NAMES = "/*?[]"  # leads elsewhere, or means something in the patterns by which results are found


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
    published: PublishedRow | None = None
    teacher: ModelRecipe | None = None  # of the phase teacher or pretrain, where it is another model

    def __post_init__(self) -> None:
        check_name(self.name)
        self._check_order()
        self._check_snl()
        self._check_distillation()
        self._check_teacher()
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

    def _check_teacher(self) -> None:
        masks = self.phase_of("masks")
        require(
            self.teacher is None or self.needs is not None,
            "teacher: wanted where phases learn from teacher or pretrain alone",
        )
        require(
            self.teacher is None or masks is None or masks.start == "fresh",
            f"teacher: masks start from pretrain, which must be of this model; {self.teacher} is another",
        )

    def _needed(self) -> set[str]:
        distilled = {phase.distill for phase in self.phase} & {"teacher", "pretrain"}
        return distilled | {"pretrain" for phase in self.phase if phase.start == "pretrain"}

    @property
    def needs(self) -> Literal["teacher", "pretrain"] | None:
        """The phase whose network others distil from or start from: a checkpoint may take its place."""
        needed = self._needed()
        return "teacher" if "teacher" in needed else "pretrain" if needed else None

    def model_of(self, kind: str) -> ModelRecipe:
        """The model that the phase of this kind trains."""
        return self.teacher if self.teacher is not None and kind in ("teacher", "pretrain") else self.model

    def phase_of(self, kind: Kind) -> PhaseRecipe | None:
        """The phase of this kind, None if the recipe has none."""
        return next((phase for phase in self.phase if phase.kind == kind), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every key resolved: what goes into checkpoints."""
        return dict(plain(self))

    def to_toml(self) -> str:
        """TOML that load_recipe reads back to an equal recipe."""
        return to_toml(self.to_dict())


def check_name(name: str) -> None:
    """Whether runs and results can lie in a folder of this name and be found there. Raises RecipeError."""
    lone = any("\ud800" <= letter <= "\udfff" for letter in name)  # what Python makes of bytes in arguments
    require(not lone, f"name: wanted text that UTF-8 can hold, got {name!r}")
    strange = any(letter in NOT_IN_NAMES or unicodedata.category(letter) == "Cc" for letter in name)
    require(
        0 < len(name.encode()) <= MAX_NAME and name not in (".", "..") and not strange,
        f"name: wanted that of a folder, of 1 to {MAX_NAME} bytes, no control character, none of {NOT_IN_NAMES}, "
        f"got {name!r:.80}",
    )


def with_weights(recipe: Recipe, weights: Sequence[float]) -> Recipe:
    """The recipe with `weights`, relative DReLUs per site in call order, in the place of plan.counts_of."""
    plan = replace(recipe.plan, weights=tuple(map(float, weights)), counts_of=None)
    return replace(recipe, plan=plan)


def first_difference(one: Recipe, other: Recipe) -> str | None:
    """The first key that decides the run and differs, with both values; None if there is none."""
    ours, theirs = (_flat(replace(recipe, published=None).to_dict()) for recipe in (one, other))
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
