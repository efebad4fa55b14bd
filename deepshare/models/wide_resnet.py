"""WideResNets for 32x32 and 64x64 images (Zagoruyko and Komodakis 2016): norm and ReLU before each convolution."""

from collections.abc import Sequence

from torch import Tensor, nn

from deepshare.models.layers import conv, initialise, stem_stride, widths


class PreActivationBlock(nn.Module):
    """y = conv2(relu2(bn2(conv1(a)))) + shortcut, a = relu1(bn1(x)); shortcut is x, or a 1x1 convolution of a."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = conv(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:  # [N, inputs, H, W] -> [N, outputs, H/stride, W/stride]
        active = self.relu1(self.bn1(x))
        inner = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return inner + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """A 3x3 stem without ReLU, three stages of pre-activation blocks, a last batch norm, pooling, one linear layer.

    Stage s has factor * width * 2**(s - 1) channels and, from the second on, halves the image. It is `layer<s>`.

    Args:
        blocks: blocks per stage; (depth - 4) / 6 each in wrn-depth-factor.
        factor: how much wider the stages are than the stem.
        num_classes: logits per image.
        width: channels of the stem.
        multipliers: as in `ResNet`.
        stem_relu: the counting convention. DeepReShape and SENet count the ReLU behind the last batch norm (WRN-22-8:
            1,392,640); SNL and DeepShare have none there (1,359,872). No paper has one behind the stem.
        in_channels: channels of the image.
        rho: as in `ResNet`.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        factor: int,
        *,
        num_classes: int,
        width: int = 16,
        multipliers: Sequence[int] | None = None,
        stem_relu: bool = False,
        in_channels: int = 3,
        rho: float = 1.0,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 3, stem_stride(rho))
        channels = widths(factor * width, multipliers or (2,) * (len(blocks) - 1))
        inputs = width
        for stage, (outputs, count) in enumerate(zip(channels, blocks, strict=True)):
            layer = nn.Sequential(PreActivationBlock(inputs, outputs, 1 if stage == 0 else 2))
            layer.extend(PreActivationBlock(outputs, outputs, 1) for _ in range(count - 1))
            self.add_module(f"layer{stage + 1}", layer)
            inputs = outputs
        layer.add_module("bn", nn.BatchNorm2d(inputs))
        if stem_relu:
            layer.add_module("relu", nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        self._stages = len(blocks)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, num_classes]
        x = self.conv1(x)
        for stage in range(self._stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(self.pool(x).flatten(1))
