"""The key of how a phase ends: the hash of all that decides it, and of nothing else (docs/training.md, Artifacts)."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from deepshare.plan import Plan
from deepshare.train import networks
from deepshare.train.fields import plain
from deepshare.train.phase_recipe import PhaseRecipe
from deepshare.train.recipe import Recipe

VERSION = 1  # of what goes into a key; raised when the same recipe would no longer end in the same network
GIVEN = "sha256:"  # what the key of a checkpoint that was given begins with: its file's hash stands for its making


def artifact_key(
    recipe: Recipe,
    kind: str,
    plan: Plan,
    inputs: Mapping[str, str],
) -> str:
    """SHA-256 of `deciding(recipe, kind, plan, inputs)` as canonical JSON, in hexadecimal digits."""
    return key_of(deciding(recipe, kind, plan, inputs))


def deciding(recipe: Recipe, kind: str, plan: Plan, inputs: Mapping[str, str]) -> dict[str, Any]:
    """All that decides how the phase `kind` ends, as JSON values.

    Not in it: the recipe's name, its other phases (but by `inputs`), the budget (but by the plan), and where the phase
    has no use for them gamma and affine, the settings of distillation, those of SNL. Data files have one content for
    every name (their md5 is checked), initial weights and batches depend on seed, kind and epoch.

    plan: what the run began with (of SNL: before its masks are learned)
    inputs: by kind, the keys of the phases in `inputs_of`
    """
    phase = _phase(recipe, kind)
    values: dict[str, Any] = {
        "version": VERSION,
        "seed": recipe.seed,
        "data": plain(recipe.data),
        "model": plain(recipe.model_of(kind)),
        "compute": plain(recipe.compute),
        "phase": plain(phase),
        "inputs": {name: inputs[name] for name in inputs_of(recipe, kind)},
    }
    if kind != "finetune" or recipe.snl is None:  # finetune takes the masks' plan with their weights
        first = networks.first_plan(recipe, plan, kind)
        values["plan"] = {"sha256": hashlib.sha256(first.to_json().encode()).hexdigest(), "drelus": first.drelus}
        if any(site.kind == "shared" for site in first):
            values["plan"] |= {"gamma": recipe.plan.gamma, "affine": recipe.plan.affine}
            if recipe.plan.affine and recipe.plan.affine_start is not None:
                values["plan"]["affine_start"] = recipe.plan.affine_start
    if phase.distill != "none":
        values["distill"] = plain(recipe.distill)
    if kind == "masks":
        values["snl"] = {**plain(recipe.snl), "budget": recipe.plan.budget}
    return values


def inputs_of(recipe: Recipe, kind: str) -> tuple[str, ...]:
    """The phases that `kind` starts from and learns from."""
    kinds: list[str] = [phase.kind for phase in recipe.phase]
    phase, found = _phase(recipe, kind), []
    if kind in ("switch", "finetune"):
        found.append(kinds[kinds.index(kind) - 1])
    elif phase.start == "pretrain":
        found.append("pretrain")
    if phase.distill != "none":
        found.append(phase.distill)
    return tuple(dict.fromkeys(found))


def phase_keys(recipe: Recipe, plan: Plan, given: Mapping[str, str]) -> dict[str, str]:
    """The key of every phase, in the recipe's order.

    given: the SHA-256 of a checkpoint that takes the place of a phase, by its kind; it comes first, as "sha256:..."
    """
    keys = {kind: GIVEN + digest for kind, digest in given.items()}
    for phase in recipe.phase:
        if phase.kind not in keys:
            keys[phase.kind] = artifact_key(recipe, phase.kind, plan, keys)
    return keys


def key_of(values: Mapping[str, Any]) -> str:
    """The key of what `deciding` returns, also after a way through JSON."""
    text = json.dumps(_canonical(values), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], at: str = "") -> str:
    """The first place where two results of `deciding` differ, with both values; "" if they are equal."""
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(name), theirs.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            if found := difference(one, other, f"{at}{name}."):
                return found
        elif _canonical(one) != _canonical(other):
            return f"{at}{name} ({one!r:.80} against {other!r:.80})"
    return ""


def _canonical(value: Any) -> Any:
    """A float that is whole becomes an int: TOML's 1 and 1.0, where a number is wanted, are one recipe."""
    if isinstance(value, Mapping):
        return {name: _canonical(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _phase(recipe: Recipe, kind: str) -> PhaseRecipe:
    return next(phase for phase in recipe.phase if phase.kind == kind)
