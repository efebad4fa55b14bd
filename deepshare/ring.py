"""Convolution and matrix product in Z_2^64: the linear layers of secret-shared inference. docs/ring.md has more."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepshare.raw_ops import IMPLEMENTATIONS, choose_backend

# Output channels that lie side by side for the native kernels (csrc/cpu/ring_tile.h).
_BLOCK = 32
# With fewer output channels a group they walk along the pixels instead, and take the weight as it is.
_FEW = 4


@dataclass(frozen=True)
class PackedWeight:
    """A weight that many calls use, rearranged once by `pack_weight`; it stands wherever a weight does.

    Attributes:
        weight: int64 [O, C/groups, kh, kw]; of `ring_linear` [O, K, 1, 1].
        groups: of the convolution.
        packed: the native CPU kernels' copy [groups, blocks, C/groups * kh * kw, 32 output channels], int32 where every
            value fits (`narrow`); None where they need none.
        pairs: with it, int64 [groups, blocks, 32]: each channel's sum of w1 w2 over the pairs of neighbouring products.
        is_linear: whether it was made of a matrix, for `ring_linear`.
    """

    weight: Tensor
    groups: int
    packed: Tensor | None
    pairs: Tensor | None
    is_linear: bool

    @property
    def narrow(self) -> bool:
        """Whether the packed values are of 32 bits, which halves what a call reads."""
        return self.packed is not None and self.packed.dtype == torch.int32


def pack_weight(weight: Tensor, groups: int = 1) -> PackedWeight:
    """Rearrange a weight for `ring_conv2d` or `ring_linear`, once for many calls.

    >>> x, weight = torch.randint(-9, 9, (1, 4, 5, 5)), torch.randint(-9, 9, (6, 2, 3, 3))
    >>> kept = pack_weight(weight, groups=2)
    >>> torch.equal(ring_conv2d(x, kept, groups=2), ring_conv2d(x, weight, groups=2))
    True

    Args:
        weight: int64 [O, C/groups, kh, kw] of a convolution, or [K, O] of `ring_linear`; copied.
        groups: of the convolution; 1 for a matrix.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or range than stated here.
    """
    _check_words("pack_weight", "weight", weight)
    if weight.dim() not in (2, 4) or (weight.dim() == 4 and 0 in weight.shape[2:]):
        raise ValueError(f"pack_weight: weight must be [O, C/groups, kh, kw] or [K, O] (got {list(weight.shape)})")
    _check_int("pack_weight", "groups", groups, 1)
    if weight.dim() == 2 and groups != 1:
        raise ValueError(f"pack_weight: groups must be 1 for a matrix (got {groups})")
    if weight.dim() == 4 and weight.shape[0] % groups:
        raise ValueError(f"pack_weight: groups must divide O = {weight.shape[0]} (got {groups})")
    is_linear = weight.dim() == 2
    filters = _as_filter(weight) if is_linear else weight
    return _packed(filters, groups, is_linear=is_linear, keep=True, panels=weight.is_cpu)


def _as_filter(matrix: Tensor) -> Tensor:
    """[K, O] as a 1x1 filter [O, K, 1, 1]."""
    return matrix.t()[:, :, None, None]


def _packed(weight: Tensor, groups: int, *, is_linear: bool, keep: bool, panels: bool) -> PackedWeight:
    """`keep`: for many calls, so that it is worth looking whether 32 bits hold every value. `panels`: for the CPU."""
    per_group = weight.shape[0] // groups
    own = weight.clone(memory_format=torch.contiguous_format) if keep else weight
    if not panels or per_group < _FEW or weight.numel() == 0:
        return PackedWeight(own, groups, None, None, is_linear)
    count = -(-per_group // _BLOCK)
    rows = weight.reshape(groups, per_group, -1)
    if keep and bool((weight.to(torch.int32) == weight).all()):
        rows = rows.to(torch.int32)
    if per_group % _BLOCK:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, count * _BLOCK - per_group))
    packed = rows.reshape(groups, count, _BLOCK, -1).transpose(2, 3).contiguous()
    pairs = _sums_of_pairs(packed)
    return PackedWeight(own, groups, packed, pairs, is_linear)


def _sums_of_pairs(packed: Tensor) -> Tensor:
    """What (x1 + w2) (x2 + w1) has more than x1 w1 + x2 w2 + x1 x2 (csrc/cpu/ring_tile.h), over all pairs of steps."""
    second = packed[:, :, 1::2].long()
    return (packed[:, :, 0::2][:, :, : second.shape[2]] * second).sum(2)


def ring_conv2d(
    x: Tensor,  # int64 [N, C, H, W]
    weight: Tensor | PackedWeight,  # int64 [O, C/groups, kh, kw]
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Convolution of words in Z_2^64: torch's conv2d of int64, on CPU and CUDA tensors, exact.

        y[n, o, i, j] = sum over c, u, v of x[n, g C/G + c, s i + d u - p, s j + d v - p] * weight[o, c, u, v]  mod 2^64

    with g = o // (O / G) for G groups, and x zero outside. Equivalent PyTorch, on the CPU:

    >>> x, weight = torch.randint(-(2**63), 2**63 - 1, (2, 3, 8, 8)), torch.randint(-(2**31), 2**31, (4, 3, 3, 3))
    >>> torch.equal(ring_conv2d(x, weight, padding=1), torch.nn.functional.conv2d(x, weight, padding=1))
    True

    Args:
        x: any strides.
        weight: on x's device; or what `pack_weight` made of it, which saves packing it at every call.
        stride, padding, dilation: one number, or two for height and width.
        groups: divides C and O; that of a PackedWeight must be the same.
        backend: as in `shared_relu`; every one gives the same bits.

    Returns:
        int64 [N, O, H', W'], contiguous; H' = (H + 2 p - d (kh - 1) - 1) // s + 1. There is no gradient.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or range than stated here.
        RuntimeError: the forced backend is not available; the message says why.
    """
    op = "ring_conv2d"
    _check_words(op, "x", x)
    if isinstance(weight, PackedWeight) and weight.is_linear:
        raise ValueError(f"{op}: weight must be of a convolution (got one packed for ring_linear)")
    _check_weight(op, x, weight)
    strides, paddings, dilations = (
        _pair(op, name, value, least)
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    )
    _check_int(op, "groups", groups, 1)
    filters = weight.weight if isinstance(weight, PackedWeight) else weight
    if isinstance(weight, PackedWeight) and weight.groups != groups:
        raise ValueError(f"{op}: groups must be {weight.groups}, for which weight was packed (got {groups})")
    _check_shapes(x, filters, groups)
    for size, kernel, p, d in zip(x.shape[2:], filters.shape[2:], paddings, dilations, strict=True):
        if size + 2 * p < d * (kernel - 1) + 1:
            wanted = f"at least {d * (kernel - 1) + 1} high and wide with its padding, as weight is"
            raise ValueError(f"{op}: x must be {wanted} (got {size} + 2 * {p})")
    return _run(op, x, weight, (*strides, *paddings, *dilations), groups, backend)


def ring_linear(
    x: Tensor,  # int64 [N, K]
    weight: Tensor | PackedWeight,  # int64 [K, O]
    backend: str | None = None,
) -> Tensor:
    """Matrix product of words in Z_2^64, y = x @ weight mod 2^64.

    >>> x, weight = torch.randint(-(2**63), 2**63 - 1, (2, 5)), torch.randint(-(2**31), 2**31, (5, 3))
    >>> torch.equal(ring_linear(x, weight), x @ weight)
    True

    Args:
        x: any strides.
        weight: on x's device; or what `pack_weight` made of it.
        backend: as in `shared_relu`; every one gives the same bits.

    Returns:
        int64 [N, O], the transpose of a contiguous tensor where N > 1.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or device than stated here.
        RuntimeError: the forced backend is not available; the message says why.
    """
    op = "ring_linear"
    _check_words(op, "x", x)
    if isinstance(weight, PackedWeight) and not weight.is_linear:
        raise ValueError(f"{op}: weight must be a matrix [K, O] (got one packed for ring_conv2d)")
    _check_weight(op, x, weight)
    matrix = weight.weight[:, :, 0, 0].t() if isinstance(weight, PackedWeight) else weight
    if x.dim() != 2 or matrix.dim() != 2 or matrix.shape[0] != x.shape[1]:
        raise ValueError(f"{op}: x must be [N, K] and weight [K, O] (got {list(x.shape)} and {list(matrix.shape)})")
    # The samples as the pixels of one image: the kernels keep a weight they have read for several pixels.
    image = x.t()[None, :, None, :]
    filters = weight if isinstance(weight, PackedWeight) else _as_filter(weight)
    return _run(op, image, filters, (1, 1, 0, 0, 1, 1), 1, backend)[0, :, 0].t()


def _run(
    op: str, x: Tensor, weight: Tensor | PackedWeight, geometry: tuple[int, ...], groups: int, backend: str | None
) -> Tensor:
    chosen = choose_backend("ring_conv2d", backend, x.device.type, caller=op)
    if not isinstance(weight, PackedWeight):
        weight = _packed(weight, groups, is_linear=False, keep=False, panels=chosen == "cpu")
    filters = weight.weight
    if 0 in (x.shape[0], x.shape[1], filters.shape[0], filters.shape[1], x.shape[2], x.shape[3]):
        return _empty_or_zero(x, filters, geometry)
    return IMPLEMENTATIONS[chosen]["ring_conv2d"](x, filters, weight.packed, weight.pairs, *geometry, groups)


def _empty_or_zero(x: Tensor, filters: Tensor, geometry: tuple[int, ...]) -> Tensor:
    """What a convolution over nothing gives: no element, or sums of no term."""
    sizes = (
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(
            x.shape[2:], filters.shape[2:], geometry[:2], geometry[2:4], geometry[4:], strict=True
        )
    )
    return x.new_zeros(x.shape[0], filters.shape[0], *sizes)


def _check_words(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} must be an int64 tensor (got {got})")


def _check_weight(op: str, x: Tensor, weight: Tensor | PackedWeight) -> None:
    words = weight.weight if isinstance(weight, PackedWeight) else weight
    if not isinstance(words, Tensor) or words.dtype != torch.int64:
        got = words.dtype if isinstance(words, Tensor) else type(words).__name__
        raise TypeError(f"{op}: weight must be an int64 tensor or a PackedWeight (got {got})")
    if words.device != x.device:
        raise ValueError(f"{op}: weight must be on x's device {x.device} (got {words.device})")


def _check_shapes(x: Tensor, weight: Tensor, groups: int) -> None:
    if x.dim() != 4 or weight.dim() != 4 or 0 in weight.shape[2:]:
        raise ValueError(
            "ring_conv2d: x must be [N, C, H, W] and weight [O, C/groups, kh, kw] "
            f"(got {list(x.shape)} and {list(weight.shape)})"
        )
    if x.shape[1] != groups * weight.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"ring_conv2d: groups must divide C and O, and weight must have C / groups channels "
            f"(got {groups} groups, x {list(x.shape)}, weight {list(weight.shape)})"
        )


def _check_int(op: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{op}: {name} must be an int, at least {least} (got {value!r})")


def _pair(op: str, name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    """(height, width) of one number or two."""
    pair = tuple(value) if isinstance(value, tuple | list | torch.Size) else (value, value)
    for number in pair:
        if isinstance(number, bool) or not isinstance(number, int) or number < least or len(pair) != 2:
            raise ValueError(f"{op}: {name} must be an int or two, at least {least} (got {value!r})")
    return pair[0], pair[1]
