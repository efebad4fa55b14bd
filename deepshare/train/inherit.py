"""Recipes that stand on others: what a file's `base` says, table by table under its own, and which phases are meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepshare.train.errors import RecipeError, require
from deepshare.train.overrides import apply_overrides
from deepshare.train.phase_recipe import ORDER
from deepshare.train.plan_recipe import BUDGETED
from deepshare.train.toml_in import read_toml

# table -> the key that says what it is, and the keys that belong to one value of it: another inherits none of them
_OWNED = {
    "plan": ("method", ("weights", "weights_from", "counts_of", "file", "culled", "thinned")),
    "distill": ("method", ("alpha", "beta")),
    "phase": ("schedule", ("lr_end", "milestones", "factor")),
}
_WEIGHTS = ("weights", "weights_from", "counts_of")  # of a plan: three ways to say one thing


def read_with_bases(path: Path, packaged: Path) -> dict[str, Any]:
    """What the file says, over what its base says, over what that one's base says; without the key `base`.

    A base is a file's name without .toml, relative to the folder of the file that names it, or else to `packaged`.
    Tables are merged key by key, `[[phase]]` by kind (then in the order in which phases run); anything else in the
    nearer file replaces what is below. Where the nearer file gives a plan or distillation another `method`, or a phase
    another `schedule`, the keys that belong to the old one are not inherited (a budget is, where there is one). What a
    base is `published` for counts only where `path` has that table itself.

    Raises OSError, ValueError: `path` itself cannot be read. RecipeError: a base is missing, unreadable, or its own
    base in the end; the message names the chain.
    """
    chain, layers = [path], [read_toml(path)]
    while "base" in layers[-1]:
        name = layers[-1].pop("base")
        require(isinstance(name, str), f"base: wanted the name of a recipe, got {name!r:.80}, in {_shown(chain)}")
        found = _find(name, chain[-1].parent, packaged)
        if found is None:
            raise RecipeError(f"base: {name} is no file beside {chain[-1].name}, nor in the package; {_shown(chain)}")
        if any(found.samefile(before) for before in chain):
            raise RecipeError(f"base: {_shown([*chain, found])} goes round in a circle")
        chain.append(found)
        try:
            layers.append(read_toml(found))
        except (OSError, ValueError) as error:
            raise RecipeError(f"base: {_shown(chain)}: {error}") from error
    claims, values = "published" in layers[0], layers.pop()
    if layers and isinstance(values.get("phase"), list):
        values["phase"] = _merge_phases([], values["phase"])
    while layers:
        values = merge(values, layers.pop())
    return values if claims else {key: value for key, value in values.items() if key != "published"}


def merge(below: Mapping[str, Any], over: Mapping[str, Any], table: str = "") -> dict[str, Any]:
    """`over` on `below`, as `read_with_bases` says; `table` is where both stand."""
    result = {key: value for key, value in below.items() if key not in _dropped(below, over, table)}
    for key, value in over.items():
        under = result.get(key)
        if isinstance(value, dict) and isinstance(under, dict):
            result[key] = merge(under, value, key)
        elif key == "phase" and isinstance(value, list) and isinstance(under, list):
            result[key] = _merge_phases(under, value)
        else:
            result[key] = value
    return result


def select_phases(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without the key `phases`, and of the phases those alone which it lists (without it, all).

    Raises RecipeError: it is no list of kinds, or names one that there is not.
    """
    rest = {key: value for key, value in values.items() if key != "phases"}
    if "phases" not in values:
        return rest
    wanted, phases = values["phases"], values.get("phase")
    listed = isinstance(wanted, list) and all(isinstance(kind, str) for kind in wanted)
    require(listed, f"phases: wanted a list of kinds, got {wanted!r:.80}")
    given = {_kind(phase): phase for phase in phases} if isinstance(phases, list) else {}
    for kind in wanted:
        require(kind in given, f"phases: wanted some of {', '.join(map(str, given)) or 'none'}, got {kind!r}")
    return {**rest, "phase": [phase for kind, phase in given.items() if kind in wanted]}


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`values` with every `key=value` put in (`apply_overrides`); what a nearer file would not inherit goes here too.

    Raises RecipeError: as `apply_overrides`.
    """
    changes = list(overrides)
    changed, given = apply_overrides(dict(values), changes), {text.partition("=")[0].strip() for text in changes}
    for table in ("plan", "distill"):
        _settle(values.get(table), changed.get(table), table, {f"{table}."}, given)
    pairs = zip(_tables(values.get("phase")), _tables(changed.get("phase")), strict=False)  # `phase=[]` leaves fewer
    for number, (before, after) in enumerate(pairs):
        _settle(before, after, "phase", {"phase.*.", f"phase.{number}.", f"phase.{before.get('kind')}."}, given)
    return changed


def _settle(before: Any, after: Any, table: str, prefixes: set[str], given: set[str]) -> None:
    """Drop from `after` what the keys that were `given` under one of `prefixes` leave without meaning."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = {key for key in after if any(prefix + key in given for prefix in prefixes)}
        for key in _dropped(before, {name: after[name] for name in names}, table) - names:
            after.pop(key, None)


def _tables(phases: Any) -> list[dict[str, Any]]:
    return [phase for phase in phases if isinstance(phase, dict)] if isinstance(phases, list) else []


def _find(name: str, beside: Path, packaged: Path) -> Path | None:
    return next((file for folder in (beside, packaged) if (file := folder / f"{name}.toml").is_file()), None)


def _shown(chain: Sequence[Path]) -> str:
    return " -> ".join(str(path) for path in chain)


def _dropped(below: Mapping[str, Any], over: Mapping[str, Any], table: str) -> set[str]:
    """Keys of `below` that what stands in `over` leaves without meaning."""
    dropped: set[str] = set()
    if table in _OWNED:
        name, owned = _OWNED[table]
        if name in over and over[name] != below.get(name):
            dropped.update(owned)
            if table == "plan" and over[name] not in BUDGETED:
                dropped.add("budget")
    if table == "plan" and any(key in over for key in _WEIGHTS):
        dropped.update(_WEIGHTS)
    return dropped


def _merge_phases(below: list[Any], over: list[Any]) -> list[Any]:
    merged = {_kind(phase): phase for phase in below}
    kinds = [_kind(phase) for phase in over]
    require(len(set(kinds)) == len(kinds), f"phase: wanted each kind once at most, got {', '.join(map(str, kinds))}")
    for kind, phase in zip(kinds, over, strict=True):
        merged[kind] = merge(merged[kind], phase, "phase") if kind in merged else phase
    return sorted(merged.values(), key=lambda phase: ORDER.index(phase["kind"]))


def _kind(phase: Any) -> str:
    kind = phase.get("kind") if isinstance(phase, dict) else None
    require(kind in ORDER, f"phase.kind: wanted one of {', '.join(ORDER)}, got {kind!r:.80}")
    return str(kind)
