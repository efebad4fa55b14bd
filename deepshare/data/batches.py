"""Batches of a split, made on the device where the images are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deepshare.data.augment import Augment
from deepshare.data.errors import DataError


class Batch(NamedTuple):
    """images: float32 [B, C, H, W], normalised; labels: int64 [B]; rows: int64 [B], where in the split they stand"""

    images: Tensor
    labels: Tensor
    rows: Tensor


class Batches:
    """Iterate over a split's Batch objects.

    Without `seed`: in order, every image, the last batch may be short (evaluation).
    With `seed`: shuffled, and augmented if `augment` is given; a short last batch is dropped, because batch
    normalisation over a handful of images is noise (over one 1x1 image, an error). Two iterations over one object
    are equal: a new epoch is a new object with a new seed. All random numbers of an iteration are drawn before its
    first batch, by the CPU, so that every device sees the same batches.

    share: (rank, world): of every batch the rank's part alone, `world` parts of consecutive images; put together they
    are the batch that one process would see. With `seed` they must be equally long: a mean of means is the mean then.
    """

    def __init__(
        self,
        images: Tensor,  # uint8 [N, C, H, W]
        labels: Tensor,  # int64 [N]
        batch_size: int,
        *,
        normalise: Callable[[Tensor], Tensor],
        augment: Augment | None = None,
        seed: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        if batch_size < 1:
            raise DataError(f"Batches: batch_size must be at least 1 (got {batch_size})")
        if augment is not None and seed is None:
            raise DataError("Batches: augment needs a seed")
        rank, world = share
        if not 0 <= rank < world:
            raise DataError(f"Batches: share must be (rank, world) with 0 <= rank < world (got {share})")
        self.images, self.labels, self.batch_size = images, labels, min(batch_size, max(len(labels), 1))
        if seed is not None and self.batch_size % world:
            raise DataError(f"Batches: a batch of {self.batch_size} images cannot be shared equally by {world} ranks")
        self.normalise, self.augment, self.seed, self.share = normalise, augment, seed, share

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole + (rest > 0 and self.seed is None)

    @property
    def image_count(self) -> int:
        """Images one iteration passes on, those of all ranks together."""
        return min(len(self) * self.batch_size, len(self.labels))

    def __iter__(self) -> Iterator[Batch]:
        return self._in_order() if self.seed is None else self._shuffled(self.seed)

    def _part(self, count: int) -> slice:
        """Which of `count` images of a batch are this rank's."""
        rank, world = self.share
        return slice(count * rank // world, count * (rank + 1) // world)

    def _in_order(self) -> Iterator[Batch]:
        rows = torch.arange(len(self.labels), device=self.labels.device)
        for start in range(0, len(self.labels), self.batch_size):
            whole = slice(start, start + self.batch_size)
            part = self._part(len(self.labels[whole]))
            images = self.images[whole][part]
            if len(images):
                yield Batch(self.normalise(images), self.labels[whole][part], rows[whole][part])

    def _shuffled(self, seed: int) -> Iterator[Batch]:
        generator, device = torch.Generator().manual_seed(seed), self.labels.device
        order = torch.randperm(len(self.labels), generator=generator).to(device)
        part = self._part(self.batch_size)
        augment = self.augment or Augment()
        drawn = augment.draw(len(self), self.batch_size, generator, device)
        for step, changes in enumerate(drawn):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size][part]
            images = augment(self.images[rows], changes[part])
            yield Batch(self.normalise(images), self.labels[rows], rows)
