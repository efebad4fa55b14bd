"""Putting other activations into a model: by module swap where that is enough, else by torch.fx."""

import copy
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn

from deepshare.find import (
    MAY_WORK_IN_PLACE,
    PLAIN,
    Call,
    SiteNames,
    function_kind,
    is_activation,
    linear_activation,
    outputs,
    relies_on_in_place,
    same_outputs,
)
from deepshare.nn import MaskedReLU2d, SharedReLU2d
from deepshare.site import PlanError, Site
from deepshare.trace import keep_constants, trace

_IN_PLACE_OPERATORS = frozenset(
    (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod)
)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass(frozen=True)
class Change:
    """One activation call, what shall stand there, and the P of its gates (a follower's is its leader's)."""

    call: Call
    site: Site
    prototypes: int | None
    changed: bool

    @property
    def stateless(self) -> bool:
        return self.site.kind == "linear" or self.site.kind in PLAIN


def rewrite(model: nn.Module, calls: Sequence[Call], wanted: Sequence[Site], input_size: Sequence[int]) -> nn.Module:
    """A copy of `model` with `wanted[i]` standing where `calls[i]` is made; what already stands keeps its weights.

    Swapping modules is enough unless a functional ReLU changes, the calls of one module change differently, gates go
    from site to site, or a ReLU works in place and its input is read again. Then the result is an fx.GraphModule of the
    same parameters and names, in which every site has a module of its own at the path that is its name, and the
    leaders' pre-activations are arguments of their followers.

    Raises:
        PlanError: a graph is needed and the model cannot be traced, or a leader's pre-activation is changed in place.
    """
    changes = _changes(calls, wanted)
    reason = _needs_graph(changes) or _needs_in_place(model, changes, input_size)
    return _swapped(model, changes) if reason is None else _rewired(model, changes, input_size, reason)


def _changes(calls: Sequence[Call], wanted: Sequence[Site]) -> list[Change]:
    standing = _prototypes([call.site for call in calls])
    coming = _prototypes(wanted)
    return [
        Change(call, site, coming[site.name], call.site != site or standing[site.name] != coming[site.name])
        for call, site in zip(calls, wanted, strict=True)
    ]


def _prototypes(sites: Sequence[Site]) -> dict[str, int | None]:
    own = {site.name: site.prototypes for site in sites}
    return {site.name: own[site.leader] if site.leader else site.prototypes for site in sites}


def _needs_graph(changes: Sequence[Change]) -> str | None:
    """Why a module swap does not do, naming the first such site; None where it does."""
    outcomes: dict[str | None, set[tuple[str, bool]]] = {}
    times = Counter(change.call.module for change in changes)
    for change in changes:
        outcomes.setdefault(change.call.module, set()).add((change.site.kind, change.stateless))
    for change in changes:
        module, here = change.call.module, f"site {change.site.name!r}"
        if not change.changed:
            continue
        if change.site.leader is not None or change.call.site.leader is not None:
            return f"{here} takes or loses the gates of another site"
        if module is None:
            return f"{here} is a function call, not a module"
        if times[module] > 1 and (len(outcomes[module]) > 1 or not change.stateless):
            return f"{here} is one of {times[module]} calls of the module {module!r}"
    return None


def _needs_in_place(model: nn.Module, changes: Sequence[Change], input_size: Sequence[int]) -> str | None:
    """The same for a ReLU that overwrites what is read later: only a graph can pass its result on."""
    modules = dict(model.named_modules())
    for change in changes:
        if change.changed and getattr(modules.get(str(change.call.module)), "inplace", False):
            return f"site {change.site.name!r} works in place" if relies_on_in_place(model, input_size) else None
    return None


def _swapped(model: nn.Module, changes: Sequence[Change]) -> nn.Module:
    result = copy.deepcopy(model)
    new = {change.call.module: change for change in changes if change.changed and change.call.module is not None}
    for path, change in new.items():
        old, module = result.get_submodule(str(path)), _build(change, result)
        for parent in result.modules():  # an activation may be registered under several paths
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = module
    return result


def _build(change: Change, model: nn.Module) -> nn.Module:
    """The module of a site, on the model's device, in its dtype and mode."""
    site = change.site
    module: nn.Module
    if change.prototypes is not None:
        module = SharedReLU2d(site.channels, change.prototypes)
    elif site.mask is not None:
        module = MaskedReLU2d(site.mask.tensor(), zero_out=site.zero_out)
    else:
        module = PLAIN[site.kind]() if site.kind in PLAIN else linear_activation()
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return module.to(reference.device, reference.dtype).train(model.training)


def _rewired(model: nn.Module, changes: Sequence[Change], input_size: Sequence[int], reason: str) -> nn.Module:
    probe, graph, calls = _trace(model, changes, input_size, reason)
    result = copy.deepcopy(model)
    modules = dict(result.named_modules())
    order = {node: position for position, node in enumerate(graph.nodes)}
    nodes: dict[str, fx.Node] = {}
    for change, node in zip(changes, calls, strict=True):
        name, in_place = change.site.name, works_in_place(node, modules)
        if change.changed or in_place or change.call.module != name:
            _place(result, name, _own_module(change, modules, result))
            node = _replace_call(graph, node, name, order if in_place else None)
        nodes[name] = node
    modules = dict(result.named_modules())
    for change in changes:
        if change.site.leader is not None:
            _connect(graph, nodes[change.site.leader], nodes[change.site.name], modules)
    keep_constants(graph, probe, result)
    return graph_module(result, graph)


def _trace(
    model: nn.Module, changes: Sequence[Change], input_size: Sequence[int], reason: str
) -> tuple[nn.Module, fx.Graph, list[fx.Node]]:
    """(what was traced, its graph, the activation calls in it). One graph must serve train() and eval()."""
    here = f"apply_plan: {reason}; that needs torch.fx, and {type(model).__name__} cannot be traced:"
    training, graph = trace(model, here)
    found = _calls_in(graph, training)
    for (name, _), change in zip(found, changes, strict=False):
        if name != change.site.name:
            raise PlanError(f"{here} a run calls {change.site.name!r} where the trace calls {name!r}")
    if len(found) != len(changes):
        raise PlanError(f"{here} a run makes {len(changes)} activation calls, the trace {len(found)}")
    check_outputs(model, training, graph, tuple(input_size), here)
    return training, graph, [node for _, node in found]


def check_outputs(model: nn.Module, probe: nn.Module, graph: fx.Graph, size: tuple[int, ...], here: str) -> None:
    """A trace takes much for decided that a run decides (`isinstance(x, Tensor)`, counters), and `x += y` for `x + y`,
    which is another thing where the old x is read again: see that it went right.

    `probe` and `graph` are of `trace`. Raises PlanError, beginning with `here`; what the model itself raises.
    """
    expected = outputs(model, size)
    if any(tensor.is_meta for tensor in expected):
        return
    traced = outputs(probe, size, lambda copied, image: fx.Interpreter(copied, graph=graph).run(image))
    if not same_outputs(expected, traced, tolerance=1e-3):  # the same operations; a GPU may sum in another order
        raise PlanError(f"{here} the trace returns other values than a run")


def _calls_in(graph: fx.Graph, model: nn.Module) -> list[tuple[str, fx.Node]]:
    names, found = SiteNames(), []
    for node in graph.nodes:
        if node.op == "call_module" and is_activation(model.get_submodule(str(node.target))):
            found.append((names.of_module(str(node.target)), node))
        elif (kind := _function_kind(node)) is not None:
            stack = list(node.meta.get("nn_module_stack", {}).values())
            found.append((names.of_function(stack[-1][0] if stack else "", kind), node))
    return found


def _function_kind(node: fx.Node) -> Literal["relu", "relu6"] | None:
    if node.op == "call_method":
        return "relu" if node.target in ("relu", "relu_") else None
    return function_kind(node.target) if node.op == "call_function" else None


def _own_module(change: Change, modules: dict[str, nn.Module], result: nn.Module) -> nn.Module:
    """A new module; where nothing changes but the call needs its own, a copy of the one that stands there."""
    if change.changed or change.call.module is None:
        return _build(change, result)
    module = copy.deepcopy(modules[change.call.module])
    if isinstance(module, MAY_WORK_IN_PLACE):
        module.inplace = False
    return module


def _place(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).add_module(name, module)


def _replace_call(graph: fx.Graph, node: fx.Node, target: str, order: dict[fx.Node, int] | None) -> fx.Node:
    """Calls module `target` instead of `node`.

    `order` is given if node works in place: whoever reads its input later read its result, and must go on doing so.
    """
    x = preactivation(node)
    with graph.inserting_after(node):
        new = graph.call_module(target, (x,))
    if order is not None:
        for user in list(x.users):
            if order.get(user, -1) > order[node]:
                user.replace_input_with(x, new)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def preactivation(node: fx.Node) -> fx.Node:
    x = node.args[0] if node.args else node.kwargs.get("x", node.kwargs.get("input"))
    if not isinstance(x, fx.Node):
        raise PlanError(f"apply_plan: the activation {node.format_node()} has no tensor as its first argument")
    return x


def works_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the operation overwrites its first argument."""
    if node.op == "call_module":
        return bool(getattr(modules.get(str(node.target)), "inplace", False))
    if node.op == "call_function" and (node.target in _IN_PLACE_OPERATORS or node.kwargs.get("inplace")):
        return True
    if _function_kind(node) is not None and len(node.args) > 1:
        return bool(node.args[1])
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name.endswith("_") and not name.endswith("__")


def is_addition(node: fx.Node) -> bool:
    """Whether the node is `a + b`, in place or not, however it is written."""
    return node.op in ("call_function", "call_method") and node.target in _ADDITIONS


def _connect(graph: fx.Graph, leader: fx.Node, follower: fx.Node, modules: dict[str, nn.Module]) -> None:
    """The edge of eq. 6: the leader's pre-activation becomes the follower's source."""
    source = preactivation(leader)
    follower.args, follower.kwargs = (preactivation(follower),), {"source": source}
    between = leader.next
    while between is not follower:
        if source in between.all_input_nodes[:1] and works_in_place(between, modules):
            raise PlanError(
                f"apply_plan: {follower.target!r} needs the pre-activation of {leader.target!r}, which is changed "
                f"in place before: {between.format_node()}"
            )
        between = between.next


def graph_module(result: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """`graph` as forward over the whole of `result`: fx alone drops containers' classes and what is not called."""
    graph.lint()
    module = fx.GraphModule(result, graph, class_name=type(result).__name__)
    module._modules = result._modules
    module._parameters = result._parameters
    module._buffers = result._buffers
    module._non_persistent_buffers_set = result._non_persistent_buffers_set
    return module
