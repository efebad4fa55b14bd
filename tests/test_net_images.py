"""Images as the client reads them: the same numbers as training's, and one clear error for what is no image."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deepshare.data.dataset import Dataset, Split
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import decode
from deepshare.secure.net.images import prepare_images, read_images

MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.25, 0.125]


def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=generator)


def write(folder: Path, name: str, images: torch.Tensor) -> Path:
    path = folder / name
    if name.endswith(".npy"):
        np.save(path, images.numpy())
    elif name.endswith(".pt"):
        torch.save(images, path)
    else:
        image_of(images).save(path)
    return path


def image_of(images: torch.Tensor):
    image = pytest.importorskip("PIL.Image")
    return image.fromarray(images.permute(1, 2, 0).squeeze(2).numpy())


@pytest.mark.parametrize("name", ["a.npy", "a.pt", "a.png"])
def test_what_is_read_is_normalised_as_in_training(name: str, tmp_path: Path):
    images = pixels()[:1]
    path = write(tmp_path, name, images if name != "a.png" else images[0])
    read = read_images(path, 3)
    split = Split(images, torch.zeros(1, dtype=torch.int64))
    dataset = Dataset("any", 1, (3, 5, 4), tuple(MEAN), tuple(STD), split, split, split)
    prepared = prepare_images(read, (3, 5, 4), MEAN, STD, name)
    assert (decode(prepared) - dataset.normalise(images).double()).abs().max() <= 2**-17  # half a unit of the encoding


def test_grey_and_coloured_images_become_what_the_network_reads(tmp_path: Path):
    grey = write(tmp_path, "grey.png", pixels()[0, :1])
    assert torch.equal(read_images(grey, 3), read_images(grey, 1).expand(1, 3, 5, 4))
    assert read_images(write(tmp_path, "colour.png", pixels()[0]), 1).shape == (1, 1, 5, 4)


def test_floats_and_batches_are_taken_as_they_are(tmp_path: Path):
    floats = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    for name in ("a.npy", "a.pt"):
        assert torch.equal(read_images(write(tmp_path, name, floats), 3), floats)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.png", None, "does not exist"),
        ("a.png", b"no picture", "cannot be read: UnidentifiedImageError"),
        ("a.npy", b"\x93NUMPY", "cannot be read"),
        ("a.pt", b"PK", "cannot be read"),
        ("int.npy", torch.zeros(3, 5, 4, dtype=torch.int64), r"must be uint8 or float.*got int64 \[3, 5, 4\]"),
        ("flat.npy", torch.zeros(5, 4), r"got float32 \[5, 4\]"),
        ("bright.pt", torch.full((3, 5, 4), 2.0), r"pixels in 0\.\.1"),
        ("nan.pt", torch.full((3, 5, 4), torch.nan), r"pixels in 0\.\.1"),
    ],
)
def test_what_is_no_image_is_refused_by_name(name: str, content, message: str, tmp_path: Path):
    path = tmp_path / name
    if isinstance(content, bytes):
        if name.endswith(".png"):
            pytest.importorskip("PIL.Image")
        path.write_bytes(content)
    elif content is not None:
        write(tmp_path, name, content)
    with pytest.raises(SecureError, match=rf"image {path} .*{message}"):
        read_images(path, 3)


def test_a_pickle_is_not_run(tmp_path: Path):
    torch.save({"images": pixels()}, tmp_path / "a.pt")
    with pytest.raises(SecureError, match="must hold a tensor"):
        read_images(tmp_path / "a.pt", 3)


def test_another_size_or_number_of_channels_is_refused(tmp_path: Path):
    with pytest.raises(SecureError, match=r"must be \[3, 5, 5\] as the network's \(got \[3, 5, 4\]\)"):
        prepare_images(pixels().float() / 255, (3, 5, 5), MEAN, STD, "a.npy")
    pytest.importorskip("PIL.Image")
    with pytest.raises(SecureError, match="the network reads 4 channels"):
        read_images(write(tmp_path, "a.png", pixels()[0]), 4)
