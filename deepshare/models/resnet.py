"""ResNet18 and ResNet34 in the form SNL, AutoReP and DeepShare use for 32x32 and 64x64 images (He et al. 2015)."""

from collections.abc import Sequence

from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """y = relu2(bn2(conv2(relu1(bn1(conv1(x))))) + shortcut(x)).

    Each ReLU is a module of its own, so that its site has a readable name.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        same = stride == 1 and inputs == outputs
        projection = (_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if same else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:  # [N, inputs, H, W] -> [N, outputs, H/stride, W/stride]
        inner = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem of stride 1, no max pooling, four stages of basic blocks, average pooling, one linear layer.

    Stage s has width * 2**s channels and (from the second on) halves the image: 32, 16, 8, 4 for 32x32.

    Args:
        blocks: blocks per stage.
        num_classes: logits per image.
        width: channels of the stem and of the first stage.
        stem_relu: put a ReLU after the stem's batch norm. SNL, AutoReP and DeepShare have none there and count 491,520
            ReLUs in ResNet18 at 32x32; DeepReDuce, DeepReShape and SENet have one and count 557,056.
        in_channels: channels of the image.
    """

    def __init__(
        self, blocks: Sequence[int], *, num_classes: int, width: int = 64, stem_relu: bool = False, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.stem_relu = nn.ReLU() if stem_relu else None
        widths = [width * 2**stage for stage in range(len(blocks))]
        inputs = [width, *widths[:-1]]
        stages = [_stage(inputs[s], widths[s], count, stride=1 if s == 0 else 2) for s, count in enumerate(blocks)]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, num_classes]
        x = self.bn1(self.conv1(x))
        if self.stem_relu is not None:
            x = self.stem_relu(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.pool(x).flatten(1))


def _stage(inputs: int, outputs: int, count: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(count - 1)))


def _initialise(model: nn.Module) -> None:
    """Kaiming normal over the outgoing connections for convolutions; batch norms start as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
