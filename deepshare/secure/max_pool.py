"""Max pooling as steps on shares: gather the windows, then a tournament of max(u, v) = v + relu(u - v).

A window of K elements takes K - 1 comparisons a result, in ceil(log2 K) levels. At the border PyTorch pads with minus
infinity; a window there repeats one of its own elements instead, so that no large number stands among the shares.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """What a max pooling reads, per dimension (H, W)."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def rows(self) -> "Window":
        """The vertical part: columns stay."""
        return Window((self.kernel[0], 1), (self.stride[0], 1), (self.padding[0], 0), (self.dilation[0], 1))

    def columns(self) -> "Window":
        """The horizontal part: rows stay."""
        return Window((1, self.kernel[1]), (1, self.stride[1]), (0, self.padding[1]), (1, self.dilation[1]))

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


def passes(window: Window, size: Pair, out: Pair) -> list[tuple[Window, Pair]]:
    """(window, size of the result) of each pass: rows then columns where that compares less in no more levels.

    A maximum over H and W is one over H, then one over W. Windows that overlap share the first: 3x3 with stride 2 takes
    6 comparisons a result and not 8.
    """
    (height, width), (tall, wide) = window.kernel, out
    apart = levels(height) + levels(width) == levels(window.taps)
    fewer = (height - 1) * size[1] < (height - 1) * width * wide
    if apart and fewer:
        return [(window.rows(), (tall, size[1])), (window.columns(), out)]
    return [(window, out)]


def levels(taps: int) -> int:
    """ceil(log2 taps)."""
    return (taps - 1).bit_length()


def window_index(
    window: Window, channels: int, size: Pair, out: Pair
) -> Tensor:  # int64 [taps * channels * out H * out W]
    """Flat indices into one image [channels, *size], in the order [tap, channel, row, column] of the result.

    Raises:
        ValueError: some window holds no element of the image (PyTorch gives minus infinity there).
    """
    rows = _positions(0, window, size, out)[:, None, None, :, None]
    columns = _positions(1, window, size, out)[None, :, None, None, :]
    channel = torch.arange(channels).reshape(1, 1, -1, 1, 1) * (size[0] * size[1])
    return (channel + rows * size[1] + columns).reshape(-1)


def _positions(dimension: int, window: Window, size: Pair, out: Pair) -> Tensor:
    """[kernel, out]: where each tap stands; a tap outside the image stands where its window's first one inside does."""
    kernel, stride = window.kernel[dimension], window.stride[dimension]
    starts = torch.arange(out[dimension]) * stride - window.padding[dimension]
    taps = starts + torch.arange(kernel).reshape(-1, 1) * window.dilation[dimension]
    inside = (taps >= 0) & (taps < size[dimension])
    if not bool(inside.any(0).all()):
        raise ValueError(f"a window holds no element of the image ({window}, image {size[0]}x{size[1]})")
    first = taps.gather(0, inside.int().argmax(0, keepdim=True))
    return torch.where(inside, taps, first)
