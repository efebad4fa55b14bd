"""ReLU-reuse (DeepReShape, section 4.2) for the layers whose ReLUs a plan keeps. The layer itself: models/reuse.py."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import fx, nn

from deepshare.find import SiteNames, is_activation
from deepshare.graph import is_addition
from deepshare.models.reuse import Form, with_reuse
from deepshare.plan import Plan, PlanError
from deepshare.site import Site
from deepshare.trace import trace

_PASSED = (nn.modules.batchnorm._BatchNorm, nn.Identity, nn.Dropout, nn.Dropout2d)


class Reused(NamedTuple):
    """What `relu_reuse` returns: the model, the plan that fits it, and the spec's "reuse" that rebuilds it."""

    model: nn.Module
    plan: Plan
    settings: dict[str, Any]


def relu_reuse(
    model: nn.Module,
    plan: Plan,
    factor: int,
    *,
    form: Form = "three",
    shortcuts: bool = True,
    sites: Iterable[str] | None = None,
) -> Reused:
    """ReLU-reuse with reduction factor N at ReLU sites: each keeps 1/N of its DReLUs, in a site inside the convolution.

    The convolution in front of a site becomes a `ReuseConv2d`, freshly initialised, whose ReLU is the site
    `<convolution>.relu` of C/N channels; the site itself becomes linear. In a residual block the ReLU moves from behind
    the addition into the branch. Everything else of the plan stays.

    Args:
        model: what `plan` is for; the result copies its other weights. apply_plan(result.model, result.plan) is the
            network.
        factor: N, at least 2.
        form: "three", the paper's proposal, or "naive", N groups.
        shortcuts: whether a group sees its predecessor's output.
        sites: where; by default every site whose kind in the plan is "relu".

    Raises:
        PlanError: the plan does not fit the model, a site is no ReLU of it, the model cannot be traced, or a site has
            no one convolution in front that can be split (the stem's 3 input channels cannot).
    """
    found = Plan.of(model, plan.input_size)
    plan.check_fits(found)
    chosen = [site.name for site in plan if site.kind == "relu"] if sites is None else list(sites)
    for name in chosen:
        if plan[name].kind != "relu":
            raise PlanError(f"relu_reuse: site {name!r} must be a ReLU (it is {plan[name].kind!r} in the plan)")
    layers = convolutions(model, chosen)
    settings = {"layers": list(layers.values()), "factor": factor, "form": form, "shortcuts": shortcuts}
    try:
        changed = with_reuse(model, settings)
    except ValueError as error:
        raise PlanError(str(error)) from error
    return Reused(changed, _plan_of(changed, plan, set(chosen)), settings)


def convolutions(model: nn.Module, sites: Iterable[str]) -> dict[str, str]:
    """The convolution in front of each site: behind it batch norms, dropout and additions alone.

    Of a residual block's two branches the one with the larger kernel is meant, not the 1x1 of the shortcut.

    Raises:
        PlanError: the model cannot be traced; or a site has no such convolution, or several.
    """
    traced, graph = trace(model, f"relu_reuse: {type(model).__name__} must be traced by torch.fx, and cannot be:")
    modules, names = dict(traced.named_modules()), SiteNames()
    nodes: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module" and is_activation(modules[str(node.target)]):
            nodes[names.of_module(str(node.target))] = node
    result: dict[str, str] = {}
    for name in sites:
        found = _in_front(nodes[name], modules) if name in nodes else []
        large = [path for path in found if max(_kernel(modules, path)) > 1] or found
        if len(large) != 1 or large[0] in result.values():
            got = ", ".join(found) or "none"
            raise PlanError(f"relu_reuse: site {name!r} must have one convolution of its own in front (found {got})")
        result[name] = large[0]
    return result


def _in_front(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the convolutions whose output comes to a call through batch norms and additions."""
    found: list[str] = []
    for before in node.all_input_nodes:
        module = modules.get(str(before.target)) if before.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            found.append(str(before.target))
        elif module is not None and is_activation(module):
            continue
        elif isinstance(module, _PASSED) or is_addition(before):
            found += _in_front(before, modules)
    return found


def _kernel(modules: Mapping[str, nn.Module], path: str) -> tuple[int, ...]:
    conv = modules[path]
    assert isinstance(conv, nn.Conv2d)
    return tuple(conv.kernel_size)


def _plan_of(changed: nn.Module, plan: Plan, moved: set[str]) -> Plan:
    """The old plan over the changed model's sites: moved sites linear, the ReLUs inside the convolutions new."""
    old = {site.name: site for site in plan}
    sites = []
    for site in Plan.of(changed, plan.input_size):
        if site.name in moved:
            sites.append(Site(site.name, site.shape, "linear"))
        else:
            sites.append(old.get(site.name, site))
    return Plan(tuple(sites), plan.input_size)
