"""A comparison: which methods, budgets and seeds, and what all their networks share (docs/compare.md has every key)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepshare.methods.snl import SNLSettings
from deepshare.train.errors import RecipeError, require
from deepshare.train.fields import build
from deepshare.train.overrides import apply_overrides
from deepshare.train.phase_recipe import PhaseRecipe
from deepshare.train.recipe import check_name
from deepshare.train.recipe_file import RECIPES
from deepshare.train.recipe_parts import MAX_SEED, DataRecipe, DistillRecipe, ModelRecipe
from deepshare.train.toml_in import find_toml, read_toml, toml_names

COMPARISONS = RECIPES / "compare"
MethodKind = Literal["snl", "deepreduce", "deepreshape", "deepshare"]


ALL_RELU = "all-ReLU"
OWN = frozenset({ALL_RELU, "plans", "compare.json", "results.json", "report.md", "pareto.png"})  # beside the methods'
MAX_NAME = 60  # characters: four bytes each still make a file's name
MAX_THREADS = 1024


class CompareError(ValueError):
    """A comparison that cannot be made; the message names the key, what was wanted and what came."""


def folder_name(method: str) -> str:
    """A method's name as a folder's."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in method)


@dataclass(frozen=True)
class MethodRecipe:
    """One method at every budget and seed.

    name: what table and picture call it
    kind: "snl"; "deepreduce" (the network of its pipeline with the most DReLUs within the budget); "deepreshape" (a
        HybReNet thinned, then SNL to the budget); "deepshare"
    phase: how its networks are trained, as in a training recipe; the all-ReLU network is trained before them
    order: of "deepreduce", stages from least to most critical
    model: of "deepreshape", the HybReNet, trained all-ReLU first as the others' network is
    thin: of "deepreshape", stages to thin before SNL; then the stem has no ReLU either
    counts: of "deepshare", the name of the method whose DReLUs per site weigh its sites (the paper: SNL); by default
        uniform
    group: of "deepshare", sites per leader
    snl: of "snl" and "deepreshape"
    """

    name: str
    kind: MethodKind
    phase: tuple[PhaseRecipe, ...]
    order: tuple[str, ...] | None = None
    model: ModelRecipe | None = None
    thin: tuple[str, ...] | None = None
    counts: str | None = None
    group: int | Literal["auto"] = "auto"
    snl: SNLSettings | None = None

    def __post_init__(self) -> None:
        here = f"method {self.name}"
        _check_name(self.name)
        for key, kinds in (
            ("order", ("deepreduce",)),
            ("model", ("deepreshape",)),
            ("thin", ("deepreshape",)),
            ("counts", ("deepshare",)),
            ("snl", ("snl", "deepreshape")),
        ):
            given = getattr(self, key) is not None
            require(not given or self.kind in kinds, f"{here}: {key} belongs to {' and '.join(kinds)}, not {self.kind}")
        require(self.kind != "deepreduce" or self.order is not None, f"{here}: order is missing")
        require(self.kind != "deepreshape" or self.model is not None, f"{here}: model is missing")
        known = [phase.kind for phase in self.phase]
        require(
            not {"teacher", "pretrain"} & set(known),
            f"{here}: wanted no teacher and no pretrain phase, the comparison has one for all; got {', '.join(known)}",
        )


def _check_name(name: str) -> None:
    """Whether it can name a folder within the comparison's, a cell of a Markdown table, and a line in the picture."""
    fits = name[:1].isalnum() and name.isprintable() and "|" not in name and len(name) <= MAX_NAME
    wanted = f"a letter or digit, then {MAX_NAME - 1} printable characters at most, no |"
    require(fits, f"method.name: wanted {wanted}; got {name!r:.60}")
    require(folder_name(name) not in OWN, f"method.name: wanted none of {', '.join(sorted(OWN))}, got {name!r}")


@dataclass(frozen=True)
class CompareRecipe:
    """A comparison. `pretrain`: the phase that trains the all-ReLU network of every seed, who teaches all methods."""

    name: str
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    data: DataRecipe
    model: ModelRecipe
    distill: DistillRecipe
    pretrain: PhaseRecipe
    method: tuple[MethodRecipe, ...]
    threads: int | None = None  # of torch on the CPU; small networks are faster on one

    def __post_init__(self) -> None:
        check_name(self.name)
        names = [method.name for method in self.method]
        for key, values in (("budgets", self.budgets), ("seeds", self.seeds), ("method", names)):
            require(bool(values), f"{key}: wanted at least one")
            require(len(set(values)) == len(values), f"{key}: wanted each once, got {', '.join(map(str, values))}")
        folders = {folder_name(name): name for name in names}
        require(len(folders) == len(names), f"method.name: wanted names that differ in letters, got {', '.join(names)}")
        require(min(self.budgets) > 0, f"budgets: wanted at least 1, got {min(self.budgets)}")
        require(all(0 <= seed <= MAX_SEED for seed in self.seeds), f"seeds: wanted 0 to 2^63 - 1, got {self.seeds}")
        fits = self.threads is None or 0 < self.threads <= MAX_THREADS
        require(fits, f"threads: wanted 1 to {MAX_THREADS}, got {self.threads}")
        require(self.pretrain.kind == "pretrain", f'pretrain.kind: wanted "pretrain", got {self.pretrain.kind!r}')
        for position, method in enumerate(self.method):
            require(
                method.counts is None or method.counts in names[:position],
                f"method {method.name}: counts must name a method before it (got {method.counts!r})",
            )


def load_compare_recipe(path_or_name: str | Path, overrides: Iterable[str] = ()) -> CompareRecipe:
    """The comparison in the TOML file `path_or_name`, or the one of that name that comes with the package.

    overrides: `key=value` strings, as `deepshare train --set` takes them.

    Raises CompareError naming file, key, what was wanted and what came.
    """
    try:
        path = find_toml(path_or_name, COMPARISONS, "comparison")
    except RecipeError as error:
        raise CompareError(str(error)) from error
    try:
        return build(CompareRecipe, apply_overrides(read_toml(path), overrides))
    except (OSError, ValueError, RecipeError) as error:  # ValueError: not UTF-8, or not TOML
        raise CompareError(f"{path}: {error}") from error
    except RecursionError as error:
        raise CompareError(f"{path}: lists or tables are nested too deep") from error


def compare_recipe_names() -> list[str]:
    """Names of the comparisons that come with the package."""
    return toml_names(COMPARISONS)
