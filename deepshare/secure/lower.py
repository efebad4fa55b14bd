"""From a PyTorch model to a Program: one method for each operation (walk.py has what they share)."""

import copy
import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from deepshare.find import function_kind, plain_kind
from deepshare.fold import affine_of, fold_batch_norm
from deepshare.nn import MaskedReLU2d, SharedReLU2d
from deepshare.secure.fixed_point import SCALE_BITS, encode
from deepshare.secure.max_pool import Pair, Window, passes, window_index
from deepshare.secure.program import Program
from deepshare.secure.walk import Encoder, Walk, note_shapes, trace

SUPPORTED = (
    "Conv2d, Linear, BatchNorm2d, ReLU, SharedReLU2d, MaskedReLU2d, addition of two tensors or of a bias, AvgPool2d, "
    "MaxPool2d, AdaptiveAvgPool2d, AdaptiveMaxPool2d, mean over H and W, Flatten, Identity, Dropout, "
    "narrow and cat along the channels"
)
_CLIPS = (
    "clips at 6: a second comparison of every element, which is not supported; put a relu or shared site there "
    "(Plan.replace, convert) and finetune"
)


def lower(
    model: nn.Module, input_shape: tuple[int, int, int], *, encoder: Encoder = encode
) -> tuple[Program, dict[str, Tensor]]:
    """Program and integer weights of `model` in eval mode, for images of shape (C, H, W).

    The model is not changed. Weights are rounded to 16 fractional bits, biases to 32 (they join the product before its
    truncation); `encoder` may do otherwise.

    Raises:
        SecureError: the model cannot be traced, holds an operation that is not supported (named), has soft gates
            left, or a weight that does not fit the fixed-point range.
    """
    graph_module = trace(copy.deepcopy(model).cpu().eval())
    fold_batch_norm(graph_module)
    note_shapes(graph_module, input_shape)
    return _Lowering(graph_module).result(encoder)


class _Lowering(Walk):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._compared: set[tuple[int, int]] = set()
        super().__init__(graph_module)

    def _operation(self, node: fx.Node) -> Callable[[fx.Node], None]:
        found = self._found(node)
        if found is None:
            raise self._refuse(node, _CLIPS if self._clips(node) else f"is not supported; supported are {SUPPORTED}")
        return partial(found, self)

    def _found(self, node: fx.Node) -> "Callable[[_Lowering, fx.Node], None] | None":
        if node.op == "call_module":
            module = self._module(node)
            return _Lowering.relu if plain_kind(module) == "relu" else _MODULES.get(type(module))
        if node.op == "call_function":
            is_relu = function_kind(node.target) == "relu"
            return _Lowering.relu if is_relu else _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
        return _METHODS.get(str(node.target)) if node.op == "call_method" else None

    def _clips(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._module(node), nn.ReLU6)
        return node.op == "call_function" and function_kind(node.target) == "relu6"

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
        if any(isinstance(argument, fx.Node) and argument.op == "get_attr" for argument in node.args):
            self._add_bias(node)
            return
        left, right = self._input(node), self._input(node, 1)
        if node.kwargs or self._steps[left].shape != self._steps[right].shape:
            raise self._refuse(node, "must add two results of equal shape, without further arguments")
        self._emit(node, "add", (left, right))

    def _add_bias(self, node: fx.Node) -> None:
        """A bias for every position (`methods.merge`'s BiasMapConv2d) joins its layer's product before truncation."""
        constants = [argument for argument in node.args if isinstance(argument, fx.Node) and argument.op == "get_attr"]
        results = [argument for argument in node.args if isinstance(argument, fx.Node) and argument in self._at]
        bias = self._constant(constants[0])
        at = self._at[results[0]] if len(results) == 1 and len(results[0].users) == 1 else 0
        step = self._steps[at]
        alone = list(self._at.values()).count(at) == 1
        fits = bias.shape in (step.shape, (1, *step.shape)) and step.op in ("conv2d", "linear") and not node.kwargs
        if not (alone and fits):
            raise self._refuse(node, "adds a constant, which must be a bias of a convolution, of its result's shape")
        both = bias.double().reshape(step.shape)
        if "bias" in step.params:
            both = both + self._real[step.params["bias"]]
        key = self._param(step.name, "bias", both, 2 * SCALE_BITS)
        self._steps[at] = replace(step, params={**step.params, "bias": key})
        self._at[node] = at

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
        pool = self._settings(node, kernel_size=None, stride=None, padding=0, **_AVERAGE)
        padding = _pair(pool["padding"])
        inside = padding == (0, 0) or pool["count_include_pad"]
        if pool["ceil_mode"] or pool["divisor_override"] or not inside:
            raise self._refuse(node, "must have ceil_mode False, no divisor_override, count_include_pad True")
        kernel = _pair(pool["kernel_size"])
        self._average(node, kernel, _pair(pool["stride"] or kernel), padding)

    def max_pool(self, node: fx.Node) -> None:
        pool = self._settings(node, kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=0, return_indices=0)
        if pool["return_indices"]:
            raise self._refuse(node, "must not return indices")
        kernel = _pair(pool["kernel_size"])
        window = Window(kernel, _pair(pool["stride"] or kernel), _pair(pool["padding"]), _pair(pool["dilation"]))
        self._maximum(node, window)

    def adaptive_avg_pool(self, node: fx.Node) -> None:
        kernel = self._adaptive_kernel(node)
        self._average(node, kernel, kernel, (0, 0))

    def adaptive_max_pool(self, node: fx.Node) -> None:
        if self._settings(node, output_size=None, return_indices=False)["return_indices"]:
            raise self._refuse(node, "must not return indices")
        kernel = self._adaptive_kernel(node)
        self._maximum(node, Window(kernel, kernel))

    def _adaptive_kernel(self, node: fx.Node) -> Pair:
        wanted = _pair(self._settings(node, output_size=None)["output_size"])
        h, w = self._steps[self._input(node)].shape[-2:]
        out = (wanted[0] or h, wanted[1] or w)
        if h % out[0] or w % out[1]:
            raise self._refuse(node, f"must divide its input evenly (got {h}x{w} to {out[0]}x{out[1]})")
        return h // out[0], w // out[1]

    def mean(self, node: fx.Node) -> None:
        source = self._input(node)
        dims, shape = _argument(node, "dim"), self._steps[source].shape
        over = sorted(dim % 4 for dim in dims if isinstance(dim, int)) if isinstance(dims, (tuple, list)) else []
        if over != [2, 3] or len(shape) != 3:
            raise self._refuse(node, f"must be the mean over H and W (got dim={dims})")
        self._average(node, (shape[1], shape[2]), (shape[1], shape[2]), (0, 0))

    def _average(self, node: fx.Node, kernel: Pair, stride: Pair, padding: Pair) -> None:
        options = {"kernel": kernel, "stride": stride, "padding": padding}
        self._emit(node, "avg_pool2d", (self._input(node),), options=options)

    def _maximum(self, node: fx.Node, window: Window) -> None:
        """max(u, v) = v + relu(u - v), as a tournament over each window's elements (max_pool.py)."""
        name, at = self._name(node), self._input(node)
        out = self._shape(node)[-2:]
        for number, (part, size) in enumerate(passes(window, _pair(self._steps[at].shape[-2:]), _pair(out)), 1):
            channels, taps = self._steps[at].shape[0], part.taps
            at = self._gather_windows(node, f"{name}.pass{number}", at, part, size)
            while taps > 1:
                at = self._play(f"{name}.pass{number}.of{taps}", at, taps, channels)
                taps = (taps + 1) // 2
        self._steps[at] = replace(self._steps[at], name=name)
        self._at[node] = at

    def _play(self, name: str, source: int, taps: int, channels: int) -> int:
        """One level: half of each window's elements against the other half; one left over goes on as it is."""
        half, image = taps // 2 * channels, self._steps[source].shape[1:]

        def cut(role: str, start: int, length: int) -> int:
            options = {"start": start, "length": length}
            return self._append("narrow", f"{name}.{role}", (source,), (length, *image), options=options)

        left, right = cut("left", 0, half), cut("right", half, half)
        difference = self._append("sub", f"{name}.difference", (left, right), (half, *image))
        gain = self._append("relu", f"{name}.relu", (difference,), (half, *image))
        best = self._append("add", f"{name}.max", (right, gain), (half, *image))
        if taps % 2 == 0:
            return best
        rest = cut("rest", 2 * half, channels)
        return self._append("concat", f"{name}.joined", (best, rest), (half + channels, *image))

    def _gather_windows(self, node: fx.Node, name: str, source: int, window: Window, size: Pair) -> int:
        """A step of [taps * C, H, W]: all first taps of the windows, then all second ones, and so on."""
        channels, *image = self._steps[source].shape
        try:
            index = window_index(window, channels, (image[0], image[1]), size)
        except ValueError as error:
            raise self._refuse(node, f"cannot be lowered: {error}") from error
        self._public[f"{name}.index"] = index
        public = {"index": f"{name}.index"}
        return self._append("gather", f"{name}.windows", (source,), (window.taps * channels, *size), public=public)

    def flatten(self, node: fx.Node) -> None:
        """Any change of shape that leaves the batch alone."""
        self._emit(node, "reshape", (self._input(node),))

    def dropout(self, node: fx.Node) -> None:
        if self._settings(node, p=0.5, training=True)["training"]:
            raise self._refuse(node, "drops values at inference too (training=True)")
        self.passes(node)

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


_AVERAGE = {"ceil_mode": False, "count_include_pad": True, "divisor_override": None}


def _pair(value: Any) -> Pair:
    return (value[0], value[1]) if isinstance(value, (tuple, list)) else (value, value)


def _argument(node: fx.Node, keyword: str) -> Any:
    """The call's second argument, or None."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get(keyword)


_MODULES: dict[type, Callable[[_Lowering, fx.Node], None]] = {
    nn.Conv2d: _Lowering.conv2d,
    nn.Linear: _Lowering.linear,
    nn.BatchNorm2d: _Lowering.batch_norm,
    SharedReLU2d: _Lowering.shared,
    MaskedReLU2d: _Lowering.mask,
    nn.AvgPool2d: _Lowering.avg_pool,
    nn.MaxPool2d: _Lowering.max_pool,
    nn.AdaptiveAvgPool2d: _Lowering.adaptive_avg_pool,
    nn.AdaptiveMaxPool2d: _Lowering.adaptive_max_pool,
    nn.Flatten: _Lowering.flatten,
    nn.Identity: _Lowering.passes,
    nn.Dropout: _Lowering.passes,
    nn.Dropout2d: _Lowering.passes,
}
_FUNCTIONS: dict[object, Callable[[_Lowering, fx.Node], None]] = {
    operator.add: _Lowering.add,
    operator.iadd: _Lowering.add,
    torch.add: _Lowering.add,
    torch.flatten: _Lowering.flatten,
    torch.reshape: _Lowering.flatten,
    torch.mean: _Lowering.mean,
    torch.cat: _Lowering.concat,
    F.avg_pool2d: _Lowering.avg_pool,
    F.max_pool2d: _Lowering.max_pool,
    torch.max_pool2d: _Lowering.max_pool,
    F.adaptive_avg_pool2d: _Lowering.adaptive_avg_pool,
    F.adaptive_max_pool2d: _Lowering.adaptive_max_pool,
    F.dropout: _Lowering.dropout,
    F.dropout2d: _Lowering.dropout,
}
_METHODS: dict[str, Callable[[_Lowering, fx.Node], None]] = {
    "add": _Lowering.add,
    "add_": _Lowering.add,
    "relu": _Lowering.relu,
    "relu_": _Lowering.relu,
    "flatten": _Lowering.flatten,
    "reshape": _Lowering.flatten,
    "view": _Lowering.flatten,
    "mean": _Lowering.mean,
    "narrow": _Lowering.narrow,
}
