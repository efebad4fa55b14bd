"""What is measured: activations of the papers' networks, and the bytes that each pass must move.

Bytes count every tensor once: forward reads x and writes y (2 * numel * size), backward reads grad and x and writes
dx (3 * numel * size). Gates come from x itself and are counted with it.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """One activation [N, C, H, W] with P prototypes."""

    name: str
    batch: int
    channels: int
    size: int  # H and W
    prototypes: int

    def bytes(self, dtype: torch.dtype, tensors: int) -> int:
        """Bytes of `tensors` tensors of this shape."""
        return tensors * self.batch * self.channels * self.size**2 * torch.empty((), dtype=dtype).element_size()


FORWARD_TENSORS, BACKWARD_TENSORS = 2, 3

# ResNet18 on 32x32 (stages 1 and 4, training batch) and 64x64; one prototype in four, one alone at the lowest budgets.
ON_GPU = (
    Shape("r18-32-stage1", 128, 64, 32, 16),
    Shape("r18-32-stage4", 128, 512, 4, 1),
    Shape("r18-64-stage1", 256, 64, 64, 16),
    Shape("large", 512, 256, 64, 64),
)
# Inside and beyond the cache of two cores.
ON_CPU = (Shape("r18-32-stage1", 8, 64, 32, 16), Shape("r18-32-stage4", 8, 512, 4, 1))
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
