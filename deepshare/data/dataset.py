"""A data set as three splits of uint8 images that live on one device, and how they are cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from deepshare.data.augment import Augment
from deepshare.data.batches import Batches
from deepshare.data.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    images: uint8 [N, C, H, W], 0..255
    labels: int64 [N]
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise DataError(
                f"Split: images must be uint8 [N, C, H, W] (got {self.images.dtype} {list(self.images.shape)})"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"Split: labels must be int64 [{len(self.images)}] (got {self.labels.dtype} {list(self.labels.shape)})"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        """The rows at `indices` (int64 [M]), in that order."""
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Train, validation and test split with the statistics that normalise them.

    input_size: (C, H, W); mean, std: per channel, of pixels scaled to [0, 1], over all official training images
    (validation included, so that they do not depend on the cut).
    """

    name: str
    num_classes: int
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    val: Split
    test: Split

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with every split on `device`."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    def normalise(self, images: Tensor) -> Tensor:
        """(x - mean) / std in float32, for uint8 images or floats already in [0, 1]: [N, C, H, W] -> same shape."""
        unit = images.float() / 255 if images.dtype == torch.uint8 else images
        return (unit - _per_channel(self.mean, unit.device)) / _per_channel(self.std, unit.device)

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        augment: Augment | None = None,
        seed: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> Batches:
        """Batches of `split` ("train", "val" or "test"): in order, or shuffled and augmented by `seed`; of each the
        part of rank share[0] of share[1]."""
        if split not in ("train", "val", "test"):
            raise DataError(f"batches: split must be train, val or test (got {split!r})")
        part: Split = getattr(self, split)
        return Batches(
            part.images, part.labels, batch_size, normalise=self.normalise, augment=augment, seed=seed, share=share
        )


@lru_cache(maxsize=16)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[C, 1, 1] on `device`, copied there once and not at every batch."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 [N, C, H, W], in units of [0, 1]; exact, from histograms."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        centre = (share * levels).sum()
        mean.append(centre.item())
        std.append((share * (levels - centre) ** 2).sum().sqrt().item())
    return tuple(mean), tuple(std)


def stratified(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cut `count` rows out so that every class keeps its share (largest remainder).

    labels: int64 [N]; returns (chosen [count], rest [N - count]), sorted indices. The same seed, the same cut.
    """
    if not 0 <= count <= len(labels):
        raise DataError(f"stratified: count must be between 0 and {len(labels)} (got {count})")
    if not 0 <= seed < 2**63:
        raise DataError(f"stratified: seed must be between 0 and 2^63 - 1 (got {seed})")
    per_class = torch.bincount(labels)
    exact = per_class.double() * (count / max(len(labels), 1))
    quota = exact.floor().long()
    by_remainder = torch.argsort(exact - quota, descending=True, stable=True)
    quota[by_remainder[: count - int(quota.sum())]] += 1
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label, wanted in enumerate(quota.tolist()):
        members = (labels == label).nonzero().flatten()
        mask[members[torch.randperm(len(members), generator=generator)[:wanted]]] = True
    return mask.nonzero().flatten(), (~mask).nonzero().flatten()


def cut(official: Split, val_fraction: float, seed: int, limit: int | None) -> tuple[Split, Split]:
    """(train, val) of the official training images; `limit` then keeps a stratified part of train alone."""
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction must be in [0, 1) (got {val_fraction})")
    val, train = stratified(official.labels, round(val_fraction * len(official)), seed)
    if limit is not None:
        if not 1 <= limit <= len(train):
            raise DataError(f"limit must be between 1 and {len(train)}, the training images left (got {limit})")
        train = train[stratified(official.labels[train], limit, seed)[0]]
    return official.take(train), official.take(val)
