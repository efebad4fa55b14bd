"""Image data sets on the device as one uint8 tensor a split, and augmented batches of them."""

from __future__ import annotations

from pathlib import Path

from deepshare.data.augment import Augment
from deepshare.data.batches import Batch, Batches
from deepshare.data.cifar import CIFAR10, CIFAR100, CIFAR100_COARSE, load_cifar_splits
from deepshare.data.dataset import Dataset, Split, cut, statistics
from deepshare.data.digits import load_digits_splits
from deepshare.data.errors import DataError
from deepshare.data.tiny_imagenet import load_tiny_imagenet_splits

__all__ = ["NAMES", "Augment", "Batch", "Batches", "DataError", "Dataset", "Split", "load"]

_CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100, "cifar100-coarse": CIFAR100_COARSE}
_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "cifar100-coarse": 20, "tiny-imagenet": 200}
NAMES = tuple(_CLASSES)


def load(
    name: str,
    root: str | Path | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
) -> Dataset:
    """The data set `name`, on the CPU (`.to(device)` moves it).

    root: folder with the official files (CIFAR, Tiny-ImageNet; see DataError's message for what is wanted)
    val_fraction: share of the official training images kept for validation, stratified, chosen by `seed`
    limit: keep this many training images, stratified, chosen by `seed`; validation and test stay whole

    Raises DataError: unknown name, missing or wrong file, impossible cut.
    """
    official, test = _official(name, root)
    mean, std = statistics(official.images)
    train, val = cut(official, val_fraction, seed, limit)
    channels, height, width = official.images.shape[1:]
    return Dataset(name, _CLASSES[name], (channels, height, width), mean, std, train, val, test)


def _official(name: str, root: str | Path | None) -> tuple[Split, Split]:
    if name == "digits":
        return load_digits_splits()
    if name in _CIFAR:
        return load_cifar_splits(_CIFAR[name], root)
    if name == "tiny-imagenet":
        return load_tiny_imagenet_splits(root)
    raise DataError(f"unknown data set {name!r}: there are {', '.join(NAMES)}")
