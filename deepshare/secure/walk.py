"""A traced model, node by node: what every operation's lowering needs (lower.py has the operations).

CrypTen's own converter (`nn.from_pytorch`) fails on current torch and knows no shared gates, so the walk is ours.
"""

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from deepshare.secure.errors import SecureError
from deepshare.secure.program import Param, Program, Step
from deepshare.trace import Tracer

Encoder = Callable[..., Tensor]  # encoder(values, bits, name=...), as fixed_point.encode
BATCH = 2  # of the trial run: a forward that takes its batch for a number is then seen
_OF_SHAPES = {"size", "dim", "ndimension", "numel", "nelement", "shape", "ndim"}  # what a tensor tells without its data


class _Shapes(fx.Interpreter):
    """Notes shapes, and plain values such as `x.size(0)`, on the nodes. (fx's ShapeProp prints what goes wrong.)"""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        key, value = ("shape", result.shape) if isinstance(result, Tensor) else ("plain", result)
        n.meta[key] = value
        return result


def trace(model: nn.Module) -> fx.GraphModule:
    """In eval mode alone: deepshare.trace's graph for both modes says more than a program can hold."""
    tracer = Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        raise SecureError(f"secure: {type(model).__name__} cannot be traced by torch.fx: {error}") from error
    return fx.GraphModule(tracer.root, graph)


def note_shapes(graph_module: fx.GraphModule, input_shape: tuple[int, ...]) -> None:
    """Runs the graph on BATCH zero images; a Walk reads the notes.

    Raises:
        SecureError: the model does not run on such images.
    """
    try:
        with torch.no_grad():
            _Shapes(graph_module).run(torch.zeros(BATCH, *input_shape))
    except Exception as error:
        why = str(error).splitlines()[0]
        raise SecureError(f"secure: the model does not run on an image {list(input_shape)}: {why}") from error


class Walk:
    """Walks one graph; `_steps` grows in call order, `_at` maps graph nodes to steps."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._modules = dict(graph_module.named_modules())
        self._steps: list[Step] = []
        self._at: dict[fx.Node, int] = {}
        self._graph_module = graph_module
        self._real: dict[str, Tensor] = {}  # weights, not yet rounded
        self._params: dict[str, Param] = {}
        self._public: dict[str, Tensor] = {}
        self._calls: Counter[str] = Counter()
        self._output: int | None = None
        self._position = {node: position for position, node in enumerate(graph_module.graph.nodes)}
        for node in graph_module.graph.nodes:
            self._visit(node)

    def result(self, encoder: Encoder) -> tuple[Program, dict[str, Tensor]]:
        if self._output != len(self._steps) - 1:
            raise SecureError("secure: the model must return the result of its last operation, one tensor")
        tensors = {key: encoder(real, self._params[key].bits, name=key) for key, real in self._real.items()}
        return Program(tuple(self._steps), self._params, self._public), tensors

    def _visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self._output = self._at.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        elif node.op == "placeholder":
            if self._steps:
                raise SecureError(f"secure: node '{node.name}': the model must take one tensor")
            self._emit(node, "input", ())
        elif not self._is_constant(node):
            lower = self._operation(node)
            self._check_in_place(node)
            lower(node)

    def _is_constant(self, node: fx.Node) -> bool:
        """A weight by its name, or a plain value that is the same for every image, such as a shape."""
        if node.op == "get_attr":
            return True
        of_tensors = any(source in self._at for source in node.all_input_nodes)
        asked = node.args[1] if node.target is getattr else node.target
        return "plain" in node.meta and (not of_tensors or asked in _OF_SHAPES)

    def _operation(self, node: fx.Node) -> Callable[[fx.Node], None]:
        """What emits the node's steps. Raises SecureError if nothing does."""
        raise NotImplementedError

    def _check_in_place(self, node: fx.Node) -> None:
        """Shares are never overwritten, so a changed value must have no later reader."""
        called = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        inplace = node.target is operator.iadd or (node.op != "call_module" and called.endswith("_"))
        inplace |= bool(node.kwargs.get("inplace")) or (
            node.op == "call_module" and getattr(self._module(node), "inplace", False)
        )
        source = node.args[0] if node.args else None
        if inplace and isinstance(source, fx.Node):
            later = [user.name for user in source.users if self._position[user] > self._position[node]]
            if later:
                raise self._refuse(node, f"changes '{source.name}' in place, which '{later[0]}' reads afterwards")

    def _module(self, node: fx.Node) -> Any:
        return self._modules[str(node.target)]

    def _refuse(self, node: fx.Node, why: str) -> SecureError:
        what = type(self._module(node)).__name__ if node.op == "call_module" else str(node.target)
        place = f" at '{node.target}'" if node.op == "call_module" else ""
        return SecureError(f"secure: node '{node.name}' ({what}{place}) {why}")

    def _name(self, node: fx.Node) -> str:
        """Module path, '@2' and so on from the second call; for functions the node's name."""
        if node.op != "call_module":
            return node.name
        path = str(node.target)
        self._calls[path] += 1
        return path if self._calls[path] == 1 else f"{path}@{self._calls[path]}"

    def _emit(self, node: fx.Node, op: str, inputs: tuple[int, ...], **fields: Any) -> None:
        """The step that makes the node's result."""
        name = fields.pop("name", None) or self._name(node)
        self._at[node] = self._append(op, name, inputs, self._shape(node), **fields)

    def _append(self, op: str, name: str, inputs: tuple[int, ...], shape: tuple[int, ...], **fields: Any) -> int:
        self._steps.append(Step(op, name, inputs, shape, **fields))
        return len(self._steps) - 1

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        batch, *shape = node.meta["shape"] or (None,)
        if batch != BATCH:
            raise self._refuse(node, f"must keep the batch as its first dimension (got {[batch, *shape]} of {BATCH})")
        return tuple(shape)

    def _input(self, node: fx.Node, position: int = 0) -> int:
        argument = node.args[position] if len(node.args) > position else node.kwargs.get("input")
        if not isinstance(argument, fx.Node) or argument not in self._at:
            raise self._refuse(node, f"takes a constant as argument {position}, wanted an earlier result")
        return self._at[argument]

    def _settings(self, node: fx.Node, **defaults: Any) -> dict[str, Any]:
        """A layer's settings, or a function's arguments behind its first one, in the order of `defaults`."""
        if node.op == "call_module":
            return {name: getattr(self._module(node), name, default) for name, default in defaults.items()}
        given = dict(zip(defaults, node.args[1:], strict=False))
        given |= {name: value for name, value in node.kwargs.items() if name in defaults}
        return {**defaults, **fx.map_arg(given, self._plain)}

    def _plain(self, node: fx.Node) -> Any:
        if "plain" not in node.meta:
            raise self._refuse(node, "is an argument that must be a number")
        return node.meta["plain"]

    def _param(self, name: str, role: str, value: Tensor, bits: int) -> str:
        key = f"{name}.{role}"
        self._real[key] = value.detach().double()
        self._params[key] = Param(tuple(value.shape), bits)
        return key

    def _constant(self, node: fx.Node) -> Tensor:
        """The weight that a get_attr node names."""
        value: Tensor = operator.attrgetter(str(node.target))(self._graph_module)
        return value.detach()
