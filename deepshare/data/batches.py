"""Batches of a split, made on the device where the images are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepshare.data.augment import Augment
from deepshare.data.errors import DataError


class Batches:
    """Iterate over (images float32 [B, C, H, W], labels int64 [B]), normalised.

    Without `seed`: in order, every image, the last batch may be short (evaluation).
    With `seed`: shuffled, and augmented if `augment` is given; a short last batch is dropped, because batch
    normalisation over a handful of images is noise (over one 1x1 image, an error). Two iterations over one object
    are equal: a new epoch is a new object with a new seed.
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
    ) -> None:
        if batch_size < 1:
            raise DataError(f"Batches: batch_size must be at least 1 (got {batch_size})")
        if augment is not None and seed is None:
            raise DataError("Batches: augment needs a seed")
        self.images, self.labels, self.batch_size = images, labels, min(batch_size, max(len(labels), 1))
        self.normalise, self.augment, self.seed = normalise, augment, seed

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole + (rest > 0 and self.seed is None)

    @property
    def image_count(self) -> int:
        """Images one iteration passes on."""
        return min(len(self) * self.batch_size, len(self.labels))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._in_order() if self.seed is None else self._shuffled(self.seed)

    def _in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            if len(labels):
                yield self.normalise(images), labels

    def _shuffled(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        for step in range(len(self)):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            images = self.images[rows].float() / 255
            if self.augment is not None:
                images = self.augment(images, seed=seed + step + 1)
            yield self.normalise(images), self.labels[rows]
