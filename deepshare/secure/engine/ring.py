"""Local work on shares in Z_2^64: the linear operations and the truncation."""

from math import prod

from torch import Tensor

from deepshare.ring import PackedWeight, pack_weight, ring_conv2d, ring_linear
from deepshare.secure.fixed_point import SCALE_BITS
from deepshare.secure.program import Step

LINEAR = ("conv2d", "linear", "affine")
_ROLES = {"conv2d": ("weight", "bias"), "linear": ("weight", "bias"), "affine": ("scale", "shift")}


def weight_role(step: Step) -> str:
    return _ROLES[step.op][0]


def bias_role(step: Step) -> str:
    return _ROLES[step.op][1]


def packed(step: Step, weight: Tensor) -> PackedWeight | Tensor:
    """A linear step's weight, rearranged once for many inferences."""
    return weight if step.op == "affine" else pack_weight(weight, step.options.get("groups", 1))


def apply_linear(step: Step, x: Tensor, weight: PackedWeight | Tensor) -> Tensor:
    """conv2d, linear or affine mod 2^64, without bias and truncation; x [N, *S] int64."""
    if isinstance(weight, Tensor) and step.op == "affine":
        return x * weight
    return ring_conv2d(x, weight, **step.options) if step.op == "conv2d" else ring_linear(x, weight)


def truncate(share: Tensor, bits: int, party: int) -> Tensor:
    """T of docs/share.md: the results add up to v / 2^bits, rounded to a neighbour, but with probability |v| / 2^64."""
    if bits == 0:
        return share
    return share >> bits if party == 0 else -(-share >> bits)


def sum_windows(step: Step, x: Tensor) -> Tensor:
    """Sums over avg_pool2d's windows; x [N, C, H, W] int64."""
    kernel, stride, padding = (tuple(step.options[name]) for name in ("kernel", "stride", "padding"))
    n, c, h, w = x.shape
    if kernel == stride and padding == (0, 0) and h % kernel[0] == 0 and w % kernel[1] == 0:
        return x.reshape(n, c, h // kernel[0], kernel[0], w // kernel[1], kernel[1]).sum((3, 5))
    return ring_conv2d(x, x.new_ones(c, 1, *kernel), stride=stride, padding=padding, groups=c)


def division(step: Step) -> tuple[int, int]:
    """(factor, bits): a window's mean is T(sum * factor, bits). Exact for 2^k elements, else 1/n in 16 bits."""
    elements = prod(step.options["kernel"])
    power = elements.bit_length() - 1
    return (1, power) if elements == 1 << power else (round(2**SCALE_BITS / elements), SCALE_BITS)
