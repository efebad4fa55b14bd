"""A network in one .safetensors file: weights, and in the header what they mean (model spec, plan, recipe, metrics)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from deepshare import models
from deepshare.files import write_whole
from deepshare.plan import Plan, PlanError, apply_plan

VERSION = 1
_SPEC = {"name": str, "num_classes": int, "width": int, "stem_relu": bool, "in_channels": int, "input_size": list}
_SHAPE = {
    "multipliers": list,
    "blocks": list,
    "rho": float,
    "reuse": dict,
    "channels": list,
}  # optional: absent or None means as published


class CheckpointError(Exception):
    """A file that is no checkpoint or damaged, or a network that cannot become one; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` returns.

    Attributes:
        model: with the plan's activations and the saved weights, on the CPU, in eval mode.
        spec: `models.create`'s arguments (`name`, `num_classes`, `width`, `stem_relu`, `in_channels`; `multipliers`,
            `blocks`, `rho`, `reuse`, `channels` where they are not as published), and `input_size`, sizes as lists.
        plan: what stands at its sites.
        recipe, metrics: as they were given to `save_checkpoint`.
    """

    model: nn.Module
    spec: dict[str, Any]
    plan: Plan
    recipe: dict[str, Any] | None
    metrics: dict[str, Any] | None


def save_checkpoint(
    path: Path | str,
    model: nn.Module,
    spec: Mapping[str, Any],
    plan: Plan,
    *,
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model` (of `models.create`, with `plan` applied) to `path`, whole or not at all.

    Raises:
        CheckpointError: the spec lacks a key or is for another image size than the plan, model and plan disagree, or
            recipe or metrics are not JSON. OSError: the file cannot be written. What stood at `path` then stays.
    """
    here = f"save_checkpoint {path}"
    known = _checked_spec(here, dict(spec))
    _check_plan(here, model, known, plan)
    header = {"format": "deepshare", "version": str(VERSION), "plan": plan.to_json()}
    for name, value in (("spec", known), ("recipe", recipe), ("metrics", metrics)):
        try:
            header[name] = json.dumps(value if value is None else dict(value))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{here}: {name} must be JSON values ({error})") from error
    # cloned where two names share memory: safetensors writes each name's own bytes
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return write_whole(path, _in_order(safetensors.torch.save(_unshared(tensors), header)))


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Build the model of the file's spec, apply its plan, load its weights. The random state is left as it was.

    Raises:
        CheckpointError: there is no such file, it is truncated or garbled, of another version, for an unknown model,
            with a plan that does not fit it, or with tensors missing, too many or of another shape.
    """
    header, tensors = _read(Path(path))
    spec = _checked_spec(str(path), _json(path, header, "spec"))
    recipe, metrics = (_object_or_none(path, header, name) for name in ("recipe", "metrics"))
    try:
        plan = Plan.from_json(header.get("plan", ""))
        if list(plan.input_size) != spec["input_size"]:
            raise PlanError(f"the plan is for {list(plan.input_size)}, the spec for {spec['input_size']!r:.80}")
        with torch.device("meta"):  # before any memory is taken: the weights the spec asks for must be in the file
            plain = _create(spec).state_dict()
        _check_shapes(path, plain, {name: tensor for name, tensor in tensors.items() if name in plain})
        model = apply_plan(_create(spec), plan)
    except ValueError as error:  # PlanError; models.create
        raise CheckpointError(f"{path}: {error}") from error
    _load_tensors(path, model, tensors)
    return Checkpoint(model.eval(), spec, plan, recipe, metrics)


def _create(spec: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced; who trains must not see the draw
        return models.create(**{key: value for key, value in spec.items() if key != "input_size"})


def _checked_spec(here: str, spec: Any) -> dict[str, Any]:
    """The spec with sizes as lists, the width filled in, and of the optional keys only those that say something."""
    if not isinstance(spec, dict) or not _SPEC.keys() - {"width"} <= spec.keys() <= _SPEC.keys() | _SHAPE.keys():
        got = ", ".join(map(str, spec))[:200] if isinstance(spec, dict) else f"{spec!r:.80}"
        raise CheckpointError(
            f"{here}: the spec must have {', '.join(_SPEC)} (got {got}); {', '.join(_SHAPE)} may be added"
        )
    spec = {key: list(value) if isinstance(value, tuple) else value for key, value in spec.items()}
    if spec.get("width") is None and models.is_name(str(spec["name"])):
        spec["width"] = models.width_of(spec)
    shape = {key: kind for key, kind in _SHAPE.items() if spec.get(key) is not None}
    if type(spec.get("rho")) is int:
        spec["rho"] = float(spec["rho"])
    for key, kind in (_SPEC | shape).items():
        if type(spec.get(key)) is not kind:
            raise CheckpointError(f"{here}: spec {key} must be {kind.__name__} (got {spec.get(key)!r:.80})")
    return {key: spec[key] for key in (*_SPEC, *shape)}


def _check_plan(here: str, model: nn.Module, spec: dict[str, Any], plan: Plan) -> None:
    if list(plan.input_size) != spec["input_size"]:
        raise CheckpointError(f"{here}: the plan is for {list(plan.input_size)}, the spec for {spec['input_size']}")
    try:
        found = Plan.of(model, plan.input_size)
        plan.check_fits(found)
    except PlanError as error:
        raise CheckpointError(f"{here}: {error}") from error
    for wanted, stands in zip(plan, found, strict=True):
        if wanted != stands:
            raise CheckpointError(f"{here}: the plan says {wanted}, the model has {stands}")


def _in_order(content: bytes) -> bytes:
    """The same .safetensors file with the entries of its header sorted: safetensors writes the metadata in an order of
    chance, and equal networks are to be equal files. What follows the header is addressed relative to its end."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensors[name].untyped_storage().data_ptr())
    return tensors


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(header, tensors) of a file of our format and version."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable .safetensors file, perhaps cut short ({error})") from error
    if header.get("format") != "deepshare":
        raise CheckpointError(f"{path}: a .safetensors file, but no deepshare checkpoint (its header does not say so)")
    if header.get("version") != str(VERSION):
        raise CheckpointError(f"{path}: checkpoint version must be {VERSION} (got {header.get('version')!r})")
    return header, tensors


def _json(path: Path | str, header: dict[str, str], name: str) -> Any:
    try:
        return json.loads(header[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header's {name} is missing or not JSON ({error})") from error


def _object_or_none(path: Path | str, header: dict[str, str], name: str) -> dict[str, Any] | None:
    value = _json(path, header, name)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{path}: the header's {name} must be an object or null (got {value!r:.80})")
    return value


def _check_shapes(path: Path | str, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name in (*wanted, *tensors):
        if name not in tensors or name not in wanted:
            what = "is missing" if name not in tensors else "belongs to no part of the model"
            raise CheckpointError(f"{path}: tensor {name!r} {what}")
        if tensors[name].shape != wanted[name].shape:
            shapes = f"{list(wanted[name].shape)} (got {list(tensors[name].shape)})"
            raise CheckpointError(f"{path}: tensor {name!r} must have shape {shapes}")


def _load_tensors(path: Path | str, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    wanted = model.state_dict()
    _check_shapes(path, wanted, tensors)
    floating = {tensor.dtype for name, tensor in tensors.items() if wanted[name].is_floating_point()}
    if len(floating) == 1:  # a network saved in another precision comes back in it
        model.to(floating.pop())
    try:
        model.load_state_dict(tensors)
    except (ValueError, TypeError, RuntimeError) as error:  # such as a channel map out of range
        raise CheckpointError(f"{path}: {error}") from error
