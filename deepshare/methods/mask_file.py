"""Masks in a .safetensors file of their own, eight to a byte: for networks that this package did not train."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from deepshare.files import write_whole
from deepshare.methods.snl import SNLError
from deepshare.plan import Mask, Plan, PlanError, check_is_plan

FORMAT = "deepshare masks"


def save_masks(path: Path | str, plan: Plan) -> Path:
    """Write the masks of the plan's mask sites: a uint8 tensor [ceil(numel / 8)] by site name, first element highest.

    The header has "format" and, as JSON, "shapes" (a site's mask shape, [C, H, W] or [C]). Whether other elements pass
    or are 0 is not in the file.

    Raises SNLError: the plan has no mask. OSError: the file cannot be written.
    """
    check_is_plan(f"save_masks {path}", plan)
    masks = {site.name: site.mask for site in plan if site.mask is not None}
    if not masks:
        raise SNLError(f"save_masks {path}: the plan has no mask site")
    bits = {name: torch.frombuffer(bytearray(mask.bits), dtype=torch.uint8) for name, mask in masks.items()}
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    return write_whole(path, safetensors.torch.save(bits, {"format": FORMAT, "shapes": shapes}))


def load_masks(path: Path | str) -> dict[str, Mask]:
    """The masks in `path` by site name, for `snl.plan_of`. Raises SNLError naming the file and what is wrong."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            bits = {name: bytes(file.get_tensor(name).numpy()) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise SNLError(f"{path}: not a readable .safetensors file ({error})") from error
    if header.get("format") != FORMAT:
        raise SNLError(f"{path}: must be a file of masks (its header does not say so)")
    try:
        shapes = json.loads(header["shapes"])
        return {name: Mask(tuple(shape), bits[name]) for name, shape in _in_both(shapes, bits).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # ValueError: not JSON; PlanError
        raise SNLError(f"{path}: damaged: {error}") from error


def _in_both(shapes: Mapping[str, list[int]], bits: Mapping[str, bytes]) -> Mapping[str, list[int]]:
    if shapes.keys() != bits.keys():
        raise PlanError(f"shapes for {', '.join(shapes)}, bits for {', '.join(bits)}")
    return shapes
