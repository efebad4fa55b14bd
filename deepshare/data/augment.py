"""Random changes to training images: drawn for a whole epoch at once, applied to a batch on its device.

What is drawn lies on the device before the first batch, so that no batch makes the host wait or copies anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepshare.data.errors import DataError

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as torchvision's and Pillow's greyscale


@dataclass(frozen=True, eq=False)
class Changes:
    """What happens to each of N images.

    window: int64 [2, N], row and column in the padded image where the crop begins
    mirrored: bool [N]
    factors: float32 [4, N], of brightness, contrast, saturation and hue
    order: in which the four are applied, to all N
    """

    window: Tensor
    mirrored: Tensor
    factors: Tensor
    order: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Changes:
        return Changes(self.window[:, rows], self.mirrored[rows], self.factors[:, rows], self.order)


@dataclass(frozen=True)
class Augment:
    """Which random changes, each drawn per image.

    crop_padding: pixels of zero padding around the image before a crop of its own size (0: no crop)
    flip: mirror left-right with probability 1/2
    brightness, contrast, saturation, hue: strengths of colour jitter, torchvision's ColorJitter (0: off); RGB only. Its
        order is drawn per batch, there per image
    """

    crop_padding: int = 0
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise DataError(f"crop_padding must be at least 0 (got {self.crop_padding})")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} must be between 0 and 1 (got {getattr(self, name)})")
        if not 0 <= self.hue <= 0.5:
            raise DataError(f"hue must be between 0 and 0.5 (got {self.hue})")

    @property
    def strengths(self) -> tuple[float, float, float, float]:
        return self.brightness, self.contrast, self.saturation, self.hue

    @property
    def changes_nothing(self) -> bool:
        return not (self.crop_padding or self.flip or any(self.strengths))

    def draw(
        self,
        batches: int,
        batch_size: int,
        generator: torch.Generator,  # of the CPU: the same changes on every device
        device: torch.device,
    ) -> Iterator[Changes]:
        """The changes of `batches` batches, drawn in one go and copied to `device` in one go."""
        count = batches * batch_size
        window = torch.randint(2 * self.crop_padding + 1, (2, count), generator=generator).to(device)
        mirrored = (torch.rand(count, generator=generator) < 0.5).to(device)
        spread = torch.rand(4, count, generator=generator).mul_(2).sub_(1) * torch.tensor(self.strengths)[:, None]
        factors = (spread + torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None]).to(device)
        orders = torch.rand(batches, 4, generator=generator).argsort(dim=1).tolist()
        for step, order in enumerate(orders):
            batch = slice(step * batch_size, (step + 1) * batch_size)
            yield Changes(window, mirrored, factors, tuple(order))[batch]

    def __call__(
        self,
        images: Tensor,  # uint8 [N, C, H, W]
        changes: Changes,  # of N images
    ) -> Tensor:
        """The changed images as float32 [N, C, H, W] in [0, 1]."""
        if self.crop_padding:
            images = _crop(images, changes.window, self.crop_padding)
        if self.flip:
            images = torch.where(changes.mirrored[:, None, None, None], images.flip(3), images)
        unit = images.float() / 255
        return _jitter(unit, changes, self.strengths) if any(self.strengths) else unit


def _crop(images: Tensor, window: Tensor, padding: int) -> Tensor:
    """A window of each image's own size from the image with a border of zeros."""
    count, _, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: [N, C, 2 padding + 1, 2 padding + 1, H, W]
    return windows[torch.arange(count, device=images.device), :, window[0], window[1]]


def _jitter(unit: Tensor, changes: Changes, strengths: Sequence[float]) -> Tensor:
    if unit.shape[1] != 3:
        raise DataError(f"colour jitter needs RGB images (got {unit.shape[1]} channels)")
    for kind in changes.order:
        if strengths[kind]:
            unit = CHANGES[kind](unit, changes.factors[kind].view(-1, 1, 1, 1))
    return unit


def brighten(unit: Tensor, factor: Tensor) -> Tensor:
    """factor * x, cut to [0, 1]; unit is [N, 3, H, W] in [0, 1] and factor [N, 1, 1, 1], here and below."""
    return (unit * factor).clamp_(0, 1)


def contrast(unit: Tensor, factor: Tensor) -> Tensor:
    """factor * x + (1 - factor) * mean grey of the image, cut to [0, 1]."""
    return _blend(unit, _grey(unit).mean((2, 3), keepdim=True), factor)


def saturate(unit: Tensor, factor: Tensor) -> Tensor:
    """factor * x + (1 - factor) * grey, cut to [0, 1]."""
    return _blend(unit, _grey(unit), factor)


def turn_hue(unit: Tensor, turn: Tensor) -> Tensor:
    """The hue turned by `turn` of the colour circle, saturation and value (of HSV) kept.

    With v the largest channel, c the largest minus the least and h the hue in [0, 1), channel n of RGB is
    v - c * clamp(min(k, 4 - k), 0, 1), k = (n + 6 h) mod 6, n = 5, 3, 1.
    """
    red, green, blue = unit.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    steepness = chroma.clamp_min(torch.finfo(unit.dtype).tiny).reciprocal_()  # of grey nothing is seen: c is 0 below
    sixths = torch.where(
        red == value,
        (green - blue) * steepness,
        torch.where(green == value, (blue - red) * steepness + 2, (red - green) * steepness + 4),
    )
    k = sixths + 6 * turn + torch.arange(5, 0, -2, device=unit.device).view(3, 1, 1)
    k -= 6 * (k / 6).floor_()  # torch.remainder takes three times as long on a CPU
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def _blend(unit: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """torch.lerp takes four times as long on a CPU where it has to broadcast."""
    return (unit * factor).add_(other * (1 - factor)).clamp_(0, 1)


def _grey(unit: Tensor) -> Tensor:
    """[N, 1, H, W]"""
    red, green, blue = unit.split(1, dim=1)
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


CHANGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (brighten, contrast, saturate, turn_hue)
