"""One torch.fx graph of a model that is right in train() and in eval()."""

import inspect
import keyword
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from torch import fx, nn

from deepshare.find import is_activation, without_weights
from deepshare.site import PlanError

_CONSTANTS = "traced_constants"  # the submodule for tensors that forward makes from nothing
_MODES = {"traced_in_training": True, "traced_in_eval": False}  # the submodules whose results follow the mode


class Mode(nn.Module):
    """Its call says whether it is in the mode asked for: what a traced forward has instead of its own `self.training`.

    A module, because it follows train() and eval(), and because a call of it outlives pickling (which traces again).
    """

    def __init__(self, in_training: bool) -> None:
        super().__init__()
        self.in_training = in_training

    def forward(self) -> bool:
        return self.training is self.in_training


class Tracer(fx.Tracer):
    """Traces a call with one tensor, as counting makes it; keeps activations whole, as torch.nn's are."""

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The model and its first argument. Others keep their defaults: traced as unknown, `mask=None` is not None."""
        _, first, *_ = inspect.signature(root_fn).parameters.values()
        name = first.name if first.kind is not first.VAR_POSITIONAL else "x"
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_activation(m) or isinstance(m, Mode) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, here: str) -> tuple[nn.Module, fx.Graph]:
    """(what was traced, a graph that is right in train() and in eval()).

    The graph is that of `model(x)`: its forward takes one argument. Arguments inside that are True in one mode and
    False in the other (`F.dropout(x, p, self.training)`) become results of a `Mode`; `keep_constants` gives it to
    whoever gets the graph.

    Raises:
        PlanError: there is none; the message begins with `here`.
    """
    training, evaluation = without_weights(model).train(), without_weights(model).eval()
    try:
        graph, other = Tracer().trace(training), Tracer().trace(evaluation)
    except Exception as error:
        raise PlanError(f"{here} {type(error).__name__}: {error}") from error
    _check_names(graph, here)
    twins: dict[fx.Node, fx.Node] = {}
    for node, twin in list(zip_longest(graph.nodes, other.nodes)):
        if node is None or twin is None or not _unite(graph, node, twin, twins):
            lines = " / ".join("nothing" if one is None else one.format_node() or "return" for one in (node, twin))
            raise PlanError(f"{here} forward does other things in train() than in eval(): {lines}")
    _add_modes(graph, training)
    return training, graph


def _check_names(graph: fx.Graph, here: str) -> None:
    """fx writes forward as Python, `self.block.class(x)`, where no attribute can be named as a keyword."""
    for node in graph.nodes:
        parts = str(node.target).split(".") if node.op in ("call_module", "get_attr") else ()
        for part in filter(keyword.iskeyword, parts):
            raise PlanError(f"{here} {part!r} in the path {node.target!r} is a Python keyword, which fx cannot write")


class _DifferentError(Exception):
    pass


def _unite(graph: fx.Graph, node: fx.Node, twin: fx.Node, twins: dict[fx.Node, fx.Node]) -> bool:
    """Whether both nodes do the same, once bools that follow the mode do so in the graph too."""

    def same(a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node):
            if twins.get(a) is not b:
                raise _DifferentError
        elif type(a) is not type(b):
            raise _DifferentError
        elif isinstance(a, (tuple, list)) and len(a) == len(b):
            both = [same(*pair) for pair in zip(a, b, strict=True)]
            return type(a)(*both) if hasattr(a, "_fields") else type(a)(both)
        elif isinstance(a, dict) and a.keys() == b.keys():
            return {key: same(a[key], b[key]) for key in a}
        elif isinstance(a, bool) and a != b:
            return _mode(graph, a)
        elif repr(a) != repr(b):
            raise _DifferentError
        return a

    if (node.op, node.target) != (twin.op, twin.target):
        return False
    try:
        node.args, node.kwargs = same(node.args, twin.args), same(node.kwargs, twin.kwargs)
    except _DifferentError:
        return False
    twins[node] = twin
    return True


def _mode(graph: fx.Graph, in_training: bool) -> fx.Node:
    """A node that is `in_training` in train() and the opposite in eval()."""
    name = next(name for name, mode in _MODES.items() if mode is in_training)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        return first if first.target == name else graph.call_module(name)


def _add_modes(graph: fx.Graph, model: nn.Module) -> None:
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for name, in_training in _MODES.items():
        if name in called and not hasattr(model, name):
            model.add_module(name, Mode(in_training).train(model.training))


def keep_constants(graph: fx.Graph, probe: nn.Module, result: nn.Module) -> None:
    """Give `result` what a graph of `trace` needs beside the model's own modules; none of it is in a state dict.

    That is `Mode`s, and the tensors that forward makes from nothing: constants of the trace.
    """
    _add_modes(graph, result)
    constants = nn.Module().train(result.training)
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and name.startswith("_tensor_constant") and not hasattr(result, name):
            constants.register_buffer(name, getattr(probe, name), persistent=False)
            node.target = f"{_CONSTANTS}.{name}"
    if list(constants.buffers()):
        result.add_module(_CONSTANTS, constants)
