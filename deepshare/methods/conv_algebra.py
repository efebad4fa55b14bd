"""Convolutions as values: one after the other, and side by side, as one convolution."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepshare.fold import affine_of

Pair = tuple[int, int]


class MergeError(ValueError):
    """Two layers that are no one convolution; the message says why."""


class BiasMapConv2d(nn.Module):
    """y = conv(x) + bias_map: a convolution whose bias is a value per output position, for one image size.

    What a bias b becomes behind a zero-padded convolution: near the border fewer taps see it.

    Args:
        conv: without a bias.
        bias_map: [C, H, W], the shape of conv's output without the batch.
    """

    def __init__(self, conv: nn.Conv2d, bias_map: Tensor) -> None:
        super().__init__()
        self.conv = conv
        self.bias_map = nn.Parameter(bias_map)

    def forward(self, x: Tensor) -> Tensor:  # [N, I, H', W'] -> [N, C, H, W]
        return self.conv(x) + self.bias_map


@dataclass(frozen=True)
class Geometry:
    """What a convolution reads: tap a of output i stands at i * stride + a * dilation - padding, per dimension."""

    inputs: int
    outputs: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def reach(self) -> Pair:
        """From the first tap to the last."""
        return _pair(lambda d: (self.kernel[d] - 1) * self.dilation[d])

    @property
    def spacing(self) -> Pair:
        """Dilation; 0 where there is one tap, which fits any spacing (gcd(0, n) = n)."""
        return _pair(lambda d: self.dilation[d] if self.kernel[d] > 1 else 0)

    @property
    def padded(self) -> bool:
        return self.padding != (0, 0)

    def out_size(self, size: Pair) -> Pair:
        """(H, W) of the output for an input of (H, W)."""
        return _pair(lambda d: (size[d] + 2 * self.padding[d] - self.reach[d] - 1) // self.stride[d] + 1)

    def multiplications(self, positions: int) -> int:
        """Multiply-accumulates per image for `positions` = H*W of the output; taps on padding are counted."""
        return positions * self.outputs * (self.inputs // self.groups) * math.prod(self.kernel)

    def after(self, first: "Geometry") -> "Geometry":
        """Of the one convolution that reads what `first`, then this one, read."""
        unit = _pair(lambda d: math.gcd(first.spacing[d], self.spacing[d] * first.stride[d]) or 1)
        reach = _pair(lambda d: first.reach[d] + self.reach[d] * first.stride[d])
        return Geometry(
            first.inputs,
            self.outputs,
            _pair(lambda d: reach[d] // unit[d] + 1),
            _pair(lambda d: first.stride[d] * self.stride[d]),
            _pair(lambda d: first.padding[d] + self.padding[d] * first.stride[d]),
            unit,
            math.gcd(first.groups, self.groups),
        )

    def same_border_after(self, first: "Geometry") -> bool:
        """Whether that one convolution equals the two at the border too (biases aside).

        This one's padding puts zeros beside the result of `first`. The merged convolution goes on computing there;
        it finds zero only if `first` is pointwise and unpadded in that dimension, so that it looks at padding alone.
        """
        return all(self.padding[d] == 0 or (first.kernel[d] == 1 and first.padding[d] == 0) for d in (0, 1))

    def beside(self, other: "Geometry", size: Pair) -> "Geometry":
        """Of the one convolution that equals the sum of both on an input of `size`.

        Raises:
            MergeError: other strides, or no zero padding, the same at both ends, gives it the output size of both.
        """
        if self.stride != other.stride:
            raise MergeError(f"strides {self.stride} and {other.stride} differ")
        left = _pair(lambda d: max(self.padding[d], other.padding[d]))
        right = _pair(lambda d: max(one.reach[d] - one.padding[d] for one in (self, other)))
        offset = _pair(lambda d: abs(self.padding[d] - other.padding[d]))
        unit = _pair(lambda d: math.gcd(self.spacing[d], other.spacing[d], offset[d]) or 1)
        kernel = _pair(lambda d: (left[d] + right[d]) // unit[d] + 1)
        groups = math.gcd(self.groups, other.groups)
        merged = Geometry(self.inputs, self.outputs, kernel, self.stride, left, unit, groups)
        if not merged.out_size(size) == self.out_size(size) == other.out_size(size):
            raise MergeError(f"paddings {self.padding} and {other.padding} cannot be one padding")
        return merged


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution in float64.

    weight: [O, I / groups, kh, kw]; bias: [O], or [O, H, W] where it differs between output positions
    """

    geometry: Geometry
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, module: nn.Module) -> "Convolution | None":
        """A Conv2d, a Linear (as 1x1), a BatchNorm2d in eval mode (1x1 of one channel each), what `module` made; or
        None for what is no convolution, pads otherwise than with zeros, or pads both ends differently."""
        if isinstance(module, BiasMapConv2d):
            inner = cls.of(module.conv)
            return inner and replace(inner, bias=module.bias_map.detach().double())
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            scale, shift = affine_of(module)
            channels = module.num_features
            return cls(Geometry(channels, channels, groups=channels), scale.reshape(-1, 1, 1, 1), shift)
        if type(module) is nn.Linear:
            geometry = Geometry(module.in_features, module.out_features)
            return cls(geometry, module.weight.detach().double()[:, :, None, None], _bias_of(module))
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and _padding_of(module) is not None:
            return cls(_geometry_of(module), module.weight.detach().double(), _bias_of(module))
        return None

    @classmethod
    def identity(cls, channels: int, like: Tensor) -> "Convolution":
        """y = x, on the device of `like`."""
        ones = torch.ones(channels, 1, 1, 1, dtype=torch.float64, device=like.device)
        return cls(Geometry(channels, channels, groups=channels), ones, torch.zeros_like(ones).reshape(-1))

    def needs_map_after(self, first: "Convolution") -> bool:
        """Whether the bias of both, this one after `first`, differs between output positions."""
        seen = self.geometry.padded and bool(first.bias.any())
        return seen or first.bias.dim() > 1 or self.bias.dim() > 1

    def after(self, first: "Convolution", size: Pair | None) -> "Convolution":
        """This one on the result of `first`, as one convolution: W[a + b] is the sum of B[b] @ A[a] over its taps.

        size: (H, W) between the two, for a bias that sees this one's zero padding. None: a bias as if there were no
        border, the same at every position.
        """
        merged = self.geometry.after(first.geometry)
        inner, outer = _regrouped(first, merged.groups), _regrouped(self, merged.groups)
        inner_step = _ratio(first.geometry.spacing, merged.dilation)
        outer_step = _ratio(_pair(lambda d: self.geometry.spacing[d] * first.geometry.stride[d]), merged.dilation)
        weight = inner.new_zeros(merged.outputs, inner.shape[1], *merged.kernel)
        for row, column in itertools.product(range(outer.shape[2]), range(outer.shape[3])):
            start = row * outer_step[0], column * outer_step[1]
            weight[_window(start, inner, inner_step)] += _product(outer[:, :, row, column], inner, merged.groups)
        return Convolution(merged, weight, self._bias_after(first, size))

    def _bias_after(self, first: "Convolution", size: Pair | None) -> Tensor:
        own, bias = self.geometry, first.bias
        if size is None or not (bias.dim() > 1 or (own.padded and bool(bias.any()))):
            if bias.dim() > 1:
                raise MergeError("a bias per position cannot be taken for one that has no border")
            patch = bias[:, None, None].expand(-1, own.reach[0] + 1, own.reach[1] + 1)
            seen = F.conv2d(patch[None], self.weight, None, 1, 0, own.dilation, own.groups)[0, :, 0, 0]
        else:
            field = _as_map(bias).expand(-1, *size)
            seen = F.conv2d(field[None], self.weight, None, own.stride, own.padding, own.dilation, own.groups)[0]
        return _added(seen, self.bias)

    def beside(self, other: "Convolution", size: Pair) -> "Convolution":
        """The sum of both on an input of `size`, as one convolution. Raises MergeError as `Geometry.beside`."""
        merged = self.geometry.beside(other.geometry, size)
        weight = sum(_placed(one, merged) for one in (self, other))
        assert isinstance(weight, Tensor)
        return Convolution(merged, weight, _added(self.bias, other.bias))

    def module(self, like: Tensor, *, linear: bool) -> nn.Module:
        """nn.Linear, nn.Conv2d or BiasMapConv2d, in the dtype of `like`."""
        weight, bias = self.weight.to(like.dtype), self.bias.to(like.dtype)
        own, maps = self.geometry, self.bias.dim() > 1
        built: nn.Linear | nn.Conv2d
        with torch.device("meta"):  # the weights are put in below
            if linear:
                built = nn.Linear(own.inputs, own.outputs)
            else:
                shape = (own.kernel, own.stride, own.padding, own.dilation, own.groups)
                built = nn.Conv2d(own.inputs, own.outputs, *shape, bias=not maps)
        built.weight = nn.Parameter(weight.reshape(built.weight.shape))
        if maps:
            assert isinstance(built, nn.Conv2d)
            return BiasMapConv2d(built, bias)
        built.bias = nn.Parameter(bias)
        return built


def _pair(of: Callable[[int], int]) -> Pair:
    return of(0), of(1)


def _ratio(spacing: Pair, unit: Pair) -> Pair:
    """Taps `spacing` apart, counted in `unit`; 1 where there is one tap."""
    return _pair(lambda d: max(spacing[d] // unit[d], 1))


def _bias_of(module: nn.Linear | nn.Conv2d) -> Tensor:
    if module.bias is None:
        return torch.zeros(module.weight.shape[0], dtype=torch.float64, device=module.weight.device)
    return module.bias.detach().double()


def _geometry_of(conv: nn.Conv2d) -> Geometry:
    padding = _padding_of(conv)
    assert padding is not None
    kernel, stride, dilation = (_two(sizes) for sizes in (conv.kernel_size, conv.stride, conv.dilation))
    return Geometry(conv.in_channels, conv.out_channels, kernel, stride, padding, dilation, conv.groups)


def _padding_of(conv: nn.Conv2d) -> Pair | None:
    """Zeros at each end; None where both ends differ (padding="same" with an even reach)."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        reach = _pair(lambda d: conv.dilation[d] * (conv.kernel_size[d] - 1))
        return None if reach[0] % 2 or reach[1] % 2 else (reach[0] // 2, reach[1] // 2)
    return _two(conv.padding)


def _two(sizes: Any) -> Pair:
    return sizes[0], sizes[1]


def _regrouped(conv: Convolution, groups: int) -> Tensor:
    """The weight as one of `groups` groups, a divisor of its own: [O, I / groups, kh, kw], zeros between groups."""
    own = conv.geometry
    if groups == own.groups:
        return conv.weight
    per_out, per_in, joined = own.outputs // own.groups, own.inputs // own.groups, own.groups // groups
    weight = conv.weight.new_zeros(own.outputs, own.inputs // groups, *own.kernel)
    for group in range(own.groups):
        rows = slice(group * per_out, (group + 1) * per_out)
        start = group % joined * per_in
        weight[rows, start : start + per_in] = conv.weight[rows]
    return weight


def _product(matrix: Tensor, weight: Tensor, groups: int) -> Tensor:
    """[O, M / groups] times [M, I / groups, kh, kw], group by group, tap by tap: [O, I / groups, kh, kw]."""
    left = matrix.reshape(groups, -1, matrix.shape[1])
    right = weight.reshape(groups, left.shape[2], -1)
    return (left @ right).reshape(matrix.shape[0], *weight.shape[1:])


def _window(start: Pair, weight: Tensor, step: Pair) -> tuple[slice, ...]:
    """Where the taps of `weight`, `step` apart, lie in a larger kernel."""
    ends = _pair(lambda d: start[d] + (weight.shape[2 + d] - 1) * step[d] + 1)
    return slice(None), slice(None), *(slice(start[d], ends[d], step[d]) for d in (0, 1))


def _placed(conv: Convolution, merged: Geometry) -> Tensor:
    """The weight inside the merged kernel, at the offset its own padding gives it."""
    own, inner = conv.geometry, _regrouped(conv, merged.groups)
    start = _pair(lambda d: (merged.padding[d] - own.padding[d]) // merged.dilation[d])
    weight = inner.new_zeros(*inner.shape[:2], *merged.kernel)
    weight[_window(start, inner, _ratio(own.spacing, merged.dilation))] = inner
    return weight


def _as_map(bias: Tensor) -> Tensor:
    return bias if bias.dim() > 1 else bias[:, None, None]


def _added(one: Tensor, other: Tensor) -> Tensor:
    return _as_map(one) + _as_map(other) if one.dim() != other.dim() else one + other
