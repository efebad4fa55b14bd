"""What is measured: activations of the papers' networks, and the bytes each pass must move.

Bytes count every tensor once, read or written: a replicate's prototype is read again from a cache, vectors [C] do not
count. docs/benchmarks.md has the table.
"""

import math
from dataclasses import dataclass

import torch

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True)
class Shape:
    """One activation [N, C, H, W] with P prototypes."""

    batch: int
    channels: int
    size: int  # H and W
    prototypes: int

    @property
    def dimensions(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.size, self.size

    def __str__(self) -> str:
        return "x".join(map(str, self.dimensions))


@dataclass(frozen=True)
class Case:
    """A shape, stored in one dtype and memory order."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    layout: str = "nchw"

    @property
    def x_bytes(self) -> int:
        """Bytes of one activation."""
        return math.prod(self.shape.dimensions) * torch.empty((), dtype=self.dtype).element_size()

    @property
    def gate_bytes(self) -> int:
        """Bytes of the prototypes' packed gates."""
        return self.shape.batch * self.shape.prototypes * self.shape.size**2 // 8

    @property
    def mask_bytes(self) -> int:
        """Bytes of a mask per pixel, float32."""
        return 4 * self.shape.channels * self.shape.size**2

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')} {self.layout}"


def bytes_moved(form: str, direction: str, case: Case) -> int:
    """Bytes that one forward or backward pass of a form (providers.py) must move."""
    x, gates, mask = case.x_bytes, case.gate_bytes, case.mask_bytes
    return {
        ("plain", "forward"): 2 * x,  # x, y
        ("plain", "backward"): 3 * x,  # x, dy, dx
        ("soft", "forward"): 2 * x,
        ("soft", "backward"): 3 * x,
        ("residual", "forward"): 3 * x,  # x, residual, y
        ("residual", "backward"): 4 * x,  # x, residual, dy, dx, which is both gradients
        ("emit", "forward"): 2 * x + gates,
        ("follower", "forward"): 2 * x + gates,
        ("follower", "backward"): 3 * x + gates,
        ("masked", "forward"): 2 * x + mask,
        ("masked", "backward"): 3 * x + 2 * mask,  # the mask and its gradient
        ("share", "forward"): 5 * x + gates,  # opened, flip, offset, toggle, the share
    }[form, direction]


# ResNet18's first and last stage on 32x32 images, 8 MiB and 128 MiB in float32: inside and beyond a CPU's caches.
ON_CPU = (Shape(8, 64, 32, 16), Shape(8, 512, 4, 1), Shape(32, 64, 32, 16), Shape(128, 256, 32, 64))
# The same stages at a training batch, then 64 MiB in bfloat16 (128 MiB in float32), and a GiB (two).
ON_GPU = (Shape(128, 64, 32, 16), Shape(128, 512, 4, 1), Shape(256, 128, 32, 32), Shape(512, 256, 64, 64))
