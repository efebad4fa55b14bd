"""Fewer passes over memory for a model with shared gates: the same results, bit for bit."""

import copy
import operator
from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn

from deepshare.find import check_is_model, without_weights
from deepshare.graph import graph_module, is_addition, preactivation
from deepshare.nn import SharedReLU2d
from deepshare.trace import keep_constants, trace


def fuse(model: nn.Module, input_size: Sequence[int]) -> nn.Module:
    """`model` with additions inside its SharedReLU2d, and followers fed with packed gates.

    Two rewrites of the graph, both exact in values and gradients:
        act(x + r) becomes act(x, residual=r), one pass instead of two, where nothing but the activation and its
        followers reads the sum;
        follower(y, source=s) takes the gates that the leader of s returns, 1 bit each once all gates are hard, the
        prototypes' channels of s before.

    The result shares its modules and parameters with `model`: train one, save the other. A model without SharedReLU2d
    is returned as it is.

    Args:
        model: usually of `apply_plan`.
        input_size: (C, H, W) of an image; the shapes of both summands must be known to be equal.

    Raises:
        PlanError: the model cannot be traced by torch.fx.
    """
    check_is_model("fuse", model)
    if not any(isinstance(module, SharedReLU2d) for module in model.modules()):
        return model
    probe, graph = trace(model, f"fuse: {type(model).__name__} cannot be traced by torch.fx:")
    shapes = _shapes(probe, graph, input_size)
    modules = {path: module for path, module in model.named_modules() if isinstance(module, SharedReLU2d)}
    gated = {n: modules[str(n.target)].prototypes for n in graph.nodes if n.op == "call_module" and n.target in modules}
    for node in gated:
        _share_packed(graph, node, _followers(node, gated))
    for node in gated:
        _absorb_addition(graph, node, shapes)
    shell = copy.copy(model)  # constants of the trace are added to it, not to the model
    shell._modules = dict(model._modules)
    keep_constants(graph, probe, shell)
    return graph_module(shell, graph)


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape and dtype of every tensor."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.found: dict[fx.Node, tuple[torch.Size, torch.dtype]] = {}

    def run_node(self, node: fx.Node) -> object:
        result = super().run_node(node)
        if isinstance(result, torch.Tensor):
            self.found[node] = (result.shape, result.dtype)
        return result


@torch.no_grad()
def _shapes(
    model: nn.Module, graph: fx.Graph, input_size: Sequence[int]
) -> dict[fx.Node, tuple[torch.Size, torch.dtype]]:
    probe = without_weights(model).eval()
    first = next(model.parameters(), torch.empty(0))
    interpreter = _Shapes(probe, graph)
    interpreter.run(torch.zeros(2, *input_size, dtype=first.dtype, device=first.device))
    return interpreter.found


def _source(node: fx.Node) -> object:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("source")


def _followers(leader: fx.Node, gated: dict[fx.Node, int]) -> list[fx.Node]:
    """The calls that take the leader's pre-activation as source, and no more prototypes than it has."""
    if _source(leader) is not None:
        return []
    source = preactivation(leader)
    return [node for node, prototypes in gated.items() if _source(node) is source and prototypes <= gated[leader]]


def _share_packed(graph: fx.Graph, leader: fx.Node, followers: Sequence[fx.Node]) -> None:
    if not followers:
        return
    leader.kwargs = {**leader.kwargs, "return_gates": True}
    with graph.inserting_after(leader):
        gates = graph.call_function(operator.getitem, (leader, 1))
        y = graph.call_function(operator.getitem, (leader, 0))
    leader.replace_all_uses_with(y, delete_user_cb=lambda user: user not in (y, gates))
    for follower in followers:
        follower.args, follower.kwargs = (preactivation(follower),), {**follower.kwargs, "source": gates}


def _absorb_addition(graph: fx.Graph, node: fx.Node, shapes: dict[fx.Node, tuple[torch.Size, torch.dtype]]) -> None:
    addition = preactivation(node)
    summands = list(_summands(addition))
    alike = len({shapes.get(summand, summand) for summand in (*summands, addition)}) == 1
    if len(summands) != 2 or not alike or list(addition.users) != [node] or "residual" in node.kwargs:
        return
    x, residual = summands
    node.args, node.kwargs = (x, *node.args[1:]), {**node.kwargs, "residual": residual}
    graph.erase_node(addition)


def _summands(node: fx.Node) -> Iterator[fx.Node]:
    """Both summands of a plain addition of two tensors, whose own values nobody sees change."""
    if not is_addition(node) or node.kwargs:
        return
    in_place = node.target in (operator.iadd, "add_")
    if in_place and (not isinstance(node.args[0], fx.Node) or len(node.args[0].users) > 1):
        return
    yield from (argument for argument in node.args if isinstance(argument, fx.Node))
