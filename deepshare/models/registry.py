"""Models by name: what recipes, checkpoints and the command line say instead of a class."""

from collections.abc import Callable

import torch
from torch import nn

from deepshare.models.resnet import ResNet
from deepshare.plan import Plan, PlanError
from deepshare.site import checked_image_size

MAX_WIDTH = 4096  # 64 times the papers'
_MOST = {"num_classes": 2**20, "width": MAX_WIDTH, "in_channels": 2**16}  # far above any paper's; beyond it a mistake
_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


def _resnet(blocks: tuple[int, ...]) -> Callable[..., nn.Module]:
    def build(**settings: int | bool) -> nn.Module:
        return ResNet(blocks, **settings)  # type: ignore[arg-type]

    return build


_BUILDERS = {name: _resnet(blocks) for name, blocks in _BLOCKS.items()}


def names() -> tuple[str, ...]:
    """The names `create` knows."""
    return tuple(_BUILDERS)


def create(name: str, *, num_classes: int, width: int = 64, stem_relu: bool = False, in_channels: int = 3) -> nn.Module:
    """A freshly initialised model, every activation an nn.ReLU.

    Args:
        name: "resnet18" or "resnet34", in their 32x32/64x64 form (`ResNet`).
        num_classes: logits per image.
        width: channels of the first stage; the following have 2, 4, 8 times as many.
        stem_relu: the counting convention of the network's stem, see `ResNet`.
        in_channels: channels of the image.

    Raises:
        ValueError: an unknown name (the message lists the known ones), or a size that is no int from 1 to its limit
            (1,048,576 classes, width 4,096, 65,536 channels).
    """
    if name not in _BUILDERS:
        raise ValueError(f"models.create: name must be one of {', '.join(names())} (got {name!r})")
    for argument, value in (("num_classes", num_classes), ("width", width), ("in_channels", in_channels)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST[argument]:
            raise ValueError(f"models.create: {argument} must be an int in 1..{_MOST[argument]} (got {value!r:.80})")
    return _BUILDERS[name](num_classes=num_classes, width=width, stem_relu=stem_relu, in_channels=in_channels)


def convention(stem_relu: bool) -> str:
    """Which of the two published ways of counting a network's ReLUs `stem_relu` stands for."""
    if stem_relu:
        return "stem ReLU counted, as in DeepReDuce, DeepReShape, SENet"
    return "no ReLU after the stem, as in SNL, AutoReP, DeepShare"


def count_table(
    name: str,
    input_size: tuple[int, ...],  # (C, H, W)
    *,
    plan: Plan | None = None,
    width: int = 64,
    stem_relu: bool = False,
) -> str:
    """The table `deepshare count` prints: every site of a model by name, or of `plan`, which must fit it.

    Raises:
        PlanError: as `create`; or `plan` is for another model or image size.
    """
    size = checked_image_size("models.count_table", input_size)
    try:
        with torch.device("meta"):  # counting needs shapes alone
            model = create(name, num_classes=2, width=width, stem_relu=stem_relu, in_channels=size[0])
    except ValueError as error:
        raise PlanError(str(error)) from error
    found = Plan.of(model, size)
    if plan is not None:
        plan.check_fits(found)
    return f"{name}, width {width}: {convention(stem_relu)}\n{(plan or found).table()}"
