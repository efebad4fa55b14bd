"""Random changes to a batch of training images, on their device, by kornia."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from deepshare.data.errors import DataError


@dataclass(frozen=True)
class Augment:
    """Which random changes, each drawn per image.

    crop_padding: pixels of zero padding around the image before a crop of its own size (0: no crop)
    flip: mirror left-right with probability 1/2
    brightness, contrast, saturation, hue: strengths of colour jitter as in torchvision (0: off); RGB only
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
    def jitters(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation, self.hue))

    def __call__(
        self,
        images: Tensor,  # float [N, C, H, W] in [0, 1]
        seed: int,
    ) -> Tensor:
        """The changed batch, same shape; the same seed gives the same changes and touches no other generator."""
        channels, height, width = images.shape[1:]
        if self.jitters and channels != 3:
            raise DataError(f"colour jitter needs RGB images (got {channels} channels)")
        # kornia draws from PyTorch's global CPU generator, also for images on a GPU: seed it here, then restore it.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for step in _steps(self, height, width):
                images = step(images)
        return images


@lru_cache(maxsize=8)
def _steps(augment: Augment, height: int, width: int) -> tuple[nn.Module, ...]:
    """kornia's modules for `augment`: made once, they keep nothing from batch to batch that matters."""
    try:
        import kornia.augmentation as K  # 0.25 s to import; whoever does not train does not pay for it
    except ImportError as error:
        raise DataError("augmentation needs kornia, which is not installed: pip install kornia") from error

    steps: list[nn.Module] = []
    if augment.crop_padding:
        # "resample" moves the whole batch in one grid_sample; "slice" loops over images. Shifts are whole pixels,
        # so both give the same image to 1e-6 (a test holds kornia to that).
        steps.append(K.RandomCrop((height, width), padding=augment.crop_padding, cropping_mode="resample"))
    if augment.flip:
        steps.append(K.RandomHorizontalFlip(p=0.5))
    if augment.jitters:
        strengths = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
        steps.append(K.ColorJitter(*strengths, p=1.0))
    return tuple(steps)
