"""Which stage of its network an activation site belongs to: conv1, S1, S2, ..., fc (DeepReDuce, section 2.1)."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from deepshare.find import is_activation
from deepshare.models.families import check_is_spec, family_of
from deepshare.plan import Plan
from deepshare.site import PlanError

STEM, HEAD = "conv1", "fc"  # what comes before the first stage, and after the last
_FIRST = {"conv1", "bn1", "stem_relu", "stem", "first"}
_LAST = {"head", "fc", "pool"}


def stage_of(network: nn.Module | Mapping[str, Any], name: str) -> str:
    """The stage of a site, or of any module, of a registry's network.

    "conv1" for what comes before the first stage (where the papers print shares of the stages alone they add it to the
    first: DeepReShape, Table 4), "S1", "S2", ... for the stages, "fc" for what comes after the last. The last ReLU of a
    WideResNet and the last convolution of MobileNetV2 belong to the last stage.

    Args:
        network: a model of `models.create`, also with a plan applied; or its spec (`name` is read).
        name: a site's name or a module's path.

    Raises:
        PlanError: the network has no such stage, or is none of the registry's.
    """
    top = re.split(r"[.@:]", name)[0]
    found = re.fullmatch(r"layer([1-9]\d*)", top)
    if found and int(found[1]) <= _stage_count(network):
        return f"S{found[1]}"
    if top in _FIRST | _LAST and _stage_count(network):
        return STEM if top in _FIRST else HEAD
    raise PlanError(f"models.stage_of: {name!r} must be a site of a model of models.create, as 'layer1.0.relu1'")


def stage_names(network: nn.Module | Mapping[str, Any]) -> tuple[str, ...]:
    """("S1", "S2", ...) of a registry's network, without the stem and the head; empty for any other model."""
    return tuple(f"S{number}" for number in range(1, _stage_count(network) + 1))


def stages(network: nn.Module | Mapping[str, Any], sites: Plan | Iterable[str] | None = None) -> tuple[str, ...]:
    """`stage_of` each site, in the order of `sites` (a plan or names).

    Without `sites`: of the activations of `network`, a model, in the order they are registered, which in the models of
    this registry is the order of their calls.
    """
    if sites is None:
        if not isinstance(network, nn.Module):
            raise PlanError("models.stages: sites must be given for a model's spec")
        sites = [path for path, module in network.named_modules() if is_activation(module)]
    names = [site.name for site in sites] if isinstance(sites, Plan) else sites
    return tuple(stage_of(network, name) for name in names)


def _stage_count(network: nn.Module | Mapping[str, Any]) -> int:
    """0 for what is none of the registry's networks."""
    if isinstance(network, nn.Module):
        return sum(1 for name, _ in network.named_children() if re.fullmatch(r"layer[1-9]\d*", name))
    check_is_spec("models.stage_of", network)
    family = family_of(str(network["name"]))
    return 0 if family is None else family.stages
