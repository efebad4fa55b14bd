"""What a model's name stands for: its family, and the shape the papers give it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deepshare.models import vgg
from deepshare.models.layers import widths
from deepshare.models.mobilenet import MobileNetV1, MobileNetV2
from deepshare.models.resnet import ResNet
from deepshare.models.wide_resnet import WideResNet
from deepshare.site import PlanError

# blocks per stage, 3x3 convolutions per block by stage
_RESNETS = {
    "resnet6": ((1, 1, 1, 1), (1, 1, 1, 1)),
    "resnet9": ((1, 1, 1, 1), (1, 2, 2, 2)),
    "resnet10": ((1, 1, 1, 1), (2, 2, 2, 2)),
    "resnet18": ((2, 2, 2, 2), (2, 2, 2, 2)),
    "resnet34": ((3, 4, 6, 3), (2, 2, 2, 2)),
}
HYBRID_BLOCKS = {"hrn": (2, 2, 2, 2), "hrn34": (3, 4, 6, 3)}
PATTERNS = ("wrn-D-K", "hrn-AxBxCx", "hrn34-AxBxCx")
PUBLISHED = (
    *_RESNETS,
    *("resnet20", "resnet32", "resnet56"),
    *("wrn-16-8", "wrn-22-4", "wrn-22-8", "wrn-28-10"),
    *("vgg16-bn", "vgg16-bn-fc", "mobilenetv1", "mobilenetv2"),
    *("hrn-5x5x3x", "hrn-5x7x2x", "hrn-6x6x2x", "hrn-7x5x2x"),
    *("hrn-2x5x3x", "hrn-2x7x2x", "hrn-2x6x2x", "hrn-2x5x2x", "hrn-2x6x3x", "hrn-2x9x2x"),
    *("hrn34-4x6x3x", "hrn34-4x9x2x", "hrn34-2x6x3x"),
)


@dataclass(frozen=True)
class Family:
    """What a name stands for.

    Attributes:
        width: channels of its first convolution, as published.
        stages: how many it has beside conv1.
        build: makes the model from `width`, `multipliers` and `blocks` (as published or changed) and the settings that
            all families share.
        multipliers, blocks: its shape, which may be changed; None in families whose shape is fixed.
        stem: which ReLU `stem_relu` is about: "stem", "last" (behind the last batch norm) or "none".
        named: whether the name itself states the multipliers.
        factor: channels of the first stage over `width`.
        free: whether the stages may have any channels (`models.create`'s `channels`).
    """

    width: int
    stages: int
    build: Callable[..., nn.Module]
    multipliers: tuple[int, ...] | None = None
    blocks: tuple[int, ...] | None = None
    stem: str = "stem"
    named: bool = False
    factor: int = 1
    free: bool = False

    def channels(self, width: int, multipliers: Sequence[int]) -> int:
        """Channels of the widest stage, for a family whose shape may be changed."""
        return max(widths(self.factor * width, multipliers))


def check_is_spec(here: str, spec: object) -> None:
    """Raises PlanError unless `spec` is a model spec, the arguments of `models.create`: a name alone is none."""
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise PlanError(f"{here}: spec must be a mapping with a name, as {{'name': 'resnet18'}} (got {spec!r:.80})")


def family_of(name: str) -> Family | None:
    """What `name` stands for; None if no family has such a name."""
    if name in _RESNETS:
        return _resnet(*_RESNETS[name], width=64, multipliers=(2, 2, 2))
    if name in ("resnet20", "resnet32", "resnet56"):
        blocks = ((int(name[6:]) - 2) // 6,) * 3
        return _resnet(blocks, (2, 2, 2), width=16, multipliers=(2, 2))
    if name in _FIXED:
        return _FIXED[name]
    if found := re.fullmatch(r"(hrn|hrn34)-([1-9]\d?)x([1-9]\d?)x([1-9]\d?)x", name):
        multipliers = tuple(map(int, found.groups()[1:]))
        return _resnet(HYBRID_BLOCKS[found[1]], (2, 2, 2, 2), width=16, multipliers=multipliers, named=True)
    if found := re.fullmatch(r"wrn-([1-9]\d{1,2})-([1-9]\d?)", name):
        depth, factor = int(found[1]), int(found[2])
        return _wide(depth, factor) if depth % 6 == 4 else None
    return None


def _resnet(
    blocks: tuple[int, ...], convs: tuple[int, ...], *, width: int, multipliers: tuple[int, ...], named: bool = False
) -> Family:
    def build(blocks: tuple[int, ...], **settings: Any) -> nn.Module:
        return ResNet(blocks, convs=convs, **settings)

    return Family(width, len(blocks), build, multipliers, blocks, named=named, free=not named)


def _wide(depth: int, factor: int) -> Family:
    def build(blocks: tuple[int, ...], **settings: Any) -> nn.Module:
        return WideResNet(blocks, factor, **settings)

    return Family(16, 3, build, (2, 2), ((depth - 4) // 6,) * 3, stem="last", factor=factor)


def _vgg(hidden: int) -> Callable[..., nn.Module]:
    def build(*, width: int, stem_relu: bool, **settings: Any) -> nn.Module:
        return vgg.VGG(widths(width, vgg.MULTIPLIERS), hidden * width // 64, **settings)

    return build


_FIXED = {
    "vgg16-bn": Family(64, 5, _vgg(0), stem="none"),
    "vgg16-bn-fc": Family(64, 5, _vgg(4096), stem="none"),
    "mobilenetv1": Family(32, 5, MobileNetV1),
    "mobilenetv2": Family(32, 5, MobileNetV2),
}
