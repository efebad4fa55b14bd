"""What a student distils from: a frozen network's logits, computed as batches come or once for all images."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from deepshare.data import Batch


class Teacher(Protocol):
    """The logits [B, K] of a batch, float32 at least, without gradient."""

    def __call__(self, batch: Batch) -> Tensor: ...


class Network:
    """A frozen network, which sees the same images as the student."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def __call__(self, batch: Batch) -> Tensor:
        with torch.inference_mode():
            logits = self.network(batch.images)
        return full_precision(logits.clone())  # a copy made outside: autograd refuses to save inference tensors


class KnownLogits:
    """A table of what `teacher` says of every image, for images that no augmentation changes.

    batches: the whole split in order, unaugmented
    """

    def __init__(self, teacher: Teacher, batches: Iterable[Batch]) -> None:
        self.logits = torch.cat([teacher(batch) for batch in batches])

    def __call__(self, batch: Batch) -> Tensor:
        return self.logits[batch.rows]


def full_precision(logits: Tensor) -> Tensor:
    """Half-precision logits as float32: softmax and losses are computed in it."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
