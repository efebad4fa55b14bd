"""Tiny-ImageNet (Stanford, CS231n) from its official folder tiny-imagenet-200: 200 classes at 64x64, as JPEGs.

The official validation images are the test split, as in the papers; the official test images have no labels. Decoding
takes minutes, so the pixels are kept beside the files, under a digest of their names, sizes and times.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from deepshare.data.dataset import Split
from deepshare.data.errors import DataError

ARCHIVE = "tiny-imagenet-200.zip, unpacked, from http://cs231n.stanford.edu/tiny-imagenet-200.zip"
CACHE = ".deepshare-pixels-{}.npy"  # in the folder, or else beside it
CHUNK = 1000  # images a thread decodes at a time
Pixels = np.ndarray  # uint8 [N, 3, side, side]


@dataclass(frozen=True)
class Layout:
    """What the official folder holds: `images` of each class to train with, `val` annotated ones, all side x side."""

    folder: str = "tiny-imagenet-200"
    classes: int = 200
    images: int = 500
    val: int = 10_000
    side: int = 64


OFFICIAL = Layout()


@dataclass(frozen=True)
class Listing:
    """Image files in the order of the split, and their labels: a class's place in wnids.txt."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]


def load_tiny_imagenet_splits(root: str | Path | None, layout: Layout = OFFICIAL) -> tuple[Split, Split]:
    """(official training images, official validation images) of `root`/tiny-imagenet-200, or of that folder itself.

    Raises DataError naming the file or folder, what was wanted and what is there: before an image is decoded for all
    that is missing or too many, at an image that cannot be decoded or is of another size. Without Pillow too.
    """
    if root is None:
        raise DataError(f"{layout.folder}: give the folder that holds it as --data-root ({ARCHIVE})")
    folder = Path(root) if Path(root).name == layout.folder else Path(root) / layout.folder
    classes = _classes(folder, layout)
    train, val = _train(folder, classes, layout), _val(folder, classes, layout)
    pixels = _pixels(folder, (*train.files, *val.files), layout.side)
    labels = torch.tensor(train.labels + val.labels, dtype=torch.int64)
    images, count = torch.from_numpy(pixels), len(train.files)
    return Split(images[:count], labels[:count]), Split(images[count:], labels[count:])


def _classes(folder: Path, layout: Layout) -> dict[str, int]:
    """Labels by name of the class, as "n02124075"."""
    names = _text(folder / "wnids.txt").split()
    _check(len(set(names)) == len(names) == layout.classes, folder / "wnids.txt", f"{layout.classes} classes", names)
    return {name: label for label, name in enumerate(names)}


def _train(folder: Path, classes: dict[str, int], layout: Layout) -> Listing:
    files: list[Path] = []
    for name in classes:
        images = folder / "train" / name / "images"
        found = sorted(images.glob("*.JPEG"))
        _check(len(found) == layout.images, images, f"{layout.images} .JPEG files", found)
        files += found
    return Listing(tuple(files), tuple(label for label in classes.values() for _ in range(layout.images)))


def _val(folder: Path, classes: dict[str, int], layout: Layout) -> Listing:
    table = folder / "val" / "val_annotations.txt"
    rows = [line.split("\t") for line in _text(table).splitlines() if line.strip()]
    _check(len(rows) == layout.val, table, f"{layout.val:,} annotated images", rows)
    files, labels = [], []
    for number, row in enumerate(rows, 1):
        if len(row) < 2 or row[1] not in classes:
            raise DataError(f"{table}, line {number}: wanted a file and one of wnids.txt's classes, got {row!r:.80}")
        files.append(folder / "val" / "images" / row[0])
        labels.append(classes[row[1]])
    there = set((folder / "val" / "images").glob("*.JPEG"))
    missing = sorted(set(files) - there)
    _check(not missing, folder / "val" / "images", f"{missing[0].name if missing else ''} of {table.name}", there)
    _check(len(set(files)) == len(files), table, "each image once", set(files))
    return Listing(tuple(files), tuple(labels))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        raise DataError(f"{path.name}: not found at {path.absolute()} ({ARCHIVE})") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name}: cannot be read at {path.absolute()}: {error} ({ARCHIVE})") from error


def _check(holds: bool, path: Path, wanted: str, found: Sequence[object] | set[Path]) -> None:
    if not holds:
        raise DataError(f"{path.absolute()}: wanted {wanted}, found {len(found):,} ({ARCHIVE})")


def _pixels(folder: Path, files: Sequence[Path], side: int) -> Pixels:
    """The decoded images, from the cache if it is of these very files; else decoded, and kept where it can be."""
    shape, name = (len(files), 3, side, side), CACHE.format(_digest(folder, files))
    places = (folder / name, folder.parent / name)
    for cached in places:
        try:
            pixels = np.load(cached)
        except (OSError, ValueError, EOFError):  # none, not ours to read, or damaged
            continue
        if pixels.shape == shape and pixels.dtype == np.uint8:
            return pixels
    pixels = _decode(files, np.empty(shape, np.uint8))
    any(_keep(pixels, cached) for cached in places)
    return pixels


def _keep(pixels: Pixels, cached: Path) -> bool:
    """Whether the cache could be written, whole; caches of other contents of the folder go. A full disk has none."""
    beside = cached.with_name(f".deepshare-{secrets.token_hex(4)}")
    try:
        with open(beside, "xb") as file:
            np.save(file, pixels)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, cached)
    except OSError:
        return False
    finally:
        beside.unlink(missing_ok=True)
    for old in cached.parent.glob(CACHE.format("*")):
        if old != cached:
            old.unlink(missing_ok=True)
    return True


def _digest(folder: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _decode(files: Sequence[Path], out: Pixels) -> Pixels:
    """Every file as RGB into its row of `out`; some are grey. Threads: Pillow lets others run while it decodes."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("Tiny-ImageNet's JPEGs need Pillow, which is not installed: pip install pillow") from error

    def decode(start: int) -> None:
        for row, file in enumerate(files[start : start + CHUNK], start):
            try:
                with Image.open(file) as image:
                    pixels = np.asarray(image.convert("RGB"))
            except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises of a broken file
                raise DataError(f"{file.absolute()}: no JPEG that can be decoded ({error})") from error
            if pixels.shape != (*out.shape[2:], 3):
                wanted = "x".join(map(str, out.shape[2:]))
                raise DataError(f"{file.absolute()}: wanted {wanted} pixels, got {pixels.shape[0]}x{pixels.shape[1]}")
            out[row] = pixels.transpose(2, 0, 1)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(decode, range(0, len(files), CHUNK)))
    return out
