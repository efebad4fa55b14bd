"""CIFAR-10 and CIFAR-100 from the official python-format folders.

The files are pickles, and a pickle can run any code: only files with the published md5 are opened, and what is
unpickled is the very bytes that were checked.
"""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from deepshare.data.dataset import Split
from deepshare.data.errors import DataError

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class Official:
    """What the official archive holds: its folder, its files with their md5, and the key of the labels."""

    folder: str
    archive: str
    train: dict[str, str]
    test: dict[str, str]
    label_key: bytes


CIFAR10 = Official(
    "cifar-10-batches-py",
    "cifar-10-python.tar.gz",
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    {"test_batch": "40351d587109b95175f43aff81a1287e"},
    b"labels",
)
CIFAR100 = Official(
    "cifar-100-python",
    "cifar-100-python.tar.gz",
    {"train": "16019d7e3df5f24257cddd939b257f8d"},
    {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    b"fine_labels",
)
CIFAR100_COARSE = replace(CIFAR100, label_key=b"coarse_labels")  # the 20 superclasses of the same images


def load_cifar_splits(official: Official, root: str | Path | None) -> tuple[Split, Split]:
    """(training images, test images) of the folder `root`/`official.folder` (or of that folder itself).

    Raises DataError, before anything is unpickled, if a file is missing or has another md5 than the published one.
    """
    if root is None:
        raise DataError(
            f"{official.folder}: give the folder that holds it as --data-root "
            f"({official.archive} from {PAGE}, unpacked)"
        )
    folder = Path(root)
    if folder.name != official.folder:
        folder = folder / official.folder
    return _read(folder, official, official.train), _read(folder, official, official.test)


def _read(folder: Path, official: Official, files: dict[str, str]) -> Split:
    checked = [_checked_bytes(folder / name, md5, official) for name, md5 in files.items()]
    images, labels = [], []
    for content in checked:
        batch = pickle.loads(content, encoding="bytes")
        images.append(np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
        labels.extend(batch[official.label_key])
    return Split(torch.from_numpy(np.concatenate(images)), torch.tensor(labels, dtype=torch.int64))


def _checked_bytes(path: Path, md5: str, official: Official) -> bytes:
    where = f"wanted md5 {md5}, from {official.archive} at {PAGE}"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path.name}: not found at {path.absolute()} ({where})") from None
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read at {path.absolute()}: {error} ({where})") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(
            f"{path.name}: {path.absolute()} has md5 {found}; it is not the official file and was not opened ({where})"
        )
    return content
