"""Convolution in Z_2^64 in plain PyTorch: the specification of every other backend, and the way where none is.

    y[n, o, i, j] = sum over c, u, v of x[n, g C/G + c, s i + d u - p, s j + d v - p] * weight[o, c, u, v]   mod 2^64

with g = o // (O / G), G groups, and x zero outside. The contract: docs/ring.md.
"""

import torch
from torch import Tensor
from torch.nn import functional

LIMB_BITS = 16
LIMBS = 64 // LIMB_BITS
# Products of two limbs are below 2^32: the sum of so many, in any order, stays below 2^53, where fp64 is exact.
LONGEST_SUM = 2 ** (53 - 2 * LIMB_BITS)


def ring_conv2d(
    x: Tensor,  # int64 [N, C, H, W]
    weight: Tensor,  # int64 [O, C/groups, kh, kw]
    packed: Tensor | None,  # this and the next: for the native kernels
    pairs: Tensor | None,
    stride_h: int,
    stride_w: int,
    padding_h: int,
    padding_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
) -> Tensor:
    """int64 [N, O, H', W']; on the CPU torch's own, which wraps around, elsewhere by `ring_conv2d_limbs`."""
    stride, padding, dilation = (stride_h, stride_w), (padding_h, padding_w), (dilation_h, dilation_w)
    if not x.is_cpu:
        return ring_conv2d_limbs(x, weight, stride, padding, dilation, groups)
    return functional.conv2d(x, weight, None, stride, padding, dilation, groups).contiguous()


def ring_conv2d_limbs(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """The same by fp64 matrix products, for devices whose matrix products know no int64."""
    patches = _patches(x, weight.shape[2:], stride, padding, dilation)
    batch, _, kernel_h, kernel_w, height, width = patches.shape
    depth = weight.shape[1] * kernel_h * kernel_w
    columns = patches.reshape(batch, groups, depth, height * width)
    rows = weight.reshape(groups, weight.shape[0] // groups, depth)
    y = x.new_zeros(batch, groups, rows.shape[1], height * width)
    for first in range(0, depth, LONGEST_SUM):
        part = slice(first, first + LONGEST_SUM)
        y += _matmul_limbs(rows[:, :, part], columns[:, :, part])
    return y.reshape(batch, weight.shape[0], height, width)


def _patches(
    x: Tensor, kernel: torch.Size, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """A view [N, C, kh, kw, H', W'] of the padded x."""
    padded = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    windows = padded.unfold(2, spans[0], stride[0]).unfold(3, spans[1], stride[1])
    return windows[..., :: dilation[0], :: dilation[1]].permute(0, 1, 4, 5, 2, 3)


def _matmul_limbs(rows: Tensor, columns: Tensor) -> Tensor:
    """rows [G, O, K] @ columns [N, G, K, L] mod 2^64, K at most LONGEST_SUM: 10 products of 16-bit limbs.

    Limbs i and j weigh 2^(16 (i + j)): from i + j = 4 on nothing of them is left.
    """
    left, right = _limbs(rows), _limbs(columns)
    y = columns.new_zeros(columns.shape[0], rows.shape[0], rows.shape[1], columns.shape[3])
    for i in range(LIMBS):
        for j in range(LIMBS - i):
            y += torch.matmul(left[i], right[j]).to(torch.int64) << (LIMB_BITS * (i + j))
    return y


def _limbs(words: Tensor) -> list[Tensor]:
    """fp64, the lowest 16 bits first, each in [0, 2^16)."""
    mask = (1 << LIMB_BITS) - 1
    return [((words >> (LIMB_BITS * i)) & mask).to(torch.float64) for i in range(LIMBS)]
