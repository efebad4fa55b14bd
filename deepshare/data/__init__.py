"""Image data sets on the device as one uint8 tensor a split, and augmented batches of them."""

from __future__ import annotations

from pathlib import Path

from deepshare.data.augment import Augment
from deepshare.data.batches import Batches
from deepshare.data.cifar import CIFAR10, CIFAR100, load_cifar_splits
from deepshare.data.dataset import Dataset, Split, cut, statistics
from deepshare.data.digits import load_digits_splits
from deepshare.data.errors import DataError

__all__ = ["NAMES", "Augment", "Batches", "DataError", "Dataset", "Split", "load"]

NAMES = ("digits", "cifar10", "cifar100")


def load(
    name: str,
    root: str | Path | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
) -> Dataset:
    """The data set `name`, on the CPU (`.to(device)` moves it).

    root: folder with the official files (CIFAR only; see DataError's message for what is wanted)
    val_fraction: share of the official training images kept for validation, stratified, chosen by `seed`
    limit: keep this many training images, stratified, chosen by `seed`; validation and test stay whole

    Raises DataError: unknown name, missing or wrong file, impossible cut.
    """
    if name == "digits":
        official, test = load_digits_splits()
        num_classes = 10
    elif name in ("cifar10", "cifar100"):
        official, test = load_cifar_splits(CIFAR10 if name == "cifar10" else CIFAR100, root)
        num_classes = 10 if name == "cifar10" else 100
    else:
        raise DataError(f"unknown data set {name!r}: there are {', '.join(NAMES)}")
    mean, std = statistics(official.images)
    train, val = cut(official, val_fraction, seed, limit)
    channels, height, width = official.images.shape[1:]
    return Dataset(name, num_classes, (channels, height, width), mean, std, train, val, test)
