"""Tiny-ImageNet's folder, as a small one of the same layout: order, labels, pixels, cache, and every refusal."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from deepshare import data
from deepshare.data import tiny_imagenet
from deepshare.data.tiny_imagenet import Layout, load_tiny_imagenet_splits

Image = pytest.importorskip("PIL.Image")
SMALL = Layout(classes=3, images=4, val=5, side=8)
NAMES = ("n03", "n01", "n02")  # not sorted: the order of wnids.txt is what counts


def shade(split: str, number: int) -> tuple[int, int, int]:
    return (20 * number, 100, 200) if split == "train" else (200, 20 * number, 100)


def write_jpeg(path: Path, colour: tuple[int, int, int], side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path, quality=95)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / SMALL.folder
    for place, name in enumerate(NAMES):
        for number in range(SMALL.images):
            file = folder / "train" / name / "images" / f"{name}_{number}.JPEG"
            write_jpeg(file, shade("train", place * SMALL.images + number))
    lines = []
    for number in range(SMALL.val):
        write_jpeg(folder / "val" / "images" / f"val_{number}.JPEG", shade("val", number))
        lines.append(f"val_{number}.JPEG\t{NAMES[number % 3]}\t0\t0\t7\t7")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (folder / "wnids.txt").write_text("\n".join(NAMES) + "\n")
    Image.new("L", (8, 8), 77).save(folder / "train" / "n01" / "images" / "n01_2.JPEG")  # some are grey
    return folder


def test_images_and_labels_are_those_of_the_files(folder):
    train, val = load_tiny_imagenet_splits(folder.parent, SMALL)
    assert (train.images.shape, val.images.shape) == ((12, 3, 8, 8), (5, 3, 8, 8))
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert val.labels.tolist() == [0, 1, 2, 0, 1]
    for split, images in (("train", train.images), ("val", val.images)):
        for number, image in enumerate(images):
            wanted = (77, 77, 77) if (split, number) == ("train", 6) else shade(split, number)
            assert (image.flatten(1).float().mean(1) - torch.tensor(wanted)).abs().max() < 3  # JPEG rounds


def test_a_file_is_decoded_once_and_again_when_it_changes(folder, monkeypatch):
    first = load_tiny_imagenet_splits(folder, SMALL)
    (cache,) = folder.glob(".deepshare-*")
    assert np.load(cache).shape == (17, 3, 8, 8)
    monkeypatch.setattr(tiny_imagenet, "_decode", lambda files, out: pytest.fail("decoded again"))
    again = load_tiny_imagenet_splits(folder, SMALL)
    assert all(torch.equal(one.images, other.images) for one, other in zip(first, again, strict=True))
    monkeypatch.undo()
    write_jpeg(folder / "val" / "images" / "val_0.JPEG", (10, 10, 10))
    os.utime(folder / "val" / "images" / "val_0.JPEG", (0, 0))
    _, val = load_tiny_imagenet_splits(folder, SMALL)
    assert val.images[0].max() < 20
    (newer,) = folder.glob(".deepshare-*")
    assert newer != cache


def test_a_damaged_cache_is_made_again(folder):
    train, _ = load_tiny_imagenet_splits(folder, SMALL)
    (cache,) = folder.glob(".deepshare-*")
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-100])
    assert torch.equal(load_tiny_imagenet_splits(folder, SMALL)[0].images, train.images)
    assert cache.read_bytes() == whole


def test_where_nothing_can_be_written_there_is_no_cache(folder, monkeypatch):
    def full(file, pixels):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    train, _ = load_tiny_imagenet_splits(folder, SMALL)
    assert len(train) == 12
    assert not [*folder.rglob(".deepshare*"), *folder.parent.glob(".deepshare*")]


def broken(folder: Path, which: str) -> None:
    annotations = folder / "val" / "val_annotations.txt"
    if which == "no list of classes":
        (folder / "wnids.txt").unlink()
    elif which == "a class too few":
        (folder / "wnids.txt").write_text("n01\nn02\n")
    elif which == "a class twice":
        (folder / "wnids.txt").write_text("n01\nn02\nn01\n")
    elif which == "an image too few":
        (folder / "train" / "n02" / "images" / "n02_3.JPEG").unlink()
    elif which == "a class without a folder":
        shutil.rmtree(folder / "train" / "n02")
    elif which == "an annotation too few":
        annotations.write_text("".join(annotations.read_text().splitlines(keepends=True)[:-1]))
    elif which == "an unknown class":
        annotations.write_text(annotations.read_text().replace("n02", "n09"))
    elif which == "a missing image":
        (folder / "val" / "images" / "val_3.JPEG").unlink()
    elif which == "an image twice":
        annotations.write_text(annotations.read_text().replace("val_3", "val_2"))
    elif which == "another size":
        write_jpeg(folder / "train" / "n02" / "images" / "n02_3.JPEG", (1, 2, 3), side=9)
    elif which == "no JPEG":
        (folder / "train" / "n02" / "images" / "n02_3.JPEG").write_bytes(b"\xff\xd8 and no more")


REFUSED = {
    "no list of classes": r"wnids.txt: not found at .*tiny-imagenet-200.zip",
    "a class too few": r"wnids.txt: wanted 3 classes, found 2",
    "a class twice": r"wnids.txt: wanted 3 classes, found 3",
    "an image too few": r"n02/images: wanted 4 .JPEG files, found 3",
    "a class without a folder": r"n02/images: wanted 4 .JPEG files, found 0",
    "an annotation too few": r"val_annotations.txt: wanted 5 annotated images, found 4",
    "an unknown class": r"val_annotations.txt, line 3: wanted a file and one of wnids.txt's classes, got .*n09",
    "a missing image": r"val/images: wanted val_3.JPEG of val_annotations.txt, found 4",
    "an image twice": r"val_annotations.txt: wanted each image once, found 4",
    "another size": r"n02_3.JPEG: wanted 8x8 pixels, got 9x9",
    "no JPEG": r"n02_3.JPEG: no JPEG that can be decoded",
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_is_not_the_official_folder_is_refused(folder, which):
    broken(folder, which)
    with pytest.raises(data.DataError, match=REFUSED[which]):
        load_tiny_imagenet_splits(folder, SMALL)
    assert not list(folder.rglob(".deepshare*"))


def test_the_official_layout_is_wanted_by_default(folder):
    with pytest.raises(data.DataError, match="give the folder that holds it as --data-root"):
        data.load("tiny-imagenet")
    with pytest.raises(data.DataError, match=r"wnids.txt: wanted 200 classes, found 3"):
        data.load("tiny-imagenet", folder.parent)


def test_it_is_a_data_set_like_the_others(folder, monkeypatch):
    monkeypatch.setattr(data, "load_tiny_imagenet_splits", lambda root: load_tiny_imagenet_splits(root, SMALL))
    loaded = data.load("tiny-imagenet", folder, val_fraction=0.25)
    assert (loaded.num_classes, loaded.input_size) == (200, (3, 8, 8))
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (9, 3, 5)
    assert loaded.val.labels.tolist() == [0, 1, 2]
