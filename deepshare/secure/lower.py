"""From a PyTorch model to a Program: trace, fold batch norms, one handler per operation.

CrypTen's own converter (`nn.from_pytorch`) fails on current torch and knows no shared gates, so the walk is ours.
"""

import copy
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from deepshare.find import function_kind
from deepshare.fold import affine_of, fold_batch_norm
from deepshare.nn import MaskedReLU2d, SharedReLU2d
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import SCALE_BITS, encode
from deepshare.secure.program import Param, Program, Step

SUPPORTED = (
    "Conv2d, Linear, BatchNorm2d, ReLU, SharedReLU2d, MaskedReLU2d, addition of two tensors, AvgPool2d, "
    "AdaptiveAvgPool2d, mean over H and W, Flatten, Identity, Dropout, narrow and cat along the channels"
)

_CLIPS = (
    "clips at 6: a second comparison of every element, which is not supported; put a relu or shared site there "
    "(Plan.replace, convert) and finetune"
)


class _Tracer(fx.Tracer):
    """Keeps the activation modules whole, as torch.nn's are.

    A subclass of nn.ReLU is traced through, unlike in graph.py, where it is a site: here counts what its forward does.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (SharedReLU2d, MaskedReLU2d)) or super().is_leaf_module(m, module_qualified_name)


def lower(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[Program, dict[str, Tensor]]:
    """Program and integer weights of `model` in eval mode, for images of shape (C, H, W).

    The model is not changed. Weights are rounded to 16 fractional bits, biases to 32 (they join the product before its
    truncation).

    Raises:
        SecureError: the model cannot be traced, holds an operation that is not supported (named), has soft gates
            left, or a weight that does not fit the fixed-point range.
    """
    graph_module = _trace(copy.deepcopy(model).cpu().eval())
    fold_batch_norm(graph_module)
    try:
        ShapeProp(graph_module).propagate(torch.zeros(1, *input_shape))
    except Exception as error:
        raise SecureError(f"secure: the model does not run on an image {list(input_shape)}: {error}") from error
    return _Lowering(graph_module).result()


def _trace(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        raise SecureError(f"secure: {type(model).__name__} cannot be traced by torch.fx: {error}") from error
    return fx.GraphModule(tracer.root, graph)


class _Lowering:
    """Walks one graph; `_steps` grows in call order, `_at` maps graph nodes to steps."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._modules = dict(graph_module.named_modules())
        self._steps: list[Step] = []
        self._at: dict[fx.Node, int] = {}
        self._tensors: dict[str, Tensor] = {}
        self._params: dict[str, Param] = {}
        self._public: dict[str, Tensor] = {}
        self._compared: set[tuple[int, int]] = set()
        self._calls: Counter[str] = Counter()
        self._output: int | None = None
        self._position = {node: position for position, node in enumerate(graph_module.graph.nodes)}
        for node in graph_module.graph.nodes:
            self._visit(node)

    def result(self) -> tuple[Program, dict[str, Tensor]]:
        if self._output != len(self._steps) - 1:
            raise SecureError("secure: the model must return the result of its last operation, one tensor")
        return Program(tuple(self._steps), self._params, self._public), self._tensors

    def _visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self._output = self._at.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        elif node.op == "placeholder":
            if self._steps:
                raise SecureError(f"secure: node '{node.name}': the model must take one tensor")
            self._emit(node, "input", ())
        else:
            handler = self._handler(node)
            if handler is None:
                raise self._refuse(
                    node, _CLIPS if self._clips(node) else f"is not supported; supported are {SUPPORTED}"
                )
            self._check_in_place(node)
            handler(self, node)

    def _handler(self, node: fx.Node) -> "Callable[[_Lowering, fx.Node], None] | None":
        if node.op == "call_module":
            return _MODULES.get(type(self._module(node)))
        if node.op == "call_function":
            return _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
        if node.op == "call_method":
            return _METHODS.get(str(node.target))
        return None

    def _clips(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._module(node), nn.ReLU6)
        return node.op == "call_function" and function_kind(node.target) == "relu6"

    def _check_in_place(self, node: fx.Node) -> None:
        """Shares are never overwritten, so a changed value must have no later reader."""
        inplace = node.target is operator.iadd or (node.op == "call_method" and str(node.target).endswith("_"))
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
        shape = tuple(node.meta["tensor_meta"].shape[1:])
        self._at[node] = len(self._steps)
        self._steps.append(Step(op, fields.pop("name", None) or self._name(node), inputs, shape, **fields))

    def _input(self, node: fx.Node, position: int = 0) -> int:
        argument = node.args[position] if len(node.args) > position else node.kwargs.get("input")
        if not isinstance(argument, fx.Node) or argument not in self._at:
            raise self._refuse(node, f"takes a constant as argument {position}, wanted an earlier result")
        return self._at[argument]

    def _param(self, name: str, role: str, value: Tensor, bits: int) -> str:
        key = f"{name}.{role}"
        self._tensors[key] = encode(value, bits, name=key)
        self._params[key] = Param(tuple(value.shape), bits)
        return key

    def conv2d(self, node: fx.Node) -> None:
        conv, name = self._module(node), self._name(node)
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise self._refuse(node, f"must have zero padding in numbers (got {conv.padding_mode}, {conv.padding})")
        params = {"weight": self._param(name, "weight", conv.weight, SCALE_BITS)}
        if conv.bias is not None:
            params["bias"] = self._param(name, "bias", conv.bias.reshape(-1, 1, 1), 2 * SCALE_BITS)
        options = {
            "stride": tuple(conv.stride),
            "padding": tuple(conv.padding),
            "dilation": tuple(conv.dilation),
            "groups": conv.groups,
        }
        self._emit(node, "conv2d", (self._input(node),), name=name, params=params, options=options)

    def linear(self, node: fx.Node) -> None:
        layer, name, source = self._module(node), self._name(node), self._input(node)
        if len(self._steps[source].shape) != 1:
            raise self._refuse(node, f"must read [N, features] (got [N, *{self._steps[source].shape}])")
        params = {"weight": self._param(name, "weight", layer.weight.t(), SCALE_BITS)}
        if layer.bias is not None:
            params["bias"] = self._param(name, "bias", layer.bias, 2 * SCALE_BITS)
        self._emit(node, "linear", (source,), name=name, params=params)

    def batch_norm(self, node: fx.Node) -> None:
        norm, name = self._module(node), self._name(node)
        if norm.running_mean is None:
            raise self._refuse(node, "must have running statistics")
        scale, shift = affine_of(norm)
        params = {
            "scale": self._param(name, "scale", scale.reshape(-1, 1, 1), SCALE_BITS),
            "shift": self._param(name, "shift", shift.reshape(-1, 1, 1), 2 * SCALE_BITS),
        }
        self._emit(node, "affine", (self._input(node),), name=name, params=params)

    def add(self, node: fx.Node) -> None:
        left, right = self._input(node), self._input(node, 1)
        if node.kwargs or self._steps[left].shape != self._steps[right].shape:
            raise self._refuse(node, "must add two results of equal shape, without further arguments")
        self._emit(node, "add", (left, right))

    def relu(self, node: fx.Node) -> None:
        self._emit(node, "relu", (self._input(node),))

    def shared(self, node: fx.Node) -> None:
        act, name, x = self._module(node), self._name(node), self._input(node)
        if act.soft_channels:
            raise self._refuse(node, f"has soft gates left: soft_channels must be 0 (got {act.soft_channels})")
        source = _argument(node, "source")
        gates = (x if source is None else self._at[source], act.channel_map.prototypes)  # type: ignore[index]
        self._public[f"{name}.pi"] = act.channel_map.pi.to(torch.int64)
        per_channel = (-1, *(1,) * (len(self._steps[x].shape) - 1))
        params = {
            "alpha": self._param(name, "alpha", act.alpha.reshape(per_channel), SCALE_BITS),
            "beta": self._param(name, "beta", act.beta.reshape(per_channel), SCALE_BITS),
        }
        fresh = gates not in self._compared
        self._compared.add(gates)
        self._emit(
            node, "shared", (x,), name=name, params=params, public={"pi": f"{name}.pi"}, gates=gates, fresh=fresh
        )

    def mask(self, node: fx.Node) -> None:
        act, name, x = self._module(node), self._name(node), self._input(node)
        shape = self._steps[x].shape
        mask = act.mask if act.mask.dim() == 3 else act.mask.reshape(-1, *(1,) * (len(shape) - 1))
        kept = mask.expand(shape).reshape(-1)
        self._public[f"{name}.index"] = kept.nonzero().reshape(-1)
        options = {"zero_out": act.zero_out}
        self._emit(node, "mask", (x,), name=name, public={"index": f"{name}.index"}, options=options)

    def avg_pool(self, node: fx.Node) -> None:
        pool = self._module(node)
        padding = _pair(pool.padding)
        if pool.ceil_mode or pool.divisor_override or (padding != (0, 0) and not pool.count_include_pad):
            raise self._refuse(node, "must have ceil_mode False, no divisor_override, count_include_pad True")
        self._pool(node, _pair(pool.kernel_size), _pair(pool.stride), padding)

    def adaptive_pool(self, node: fx.Node) -> None:
        size = self._module(node).output_size if node.op == "call_module" else _argument(node, "output_size")
        (h, w), wanted = self._steps[self._input(node)].shape[-2:], _pair(size)
        out = (wanted[0] or h, wanted[1] or w)
        if h % out[0] or w % out[1]:
            raise self._refuse(node, f"must divide its input evenly (got {h}x{w} to {out[0]}x{out[1]})")
        kernel = (h // out[0], w // out[1])
        self._pool(node, kernel, kernel, (0, 0))

    def mean(self, node: fx.Node) -> None:
        source = self._input(node)
        dims, shape = _argument(node, "dim"), self._steps[source].shape
        over = sorted(dim % 4 for dim in dims if isinstance(dim, int)) if isinstance(dims, (tuple, list)) else []
        if over != [2, 3] or len(shape) != 3:
            raise self._refuse(node, f"must be the mean over H and W (got dim={dims})")
        self._pool(node, shape[-2:], shape[-2:], (0, 0))

    def _pool(self, node: fx.Node, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> None:
        options = {"kernel": tuple(kernel), "stride": tuple(stride), "padding": tuple(padding)}
        self._emit(node, "avg_pool2d", (self._input(node),), options=options)

    def flatten(self, node: fx.Node) -> None:
        start = self._module(node).start_dim if node.op == "call_module" else _argument(node, "start_dim")
        if start != 1 or len(node.meta["tensor_meta"].shape) != 2:
            raise self._refuse(node, "must flatten everything but the batch (start_dim=1)")
        self._emit(node, "flatten", (self._input(node),))

    def narrow(self, node: fx.Node) -> None:
        """Some channels of a result: each party takes them of its own share."""
        numbers = node.args[1:]
        if len(numbers) != 3 or numbers[0] != 1 or not all(isinstance(number, int) for number in numbers):
            raise self._refuse(node, f"must take channels, narrow(1, start, length) (got {numbers})")
        options = {"start": numbers[1], "length": numbers[2]}
        self._emit(node, "narrow", (self._input(node),), options=options)

    def concat(self, node: fx.Node) -> None:
        parts, dim = node.args[0], _argument(node, "dim")
        known = isinstance(parts, (tuple, list)) and all(isinstance(p, fx.Node) and p in self._at for p in parts)
        if not known or dim != 1:
            raise self._refuse(node, f"must join earlier results along their channels, dim=1 (got dim={dim})")
        self._emit(node, "concat", tuple(self._at[part] for part in parts))  # type: ignore[index, union-attr]

    def passes(self, node: fx.Node) -> None:
        self._at[node] = self._input(node)


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, (tuple, list)) else (value, value)


def _argument(node: fx.Node, keyword: str) -> Any:
    """The call's second argument, or None."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get(keyword)


_MODULES: dict[type, Callable[[_Lowering, fx.Node], None]] = {
    nn.Conv2d: _Lowering.conv2d,
    nn.Linear: _Lowering.linear,
    nn.BatchNorm2d: _Lowering.batch_norm,
    nn.ReLU: _Lowering.relu,
    SharedReLU2d: _Lowering.shared,
    MaskedReLU2d: _Lowering.mask,
    nn.AvgPool2d: _Lowering.avg_pool,
    nn.AdaptiveAvgPool2d: _Lowering.adaptive_pool,
    nn.Flatten: _Lowering.flatten,
    nn.Identity: _Lowering.passes,
    nn.Dropout: _Lowering.passes,
}
_FUNCTIONS: dict[object, Callable[[_Lowering, fx.Node], None]] = {
    operator.add: _Lowering.add,
    operator.iadd: _Lowering.add,
    torch.add: _Lowering.add,
    F.relu: _Lowering.relu,
    torch.relu: _Lowering.relu,
    torch.flatten: _Lowering.flatten,
    torch.mean: _Lowering.mean,
    torch.cat: _Lowering.concat,
    F.adaptive_avg_pool2d: _Lowering.adaptive_pool,
}
_METHODS: dict[str, Callable[[_Lowering, fx.Node], None]] = {
    "add": _Lowering.add,
    "add_": _Lowering.add,
    "relu": _Lowering.relu,
    "relu_": _Lowering.relu,
    "flatten": _Lowering.flatten,
    "mean": _Lowering.mean,
    "narrow": _Lowering.narrow,
}
