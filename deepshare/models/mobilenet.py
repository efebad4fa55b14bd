"""MobileNetV1 (Howard et al. 2017) and MobileNetV2 (Sandler et al. 2018) for 32x32 images, as DeepReDuce has them."""

from torch import Tensor, nn

from deepshare.models.layers import conv, conv_bn_relu, initialise, stem_stride

# Output channels and stride of each depthwise-separable block, by stage. Stride 4 into the second stage is what gives
# DeepReDuce's Table 11: 131,072 ReLUs at 32x32, then 28,672 at 8x8 (docs/models.md).
V1_STAGES = (
    ((64, 1),),
    ((128, 4), (128, 1)),
    ((256, 2), (256, 1)),
    ((512, 2), *(((512, 1),) * 5)),
    ((1024, 2), (1024, 1)),
)
# Expansion, output channels, blocks and stride of the first, of V2's seven groups; the first belongs to the stem.
V2_FIRST = (1, 16, 1, 1)
V2_STAGES = (
    ((6, 24, 2, 2),),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2),),
    ((6, 96, 3, 1),),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)
V2_LAST = 1280


class MobileNetV1(nn.Module):
    """A 3x3 stem, 13 blocks of a depthwise 3x3 and a 1x1 convolution, average pooling, one linear layer.

    The blocks stand in five stages `layer<s>`.

    Args:
        num_classes: logits per image.
        width: channels of the stem; all others scale with it (32 as published).
        stem_relu: a ReLU behind the stem; DeepReDuce counts it.
        in_channels: channels of the image.
        rho: 0.5 halves the sides of the feature maps (the stem has stride 2).
    """

    def __init__(
        self, *, num_classes: int, width: int = 32, stem_relu: bool = False, in_channels: int = 3, rho: float = 1.0
    ) -> None:
        super().__init__()
        self.stem = _stem(in_channels, width, stem_relu, rho)
        inputs = width
        for stage, blocks in enumerate(V1_STAGES):
            layer = nn.Sequential()
            for published, stride in blocks:
                outputs = _scaled(published, width)
                layer.append(_separable(inputs, outputs, stride))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", layer)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, num_classes]
        return self.fc(self.pool(_stages(self, self.stem(x))).flatten(1))


class InvertedResidual(nn.Module):
    """y = [x +] bn(project(relu(bn(depthwise(relu(bn(expand(x)))))))); no expansion where its factor is 1.

    x is added where the block keeps image and channels. The projection has no activation.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Identity() if expansion == 1 else conv_bn_relu(inputs, hidden, 1)
        self.depthwise = conv_bn_relu(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Sequential(conv(hidden, outputs, 1), nn.BatchNorm2d(outputs))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:  # [N, inputs, H, W] -> [N, outputs, H/stride, W/stride]
        inner = self.project(self.depthwise(self.expand(x)))
        return x + inner if self.adds else inner


class MobileNetV2(nn.Module):
    """A 3x3 stem, 17 inverted residuals, a 1x1 convolution to 1,280 channels, average pooling, one linear layer.

    Every ReLU6 of the paper is a ReLU here (docs/models.md says why). The first block, which has no expansion, stands
    with the stem (`first`); the others in five stages `layer<s>`, the last convolution in the fifth.

    Args: as `MobileNetV1`.
    """

    def __init__(
        self, *, num_classes: int, width: int = 32, stem_relu: bool = False, in_channels: int = 3, rho: float = 1.0
    ) -> None:
        super().__init__()
        self.stem = _stem(in_channels, width, stem_relu, rho)
        self.first, inputs = _inverted(width, (V2_FIRST,), width)
        for stage, groups in enumerate(V2_STAGES):
            layer, inputs = _inverted(inputs, groups, width)
            self.add_module(f"layer{stage + 1}", layer)
        outputs = _scaled(V2_LAST, width)
        layer.add_module("last", conv_bn_relu(inputs, outputs, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(outputs, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, num_classes]
        return self.fc(self.pool(_stages(self, self.first(self.stem(x)))).flatten(1))


def _scaled(published: int, width: int) -> int:
    """Published channels for a stem of `width` instead of 32, rounded; at least 1."""
    return max(1, round(published * width / 32))


def _stem(in_channels: int, width: int, relu: bool, rho: float) -> nn.Sequential:
    stem = conv_bn_relu(in_channels, width, 3, stem_stride(rho))
    if not relu:
        del stem.relu
    return stem


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    block = nn.Sequential()
    block.add_module("depthwise", conv_bn_relu(inputs, inputs, 3, stride, groups=inputs))
    block.add_module("pointwise", conv_bn_relu(inputs, outputs, 1))
    return block


def _inverted(inputs: int, groups: tuple[tuple[int, int, int, int], ...], width: int) -> tuple[nn.Sequential, int]:
    """(the blocks of some groups, their output channels)."""
    layer = nn.Sequential()
    for expansion, published, count, stride in groups:
        outputs = _scaled(published, width)
        for block in range(count):
            layer.append(InvertedResidual(inputs, outputs, expansion, stride if block == 0 else 1))
            inputs = outputs
    return layer, inputs


def _stages(model: nn.Module, x: Tensor) -> Tensor:
    for stage in range(5):
        x = getattr(model, f"layer{stage + 1}")(x)
    return x
