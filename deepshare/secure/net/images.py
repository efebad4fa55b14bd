"""Images as a user has them: PNG (by Pillow), .npy or .pt, to fixed point as the network wants them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import encode


def read_images(path: Path, channels: int) -> Tensor:
    """Pixels in [0, 1], float32 [N, C, H, W]; uint8 is divided by 255. An image file gives N = 1.

    Args:
        channels: what the network reads: an image file is converted to grey (1) or RGB (3).

    Raises:
        SecureError: there is no such file, or it holds no image (named).
    """
    if not path.is_file():
        raise SecureError(f"secure: image {path} does not exist")
    pixels = _read(path, channels)
    if pixels.dim() not in (3, 4) or not (pixels.dtype == torch.uint8 or pixels.is_floating_point()):
        got = f"{str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}"
        raise SecureError(f"secure: image {path} must be uint8 or float, [C, H, W] or [N, C, H, W] (got {got})")
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise SecureError(f"secure: image {path} must have pixels in 0..1, or uint8 (some lie outside)")
    return pixels


def _read(path: Path, channels: int) -> Tensor:
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.suffix == ".pt":
            loaded = torch.load(path, weights_only=True)
            if not isinstance(loaded, Tensor):
                raise SecureError(f"secure: image {path} must hold a tensor (got {type(loaded).__name__})")
            return loaded
    except SecureError:
        raise
    except Exception as error:  # whatever a garbled file makes the readers raise
        raise SecureError(f"secure: image {path} cannot be read: {type(error).__name__}") from error
    return _read_with_pillow(path, channels)


def _read_with_pillow(path: Path, channels: int) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise SecureError(f"secure: image {path} needs Pillow: pip install pillow ({error})") from error
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise SecureError(f"secure: image {path} must be .npy or .pt: the network reads {channels} channels")
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert(modes[channels]))
    except Exception as error:  # Pillow raises many kinds for garbled files
        raise SecureError(f"secure: image {path} cannot be read: {type(error).__name__}") from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels).copy()).permute(2, 0, 1)


def prepare_images(
    pixels: Tensor,  # [N, C, H, W] in [0, 1]
    size: tuple[int, ...],
    mean: list[float],
    std: list[float],
    name: str,
) -> Tensor:
    """(x - mean) / std with 16 fractional bits, int64 [N, C, H, W]. Raises SecureError for another size."""
    if tuple(pixels.shape[1:]) != size:
        raise SecureError(f"secure: image {name} must be {list(size)} as the network's (got {list(pixels.shape[1:])})")
    per_channel = (-1, 1, 1)
    normal = (pixels - torch.tensor(mean).view(per_channel)) / torch.tensor(std).view(per_channel)
    return encode(normal, name=f"image {name}")
