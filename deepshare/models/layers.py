"""What the models' files share: convolutions, channels per stage, the first values of weights."""

from collections.abc import Sequence

from torch import nn


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the image's size up to its stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)


def conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1) -> nn.Sequential:
    """relu(bn(conv(x))); its ReLU's site is `<path>.relu`."""
    layers = nn.Sequential()
    layers.add_module("conv", conv(inputs, outputs, kernel, stride, groups=groups))
    layers.add_module("bn", nn.BatchNorm2d(outputs))
    layers.add_module("relu", nn.ReLU())
    return layers


def stem_stride(rho: float) -> int:
    """Feature maps scaled by rho (DeepReDuce, section 3.3): the stem walks in steps of 1 / rho."""
    return {1.0: 1, 0.5: 2}[rho]


def widths(first: int, multipliers: Sequence[int]) -> list[int]:
    """Channels per stage: the first, then each times its multiplier."""
    found = [first]
    for factor in multipliers:
        found.append(found[-1] * factor)
    return found


def initialise(model: nn.Module) -> None:
    """Kaiming normal over the outgoing connections for convolutions; batch norms start as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
